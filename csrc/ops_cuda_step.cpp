// CUDA implementations of operators of the decode step over the LibTorch stable ABI. Schemas, fakes
// and what runs elsewhere: aqlm_infer/generation/ops.py, which has checked shapes before.
#include <cmath>
#include <tuple>

#include "cuda/norm_rotate.h"
#include "cuda/step_attention.h"
#include "cuda/step_rows.h"
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
  Tensor sum = fresh(x, {M, K});
  Tensor y = fresh(x, {M, K});
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

// Rows like those of x [M, N], N contiguous, or a vector [N].
void check_like(const Tensor& t, const Tensor& x, const char* name) {
  CHECK(t.scalar_type() == x.scalar_type() && t.get_device_index() == x.get_device_index() &&
            t.size(t.dim() - 1) == x.size(1) && t.stride(t.dim() - 1) == 1 &&
            (t.dim() == 1 || (t.dim() == 2 && t.size(0) == x.size(0))),
        name, " must have contiguous rows of ", x.size(1), " values of x's dtype and device");
}

// (sum, y) of rows x and delta, or of the rows of the table x that numbers name.
std::tuple<Tensor, Tensor> norm(const Tensor& x, const Tensor* delta, const Tensor* numbers,
                                const Tensor& weight, double eps) {
  CHECK(x.dim() == 2 && x.stride(1) == 1, "x must be rows [M, N]");
  check_like(weight, x, "weight");
  CHECK(weight.dim() == 1, "weight must be [N]");
  if (delta) check_like(*delta, x, "delta");
  const int device = x.get_device_index();
  CHECK(!numbers || (numbers->dim() == 1 && numbers->scalar_type() == ScalarType::Long &&
                     numbers->get_device_index() == device),
        "tokens must be int64 [M] on the table's device");
  const int64_t M = numbers ? numbers->size(0) : x.size(0), N = x.size(1);
  CHECK(M < (int64_t(1) << 31) && N <= aqlm::kMostNorm, "a norm takes rows of at most ",
        aqlm::kMostNorm, " values, got [", M, ", ", N, "]");
  DeviceGuard guard(device);
  Tensor y = fresh(x, {M, N});
  Tensor sum = fresh(x, {M, N});
  if (M == 0 || N == 0) return {sum, y};
  aqlm::NormParams p = {};
  p.x = x.const_data_ptr();
  p.x_stride = x.stride(0);
  if (delta) p.delta = delta->const_data_ptr(), p.delta_stride = delta->stride(0);
  if (numbers) {
    p.numbers = static_cast<const int64_t*>(numbers->const_data_ptr());
    p.numbers_stride = numbers->stride(0);
  }
  p.weight = weight.const_data_ptr();
  p.sum = sum.mutable_data_ptr();
  p.y = y.mutable_data_ptr();
  p.tokens = static_cast<int>(M);
  p.n = static_cast<int>(N);
  p.eps = static_cast<float>(eps);
  p.type = dtype_of(x, "x");
  check_cuda(aqlm::launch_norm(p, current_stream(device)), "norm");
  return {sum, y};
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& delta, const Tensor& weight,
                                        double eps) {
  return norm(x, &delta, nullptr, weight, eps);
}
std::tuple<Tensor, Tensor> embed_norm(const Tensor& tokens, const Tensor& table,
                                      const Tensor& weight, double eps) {
  return norm(table, nullptr, &tokens, weight, eps);
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  CHECK(gate.dim() == 2 && gate.stride(1) == 1, "gate must be rows [M, N]");
  check_like(up, gate, "up");
  CHECK(up.dim() == 2, "up must be [M, N]");
  const int64_t M = gate.size(0), N = gate.size(1);
  CHECK(M < (int64_t(1) << 31) && N < (int64_t(1) << 31), "gate is [", M, ", ", N, "]");
  DeviceGuard guard(gate.get_device_index());
  Tensor y = fresh(gate, {M, N});
  if (M == 0 || N == 0) return y;
  aqlm::SwigluParams p = {};
  p.gate = gate.const_data_ptr();
  p.up = up.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.gate_stride = gate.stride(0);
  p.up_stride = up.stride(0);
  p.tokens = static_cast<int>(M);
  p.n = static_cast<int>(N);
  p.type = dtype_of(gate, "gate");
  check_cuda(aqlm::launch_swiglu(p, current_stream(gate.get_device_index())), "swiglu");
  return y;
}

Tensor rope_store(const Tensor& q, const Tensor& key, const Tensor& value, const Tensor& cos,
                  const Tensor& sin, const Tensor& ids, Tensor keys, Tensor values) {
  CHECK(q.dim() == 4 && keys.dim() == 4, "q must be [B, T, H, D], keys [B, heads, L, D]");
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), D = q.size(3);
  const int64_t heads = keys.size(1), L = keys.size(2);
  const int device = q.get_device_index();
  auto check = [&](const Tensor& t, std::initializer_list<int64_t> sizes, const char* name) {
    bool ok = t.dim() == static_cast<int64_t>(sizes.size()) && t.stride(t.dim() - 1) == 1 &&
              t.scalar_type() == q.scalar_type() && t.get_device_index() == device;
    int64_t i = 0;
    for (const int64_t size : sizes) ok = ok && t.size(i++) == size;
    CHECK(ok, name, " does not fit q [", B, ", ", T, ", ", H, ", ", D, "] and a cache of ", heads,
          " heads and ", L, " positions, or is not contiguous in the last dimension");
  };
  check(q, {B, T, H, D}, "q");
  check(key, {B, T, heads, D}, "key");
  check(value, {B, T, heads, D}, "value");
  check(cos, {L, D}, "cos");
  check(sin, {L, D}, "sin");
  check(keys, {B, heads, L, D}, "keys");
  check(values, {B, heads, L, D}, "values");
  CHECK(T <= L && D % 2 == 0 && cos.stride(0) == D && sin.stride(0) == D &&
            B * T < (int64_t(1) << 31) && ids.dim() == 2 && ids.size(0) == B &&
            ids.size(1) == T && ids.scalar_type() == ScalarType::Long &&
            ids.get_device_index() == device,
        T, " tokens do not fit ", L, " positions, or ids are not int64 [", B, ", ", T, "]");
  DeviceGuard guard(device);
  Tensor out = fresh(q, {B, T, H, D});
  if (B * T == 0) return out;
  aqlm::RopeParams p = {};
  p.q = q.const_data_ptr();
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.q_b = q.stride(0), p.q_t = q.stride(1), p.q_h = q.stride(2);
  p.key_b = key.stride(0), p.key_t = key.stride(1), p.key_h = key.stride(2);
  p.value_b = value.stride(0), p.value_t = value.stride(1), p.value_h = value.stride(2);
  p.cos = cos.const_data_ptr();
  p.sin = sin.const_data_ptr();
  p.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  p.ids_b = ids.stride(0), p.ids_t = ids.stride(1);
  p.out = out.mutable_data_ptr();
  p.keys = keys.mutable_data_ptr();
  p.values = values.mutable_data_ptr();
  p.k_b = keys.stride(0), p.k_h = keys.stride(1), p.k_l = keys.stride(2);
  p.v_b = values.stride(0), p.v_h = values.stride(1), p.v_l = values.stride(2);
  p.batch = static_cast<int>(B), p.length = static_cast<int>(T);
  p.q_heads = static_cast<int>(H), p.heads = static_cast<int>(heads);
  p.head_dim = static_cast<int>(D);
  p.type = dtype_of(q, "q");
  check_cuda(aqlm::launch_rope(p, current_stream(device)), "rope_store");
  return out;
}

// rope_attention for what launch_step_attention takes (rows), or its image.
Tensor step_attention(const Tensor& q, const Tensor& key, const Tensor& value, const Tensor& cos,
                      const Tensor& sin, const Tensor& ids, const Tensor& filled, Tensor keys,
                      Tensor values, const Tensor& mask, double scale, int64_t image) {
  CHECK(q.dim() == 3 && keys.dim() == 4, "q must be [B, H, D], keys [B, heads, L, D]");
  const int64_t B = q.size(0), H = q.size(1), D = q.size(2);
  const int64_t heads = keys.size(1), L = keys.size(2);
  const int device = q.get_device_index();
  const aqlm::DType type = dtype_of(q, "q");
  auto check = [&](const Tensor& t, std::initializer_list<int64_t> sizes, const char* name) {
    bool ok = t.dim() == static_cast<int64_t>(sizes.size()) && t.stride(t.dim() - 1) == 1 &&
              t.scalar_type() == q.scalar_type() && t.get_device_index() == device &&
              reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
    int64_t i = 0;
    for (const int64_t size : sizes) {
      ok = ok && t.size(i) == size && (i + 1 == t.dim() || t.stride(i) % 8 == 0);
      ++i;
    }
    CHECK(ok, name, " does not fit q [", B, ", ", H, ", ", D, "] and a cache of ", heads,
          " heads and ", L, " positions, or its vectors are not contiguous and 16-byte aligned");
  };
  check(q, {B, H, D}, "q");
  check(key, {B, heads, D}, "key");
  check(value, {B, heads, D}, "value");
  check(cos, {L, D}, "cos");
  check(sin, {L, D}, "sin");
  check(keys, {B, heads, L, D}, "keys");
  check(values, {B, heads, L, D}, "values");
  CHECK(type != aqlm::DType::kFloat32 && (D == 64 || D == 128) && heads > 0 && H % heads == 0 &&
            H / heads <= aqlm::kMostGroup && cos.stride(0) == D && sin.stride(0) == D &&
            B < 65536 && heads < 65536 && L < (int64_t(1) << 31),
        "no clusters for q [", B, ", ", H, ", ", D, "] and ", heads, " heads");
  CHECK(ids.numel() == B && filled.numel() == 1 && ids.scalar_type() == ScalarType::Long &&
            filled.scalar_type() == ScalarType::Long && ids.get_device_index() == device &&
            filled.get_device_index() == device,
        "ids and filled must be int64 [", B, ", 1] and [1] on q's device");
  CHECK(mask.dim() == 2 && mask.size(0) == B && mask.size(1) == L && mask.stride(1) == 1 &&
            mask.scalar_type() == ScalarType::Bool && mask.get_device_index() == device,
        "mask must be bool [", B, ", ", L, "] on q's device");
  CHECK(image == 0 || (image >= B && H * D % 32 == 0), "image=", image, " is no image of ", B,
        " tokens of ", H * D);
  DeviceGuard guard(device);
  Tensor out = image ? fresh(q, {H * D / 32, 4, image, 8}) : fresh(q, {B, H, D});
  if (B == 0) return out;
  aqlm::StepAttentionParams p = {};
  p.q = q.const_data_ptr();
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.q_b = q.stride(0), p.q_h = q.stride(1);
  p.key_b = key.stride(0), p.key_h = key.stride(1);
  p.value_b = value.stride(0), p.value_h = value.stride(1);
  p.cos = cos.const_data_ptr();
  p.sin = sin.const_data_ptr();
  p.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  p.ids_b = ids.stride(0);
  p.filled = static_cast<const int64_t*>(filled.const_data_ptr());
  p.keys = keys.mutable_data_ptr();
  p.values = values.mutable_data_ptr();
  p.k_b = keys.stride(0), p.k_h = keys.stride(1), p.k_l = keys.stride(2);
  p.v_b = values.stride(0), p.v_h = values.stride(1), p.v_l = values.stride(2);
  p.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  p.mask_b = mask.stride(0);
  p.out = out.mutable_data_ptr();
  p.image = static_cast<int>(image);
  p.batch = static_cast<int>(B), p.heads = static_cast<int>(heads);
  p.group = static_cast<int>(H / heads), p.length = static_cast<int>(L);
  p.head_dim = static_cast<int>(D);
  p.scale = static_cast<float>(scale);
  p.type = type;
  check_cuda(aqlm::launch_step_attention(p, current_stream(device)), "step_attention");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aqlm_infer, CUDA, m) {
  m.impl("rotated_norm", TORCH_BOX(&rotated_norm));
  m.impl("eager_add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("eager_embed_norm", TORCH_BOX(&embed_norm));
  m.impl("eager_swiglu", TORCH_BOX(&swiglu));
  m.impl("eager_rope_store", TORCH_BOX(&rope_store));
  m.impl("step_attention", TORCH_BOX(&step_attention));
}
