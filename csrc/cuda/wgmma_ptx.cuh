// Hopper only: warpgroup MMAs, thin wrappers of one or two instructions.
//
// A warpgroup is 4 warps; every instruction here that starts with wgmma needs all of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "mbarrier.cuh"

namespace aqlm {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Registers of this warpgroup's threads from here on.
template <int n>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(n));
}
template <int n>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(n));
}
// Barrier of the first `threads` threads of the block.
template <int threads>
__device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;" :: "n"(threads) : "memory");
}

// Barrier of 64 threads: two warps, pair `pair` of at most 15.
__device__ __forceinline__ void pair_sync(int pair) {
  asm volatile("bar.sync %0, 64;" :: "r"(pair + 1) : "memory");
}

// Makes this thread's writes to shared memory visible to MMAs; a barrier for others' must follow.
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Registers written before are ordered before the following MMAs.
__device__ __forceinline__ void mma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void mma_group_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most n of this warpgroup's groups are unfinished.
template <int n>
__device__ __forceinline__ void mma_groups_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(n) : "memory");
}

// Descriptor of a K-major operand of 8 x 16-byte core matrices without swizzle: distances in bytes
// between core matrices along K and along the other dimension.
__device__ __forceinline__ uint64_t core_matrices(const void* p, int k_distance,
                                                  int other_distance) {
  return static_cast<uint64_t>(smem_address(p) >> 4 & 0x3fff) |
         static_cast<uint64_t>(k_distance >> 4) << 16 |
         static_cast<uint64_t>(other_distance >> 4) << 32;
}

#define AQLM_F8(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), \
                      "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define AQLM_F32(c, i) AQLM_F8(c, i), AQLM_F8(c, i + 8), AQLM_F8(c, i + 16), AQLM_F8(c, i + 24)
#define AQLM_R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define AQLM_R16 AQLM_R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define AQLM_R32 AQLM_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define AQLM_R128 AQLM_R64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80" \
                           ",%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97" \
                           ",%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
                           ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124"     \
                           ",%125,%126,%127"
#define AQLM_R64 AQLM_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
                          ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// 64 x N += 64 x 16 (registers) times 16 x N (shared memory), float32 accumulation.
#define AQLM_WGMMA(N, type, name, registers, a0, a1, a2, a3, desc, ...)                         \
  __device__ __forceinline__ void wgmma(float (&c)[N / 2], const uint32_t* a, uint64_t b, type) { \
    asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name " {" registers   \
                 "}, {" a0 "," a1 "," a2 "," a3 "}, " desc ", add, 1, 1, 0;\n}"                   \
                 : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));             \
  }
#define AQLM_WGMMAS(type, name)                                                               \
  AQLM_WGMMA(16, type, name, AQLM_R8, "%8", "%9", "%10", "%11", "%12", AQLM_F8(c, 0))         \
  AQLM_WGMMA(32, type, name, AQLM_R16, "%16", "%17", "%18", "%19", "%20", AQLM_F8(c, 0),      \
             AQLM_F8(c, 8))                                                                   \
  AQLM_WGMMA(64, type, name, AQLM_R32, "%32", "%33", "%34", "%35", "%36", AQLM_F32(c, 0))     \
  AQLM_WGMMA(128, type, name, AQLM_R64, "%64", "%65", "%66", "%67", "%68", AQLM_F32(c, 0),    \
             AQLM_F32(c, 32))                                                                 \
  AQLM_WGMMA(256, type, name, AQLM_R128, "%128", "%129", "%130", "%131", "%132",              \
             AQLM_F32(c, 0), AQLM_F32(c, 32), AQLM_F32(c, 64), AQLM_F32(c, 96))
AQLM_WGMMAS(__half, "f16")
AQLM_WGMMAS(__nv_bfloat16, "bf16")


// 64 x N += 64 x 32 (registers) times 32 x N (shared memory) in int8, exact int32 accumulation;
// without `accumulate` c's old values count as zero.
#define AQLM_I8(c, i) "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3]), "+r"(c[i + 4]), \
                      "+r"(c[i + 5]), "+r"(c[i + 6]), "+r"(c[i + 7])
#define AQLM_I32(c, i) AQLM_I8(c, i), AQLM_I8(c, i + 8), AQLM_I8(c, i + 16), AQLM_I8(c, i + 24)
#define AQLM_WGMMA_INT8(N, registers, a0, a1, a2, a3, desc, add, ...)                            \
  __device__ __forceinline__ void wgmma(int (&c)[N / 2], const uint32_t* a, uint64_t b,          \
                                        int accumulate = 1) {                                    \
    asm volatile("{\n.reg .pred add;\nsetp.ne.s32 add, " add ", 0;\n"                             \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" registers "}, {" a0 "," \
                 a1 "," a2 "," a3 "}, " desc ", add;\n}"                                         \
                 : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),             \
                   "r"(accumulate));                                                             \
  }
AQLM_WGMMA_INT8(16, AQLM_R8, "%8", "%9", "%10", "%11", "%12", "%13", AQLM_I8(c, 0))
AQLM_WGMMA_INT8(32, AQLM_R16, "%16", "%17", "%18", "%19", "%20", "%21", AQLM_I8(c, 0),
                AQLM_I8(c, 8))
AQLM_WGMMA_INT8(64, AQLM_R32, "%32", "%33", "%34", "%35", "%36", "%37", AQLM_I32(c, 0))
AQLM_WGMMA_INT8(128, AQLM_R64, "%64", "%65", "%66", "%67", "%68", "%69", AQLM_I32(c, 0),
                AQLM_I32(c, 32))

#undef AQLM_I8
#undef AQLM_I32
#undef AQLM_WGMMA_INT8
#undef AQLM_F8
#undef AQLM_F32
#undef AQLM_R8
#undef AQLM_R16
#undef AQLM_R32
#undef AQLM_R64
#undef AQLM_R128
#undef AQLM_WGMMA
#undef AQLM_WGMMAS

#endif

}  // namespace aqlm
