// Host side of a launch: shared-memory opt-in once per kernel and device, dependent launch.
#pragma once

#include <atomic>
#include <utility>

#include "launch.h"

namespace aqlm {

// Raises the dynamic shared-memory limit of `kernel` on first use per device (bit per device).
template <typename Kernel>
cudaError_t allow_smem(Kernel kernel, std::atomic<unsigned long long>* done, int device,
                       int bytes) {
  if (device >= 64 || (done->load(std::memory_order_relaxed) >> device & 1) == 0) {
    const cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess) return e;
    if (device < 64) done->fetch_or(1ull << device, std::memory_order_relaxed);
  }
  return cudaSuccess;
}

#ifdef AQLM_TUNE
extern bool dependent_launch;
#else
constexpr bool dependent_launch = true;
#endif

// Enqueues with programmatic dependent launch where the device has it: the kernel's prologue
// overlaps the previous kernel's tail. Every kernel launched so calls grid_dependency_wait. Blocks
// are in clusters of `cluster` along x (above 1: Hopper and later).
template <typename... Params, typename... Args>
cudaError_t enqueue_clusters(int cluster, void (*kernel)(Params...), dim3 grid, int threads,
                             int smem, cudaStream_t stream, Args&&... args) {
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  DeviceInfo info;
  if (e == cudaSuccess) e = device_info(device, &info);
  if (e != cudaSuccess) return e;
  cudaLaunchAttribute attributes[2];
  int count = 0;
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (info.arch >= 90 && dependent_launch) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

template <typename... Params, typename... Args>
cudaError_t enqueue(void (*kernel)(Params...), dim3 grid, int threads, int smem,
                    cudaStream_t stream, Args&&... args) {
  return enqueue_clusters(1, kernel, grid, threads, smem, stream, std::forward<Args>(args)...);
}

// The same for a kernel with a large shared-memory block; `limit` is the most it ever asks for.
#define AQLM_ENQUEUE_SMEM(kernel, limit, grid, threads, smem, stream, params)              \
  [&]() -> cudaError_t {                                                                   \
    static std::atomic<unsigned long long> done{0};                                        \
    int device = 0;                                                                        \
    cudaError_t e = cudaGetDevice(&device);                                                \
    if (e == cudaSuccess) e = allow_smem(kernel, &done, device, limit);                    \
    return e == cudaSuccess ? enqueue(kernel, grid, threads, smem, stream, params) : e;    \
  }()

}  // namespace aqlm
