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
#include <optional>
#include <vector>

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

// An uninitialised tensor on `like`'s device, of its dtype unless told: 0.4 us of the host, where
// the dispatcher's new_empty takes 1.5 (Zen 5, 2026-11-28). Operators make two or three a call.
inline Tensor fresh(const Tensor& like, const std::vector<int64_t>& sizes,
                    std::optional<ScalarType> type = std::nullopt) {
  int32_t dtype = 0;
  switch (type.value_or(like.scalar_type())) {
    case ScalarType::Half: dtype = aoti_torch_dtype_float16(); break;
    case ScalarType::BFloat16: dtype = aoti_torch_dtype_bfloat16(); break;
    case ScalarType::Float: dtype = aoti_torch_dtype_float32(); break;
    case ScalarType::Byte: dtype = aoti_torch_dtype_uint8(); break;
    case ScalarType::Long: dtype = aoti_torch_dtype_int64(); break;
    default: CHECK(false, "operators make no tensors of this dtype");
  }
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * (sizes[i] > 0 ? sizes[i] : 1);
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
      aoti_torch_device_type_cuda(), like.get_device_index(), &made));
  return Tensor(made);
}

// Elements from one of `rows` rows of K to the next; tensors that are not [M, K] are contiguous.
inline int64_t row_stride(const Tensor& rows, int64_t K) {
  return rows.dim() == 2 ? rows.stride(0) : K;
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
