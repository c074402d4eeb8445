// Blocks of a cluster: stores to each other's shared memory, and the barrier after which they can be
// read. Hopper and later.
#pragma once

#include "ptx.cuh"

namespace aqlm {

// Stores to block `rank`'s shared memory at the address that `p` has in this block.
__device__ __forceinline__ uint32_t cluster_address(const void* p, int rank) {
  uint32_t at;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(smem_address(p)), "r"(rank));
  return at;
}
__device__ __forceinline__ void store_cluster(const float* p, int rank, float v) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" :: "r"(cluster_address(p, rank)), "f"(v)
               : "memory");
}
__device__ __forceinline__ void store_cluster(const float2* p, int rank, float2 v) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1,%2};"
               :: "r"(cluster_address(p, rank)), "f"(v.x), "f"(v.y) : "memory");
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// Maximum over the warp of values that are not negative: their bits are in the same order.
__device__ __forceinline__ float largest_of_warp(float v) {
  return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(v)));
}

}  // namespace aqlm
