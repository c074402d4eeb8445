// Blocks of a cluster: stores to each other's shared memory, and how their readers know of them.
// Hopper and later: nothing before.
//
// An arrival at the cluster's barrier that releases stores is a MEMBAR.ALL.GPU: it waits until all
// of a thread's accesses to global memory are done. So data go by `send_cluster`, whose bytes a
// barrier in the receiving block counts, and the cluster's barrier says once, relaxed, that all
// blocks have begun and have initialised theirs.
#pragma once

#include "mbarrier.cuh"
#include "ptx.cuh"

namespace aqlm {

// The address in block `rank`'s shared memory that `p` is in this block's.
__device__ __forceinline__ uint32_t cluster_address(const void* p, int rank) {
  uint32_t at = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(smem_address(p)), "r"(rank));
#endif
  return at;
}
// The same address's bytes arrive in block `rank`, and count there on `barrier`.
__device__ __forceinline__ void send_cluster(const float* p, int rank, float v,
                                             const uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];"
               :: "r"(cluster_address(p, rank)), "f"(v), "r"(cluster_address(barrier, rank))
               : "memory");
#endif
}
__device__ __forceinline__ void send_cluster(const float2* p, int rank, float2 v,
                                             const uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1,%2}, [%3];"
      :: "r"(cluster_address(p, rank)), "f"(v.x), "f"(v.y), "r"(cluster_address(barrier, rank))
      : "memory");
#endif
}
// By one thread, before it arrives: a barrier that completes when `bytes` have come.
__device__ __forceinline__ void expect_from_cluster(uint64_t* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  mbar::init(barrier, 1);
  mbar::init_fence();
  mbar::expect(barrier, bytes);
#endif
}
__device__ __forceinline__ void wait_for_cluster(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  mbar::wait(barrier, 0);
#endif
}
// All blocks have begun. Every thread arrives, and waits later.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

}  // namespace aqlm
