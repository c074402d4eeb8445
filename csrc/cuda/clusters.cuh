// Blocks of a cluster: stores to each other's shared memory, and the barrier after which they can
// be read. Hopper and later: nothing before.
#pragma once

#include "ptx.cuh"

namespace aqlm {

// Stores to block `rank`'s shared memory at the address that `p` has in this block.
__device__ __forceinline__ uint32_t cluster_address(const void* p, int rank) {
  uint32_t at = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(smem_address(p)), "r"(rank));
#endif
  return at;
}
__device__ __forceinline__ void store_cluster(const float* p, int rank, float v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.f32 [%0], %1;" :: "r"(cluster_address(p, rank)), "f"(v)
               : "memory");
#endif
}
__device__ __forceinline__ void store_cluster(const float2* p, int rank, float2 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1,%2};"
               :: "r"(cluster_address(p, rank)), "f"(v.x), "f"(v.y) : "memory");
#endif
}
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

}  // namespace aqlm
