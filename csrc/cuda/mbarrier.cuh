// Barriers in shared memory and what completes them: arrivals and bulk copies.
// Thin wrappers; barrier i of an array completes its phases in turn, a waiter names the parity.
#pragma once

#include "ptx.cuh"

namespace aqlm::mbar {

__device__ __forceinline__ void init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;"
               :: "r"(smem_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}"
               :: "r"(smem_address(barrier)) : "memory");
}
#if __CUDA_ARCH__ >= 900
#define AQLM_TEST_WAIT "mbarrier.try_wait"
#else
#define AQLM_TEST_WAIT "mbarrier.test_wait"
#endif
// Waits until the phase of this parity is complete.
__device__ __forceinline__ void wait(uint64_t* barrier, int parity) {
  asm volatile("{\n.reg .pred done;\nretry:\n"
               AQLM_TEST_WAIT ".parity.shared.b64 done, [%0], %1;\n@!done bra retry;\n}"
               :: "r"(smem_address(barrier)), "r"(parity) : "memory");
}
#undef AQLM_TEST_WAIT

#if __CUDA_ARCH__ >= 900
// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives and announces bytes that copies will deliver.
__device__ __forceinline__ void expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(smem_address(barrier)), "r"(bytes) : "memory");
}
// Copies contiguous global memory (16-byte multiples) to shared memory.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :: "r"(smem_address(to)), "l"(from), "r"(bytes), "r"(smem_address(barrier)) : "memory");
}
// Starts copying contiguous global memory (16-byte multiples) to L2.
__device__ __forceinline__ void bulk_prefetch(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(from), "r"(bytes) : "memory");
}
#endif

}  // namespace aqlm::mbar
