// Hopper only: barriers in shared memory, the bulk copies that complete them, rings of stages.
// Thin wrappers; barrier i of an array completes its phases in turn, a waiter names the parity.
#pragma once

#include "ptx.cuh"

namespace aqlm {
namespace mbar {

__device__ __forceinline__ void init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
               :: "r"(smem_address(barrier)), "r"(arrivals));
}
// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(smem_address(barrier)) : "memory");
}
// A warp arrives once all of its lanes are here. compute-sanitizer's racecheck knows of an order
// between other threads and a lane that arrives, not of __syncwarp before it: in the build for it
// (AQLM_LANES_ARRIVE, SANITIZE=1 of benchmarks/ladder/cuda/Makefile) every lane arrives.
#ifdef AQLM_LANES_ARRIVE
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif
__device__ __forceinline__ void arrive_warp(uint64_t* barrier) {
  __syncwarp();
  if (kWarpArrivals == 32 || threadIdx.x % 32 == 0) arrive(barrier);
}
// Arrives when all earlier copy_async of this thread have arrived; the barrier's count knows of it.
__device__ __forceinline__ void arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];"
               :: "r"(smem_address(barrier)) : "memory");
}
// Arrives and announces bytes that copies will deliver.
__device__ __forceinline__ void expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(smem_address(barrier)), "r"(bytes) : "memory");
}
// Waits until the phase of this parity is complete.
__device__ __forceinline__ void wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nretry:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra retry;\n}"
      :: "r"(smem_address(barrier)), "r"(parity) : "memory");
}
// Copies contiguous global memory (16-byte multiples) to shared memory; the barrier counts bytes.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :: "r"(smem_address(to)), "l"(from), "r"(bytes), "r"(smem_address(barrier)) : "memory");
}
// Of a ring, by one thread: `full` is announced by the producer, `empty` by each of the readers.
template <int kStages>
__device__ __forceinline__ void init_ring(uint64_t* full, uint64_t* empty, int readers) {
  for (int i = 0; i < kStages; ++i) {
    init(full + i, 1);
    init(empty + i, readers);
  }
  init_fence();
}

}  // namespace mbar

// A ring of shared-memory stages, walked by the producer and by every consumer warp.
template <int kStages>
struct Ring {
  int stage = 0, phase = 0;
  __device__ __forceinline__ int next() const { return stage == kStages - 1 ? 0 : stage + 1; }
  __device__ __forceinline__ int previous() const { return stage == 0 ? kStages - 1 : stage - 1; }
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace aqlm
