// Helpers of the CUDA operators: errors, streams, dtypes.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>

#include "cuda/launch.h"

#define CHECK(...) STD_TORCH_CHECK(__VA_ARGS__)

namespace aqlm_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline void check_cuda(cudaError_t e, const char* what) {
  if (e == cudaErrorNoKernelImageForDevice || e == cudaErrorInvalidDeviceFunction)
    CHECK(false, what, ": this build of aqlm_infer._cuda has no kernel for the device (",
          cudaGetErrorString(e), "); rebuild with TORCH_CUDA_ARCH_LIST for it");
  CHECK(e == cudaSuccess, what, ": ", cudaGetErrorString(e));
}

// aoti_torch_get_current_cuda_stream lives in libtorch_cuda, which a CPU-only torch does not have
// to link against: it is looked up in the process instead.
inline cudaStream_t current_stream(int device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<GetStream>(
        dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  CHECK(get != nullptr, "this torch has no CUDA (aoti_torch_get_current_cuda_stream not found)");
  void* stream = nullptr;
  CHECK(get(device, &stream) == 0, "no current CUDA stream on cuda:", device);
  return static_cast<cudaStream_t>(stream);
}

inline aqlm::DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return aqlm::DType::kFloat16;
    case ScalarType::BFloat16: return aqlm::DType::kBFloat16;
    case ScalarType::Float: return aqlm::DType::kFloat32;
    default: CHECK(false, name, " must be float16, bfloat16 or float32");
  }
  return aqlm::DType::kFloat32;
}

// out = a @ b
inline void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(),
                                                      TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace aqlm_ops
