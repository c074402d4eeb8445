// Thin wrappers, one PTX instruction each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace aqlm {

// Codes are read once per CTA: 16 bytes past L1.
__device__ __forceinline__ uint4 load_stream(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// The same where `load`; else v stays. (No branch: see split_wgmma.cuh.)
__device__ __forceinline__ void load_stream_if(bool load, const void* p, uint4* v) {
  asm volatile("{\n.reg .pred load;\nsetp.ne.u32 load, %5, 0;\n"
               "@load ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
               : "+r"(v->x), "+r"(v->y), "+r"(v->z), "+r"(v->w)
               : "l"(p), "r"(static_cast<uint32_t>(load)));
}

// 4 bytes that are read once, past L1.
__device__ __forceinline__ uint32_t load_stream_word(const void* p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// 4 bytes, kept in its place among other volatile accesses (the compiler sinks a constant load
// below grid_dependency_wait).
__device__ __forceinline__ uint32_t load_early(const void* p) {
  uint32_t v;
  asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// The same of 8 bytes and of a 16-bit value.
__device__ __forceinline__ uint2 load_early8(const void* p) {
  uint2 v;
  asm volatile("ld.volatile.global.v2.u32 {%0,%1}, [%2];"
               : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
template <typename T>
__device__ __forceinline__ T load_early16(const T* p) {
  unsigned short v;
  asm volatile("ld.volatile.global.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
  return *reinterpret_cast<const T*>(&v);
}

// Brings the translation of an address, and its line to L2, while the previous kernel ends: the
// first load after the wait took 1000 cycles.
__device__ __forceinline__ void prefetch_line(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" :: "l"(p));
}

// Address of a shared-memory object as the 32-bit value that cp.async takes.
__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// Starts copying 16 bytes to shared memory past L1. Waits on it are counted, whereas a register
// load shares one of six scoreboards with later loads and then waits for those too.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :: "r"(smem_address(to)), "l"(from) : "memory");
}
// The same, or 16 zero bytes.
__device__ __forceinline__ void copy_async_or_zero(void* to, const void* from, bool copy) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(smem_address(to)), "l"(from), "r"(copy ? 16 : 0) : "memory");
}
// Closes a group of copies (an empty group is fine).
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most n of this thread's groups are unfinished.
template <int n>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" :: "n"(n) : "memory");
}

// 16 bytes through L1, ordered after grid_dependency_wait (volatile: never hoisted above it).
__device__ __forceinline__ uint4 load_cached(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

// The same where `load`; else v stays.
__device__ __forceinline__ void load_cached_if(bool load, const void* p, uint4* v) {
  asm volatile("{\n.reg .pred load;\nsetp.ne.u32 load, %5, 0;\n"
               "@load ld.global.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
               : "+r"(v->x), "+r"(v->y), "+r"(v->z), "+r"(v->w)
               : "l"(p), "r"(static_cast<uint32_t>(load)) : "memory");
}

// 8 bytes through L1, ordered after grid_dependency_wait.
__device__ __forceinline__ uint2 load_cached8(const void* p) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}

// 4 bytes through L1, ordered after grid_dependency_wait.
__device__ __forceinline__ uint32_t load_word(const void* p) {
  uint32_t v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Two 16-bit values through L1 (constant data only).
__device__ __forceinline__ uint32_t load_pair(const void* p) {
  return __ldg(static_cast<const uint32_t*>(p));
}

// Keeps an address in its register: the compiler would compute it anew at every use.
__device__ __forceinline__ void keep(uint32_t& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void keep(const uint8_t*& p) { asm volatile("" : "+l"(p)); }

// (a & b) | c in one instruction.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// 16 x 8 += 16 x 16 times 16 x 8 on the tensor cores, float32 accumulation.
__device__ __forceinline__ void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1, __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, "
               "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1, __nv_bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
               "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 x 8 += 16 x 8 times 8 x 8, float32 accumulation.
__device__ __forceinline__ void mma_1688(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b,
                                         __half) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, "
               "{%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
}
__device__ __forceinline__ void mma_1688(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b,
                                         __nv_bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
               "{%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
}

// The same of TF32: the low 13 bits of float32 are not read.
__device__ __forceinline__ void mma_1688(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, "
               "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 x 8 += 16 x 32 times 32 x 8 in int8 with exact int32 accumulation.
__device__ __forceinline__ void mma_16832(int (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, "
               "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit values in shared memory, transposed; lane 8 i + j has the address of
// row j of matrix i, and gets of each what the A operand of mma_16816 wants.
__device__ __forceinline__ void load_matrices_transposed(const void* row, uint32_t (&a)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(smem_address(row)) : "memory");
}
// An 8 x 8 matrix of 16-bit values, a pair of row lane / 4 a lane.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t v) {
  uint32_t r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// threadIdx.x read anew, so that nothing derived from it waits in registers through a loop before.
__device__ __forceinline__ int thread_again() {
  int v;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v));
  return v;
}

// Programmatic dependent launch: let the next kernel's blocks start (they wait before reading).
__device__ __forceinline__ void grid_dependents_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Wait until every earlier kernel has finished and its writes are visible.
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace aqlm
