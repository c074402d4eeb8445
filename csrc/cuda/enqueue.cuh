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

// `cluster`: of so many blocks along x (above 1: Hopper and later). `carveout`: percent of an SM's
// L1 that shall be shared memory; 0: the driver's choice, which is what this kernel alone needs.
struct Placement {
  int cluster, carveout;
};
// Enqueues with programmatic dependent launch where the device has it: the kernel's prologue
// overlaps the previous kernel's tail. Every kernel launched so calls grid_dependency_wait.
template <typename... Params, typename... Args>
cudaError_t enqueue_placed(Placement place, void (*kernel)(Params...), dim3 grid, int threads,
                           int smem, cudaStream_t stream, Args&&... args) {
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  DeviceInfo info;
  if (e == cudaSuccess) e = device_info(device, &info);
  if (e != cudaSuccess) return e;
  cudaLaunchAttribute attributes[3];
  int count = 0;
  if (place.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = place.cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (info.arch >= 90 && dependent_launch) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  if (place.carveout > 0) {
    attributes[count].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    attributes[count].val.sharedMemCarveout = place.carveout;
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
cudaError_t enqueue_clusters(int cluster, void (*kernel)(Params...), dim3 grid, int threads,
                             int smem, cudaStream_t stream, Args&&... args) {
  return enqueue_placed({cluster, 0}, kernel, grid, threads, smem, stream,
                        std::forward<Args>(args)...);
}

template <typename... Params, typename... Args>
cudaError_t enqueue(void (*kernel)(Params...), dim3 grid, int threads, int smem,
                    cudaStream_t stream, Args&&... args) {
  return enqueue_clusters(1, kernel, grid, threads, smem, stream, std::forward<Args>(args)...);
}

// The same for a kernel with a large shared-memory block; `limit` is the most it ever asks for.
#define AQLM_ENQUEUE_SMEM(kernel, limit, grid, threads, smem, stream, params)              \
  AQLM_ENQUEUE_PLACED((Placement{1, 0}), kernel, limit, grid, threads, smem, stream, params)
#define AQLM_ENQUEUE_PLACED(place, kernel, limit, grid, threads, smem, stream, params)     \
  [&]() -> cudaError_t {                                                                   \
    static std::atomic<unsigned long long> done{0};                                        \
    int device = 0;                                                                        \
    cudaError_t e = cudaGetDevice(&device);                                                \
    if (e == cudaSuccess) e = allow_smem(kernel, &done, device, limit);                    \
    if (e != cudaSuccess) return e;                                                        \
    return enqueue_placed(place, kernel, grid, threads, smem, stream, params);             \
  }()

}  // namespace aqlm
