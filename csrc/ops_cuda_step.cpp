// CUDA implementations of operators of the decode step over the LibTorch stable ABI. Schemas, fakes
// and what runs elsewhere: aqlm_infer/generation/ops.py, which has checked shapes before.
#include <cmath>
#include <tuple>

#include "cuda/norm_rotate.h"
#include "ops_cuda_common.h"

namespace {

using namespace aqlm_ops;

void check_rows(const Tensor& t, const Tensor& like, const char* name) {
  const int64_t size = static_cast<int64_t>(t.element_size());
  CHECK(t.scalar_type() == like.scalar_type() &&
            t.get_device_index() == like.get_device_index() &&
            t.size(t.dim() - 1) == like.size(1) && t.stride(t.dim() - 1) == 1 &&
            (t.dim() == 1 || (t.dim() == 2 && t.size(0) == like.size(0) &&
                              t.stride(0) * size % 16 == 0)) &&
            reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0,
        name, " must have rows of ", like.size(1),
        " values of x's dtype and device, each 16-byte aligned");
}

std::tuple<Tensor, Tensor> rotated_norm(const Tensor& x, const Tensor& delta, const Tensor& weight,
                                        double eps, const Tensor& su, const Tensor& h,
                                        int64_t factor) {
  CHECK(x.dim() == 2, "x must be [M, K]");
  const int64_t M = x.size(0), K = x.size(1), power = factor > 0 ? K / factor : 0;
  CHECK(power >= 128 && K == factor * power && (power & (power - 1)) == 0 && K < (1 << 30),
        "K=", K, ", factor=", factor, ": K / factor must be a power of two from 128 on");
  check_rows(x, x, "x");
  check_rows(delta, x, "delta");
  check_rows(weight, x, "weight");
  const int device = x.get_device_index();
  CHECK(su.scalar_type() == ScalarType::Float && su.numel() == K && su.is_contiguous() &&
            su.get_device_index() == device &&
            reinterpret_cast<uintptr_t>(su.const_data_ptr()) % 16 == 0,
        "su must be ", K, " contiguous float32 on x's device, 16-byte aligned");
  CHECK(factor == 1 || (h.numel() == factor * factor && h.scalar_type() == ScalarType::Char &&
                        h.is_contiguous() && h.get_device_index() == device),
        "h must be contiguous int8 [", factor, ", ", factor, "] on x's device");
  DeviceGuard guard(device);
  Tensor sum = torch::stable::new_empty(x, {M, K});
  Tensor y = torch::stable::new_empty(x, {M, K});
  if (M == 0) return {sum, y};
  CHECK(M < 65536, "M=", M, ": at most 65535 tokens");
  aqlm::NormRotateParams p = {};
  p.x = x.const_data_ptr();
  p.delta = delta.const_data_ptr();
  p.x_stride = x.stride(0);
  p.delta_stride = delta.stride(0);
  p.weight = weight.const_data_ptr();
  p.su = static_cast<const float*>(su.const_data_ptr());
  p.h = factor > 1 ? static_cast<const int8_t*>(h.const_data_ptr()) : nullptr;
  p.sum = sum.mutable_data_ptr();
  p.y = y.mutable_data_ptr();
  p.type = dtype_of(x, "x");
  p.n = static_cast<int>(K);
  p.factor = static_cast<int>(factor);
  p.tokens = static_cast<int>(M);
  p.eps = static_cast<float>(eps);
  p.gain = 1.f / std::sqrt(static_cast<float>(K));
  check_cuda(aqlm::launch_norm_rotate(p, current_stream(device)), "rotated_norm");
  return {sum, y};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aqlm_infer, CUDA, m) {
  m.impl("rotated_norm", TORCH_BOX(&rotated_norm));
}
