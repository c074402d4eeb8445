// E8P matmuls joined with what follows them in a decode step, up to the next layer's rotated input.
//
// checks -> params -> launch, as in ops_cuda.cpp. Schemas, fakes and the operators apart:
// aqlm_infer/generation/rotated_ops.py.
#include <cmath>
#include <optional>
#include <tuple>

#include "cuda/mix_swiglu.h"
#include "cuda/norm_rotate.h"
#include "cuda/step_rows.h"
#include "ops_cuda_rotated.h"

namespace {

using namespace aqlm_ops;

// Most tokens for which a norm or SwiGLU is joined with the rotations around it.
constexpr int kMostJoinedTokens = 16;

// Launches a scheduled matmul of contiguous z. Its workspace must live until what reads the partial
// sums is launched: memory that is given back sooner may become the next operand's.
[[nodiscard]] Tensor launch_product(const aqlm::RotatedConfig& config, const Tensor& z,
                                    aqlm::DType type, aqlm::RotatedMatmul* p,
                                    cudaStream_t stream) {
  std::optional<Tensor> workspace;
  set_workspace(config, z, workspace, p);
  p->x = z.const_data_ptr();
  p->x_stride = p->w.K;
  p->x_type = type;
  check_cuda(aqlm::launch_rotated(config, *p, stream), "matmul");
  return *workspace;
}

// x + sv * U (z Wq^T) and U^T (su * its norm), in two launches. False: not for these.
bool matmul_norm(const aqlm::RotatedWeight& w, const Tensor& z, const std::optional<Tensor>& sv,
                 const aqlm::Rotation& r, aqlm::NormRotateParams n, cudaStream_t stream) {
  aqlm::DeviceInfo info;
  check_cuda(aqlm::device_info(z.get_device_index(), &info), "device_info");
  if (n.tokens > kMostJoinedTokens || r.factor != 1 || !sv ||
      sv->scalar_type() != ScalarType::Float ||
      reinterpret_cast<uintptr_t>(sv->const_data_ptr()) % 16 != 0 ||
      n.type == aqlm::DType::kFloat32 || !aqlm::takes_mix_norm(n.n))
    return false;
  const aqlm::RotatedConfig config = aqlm::choose_rotated(w, n.type, n.tokens, true, info);
  if (config.tiles == 0 || n.tokens > 4 * config.tiles) return false;
  aqlm::RotatedMatmul p = {};
  p.w = w;
  p.tokens = n.tokens;
  aqlm::schedule_rotated(config, info, &p);
  const bool owned = config.share == aqlm::Share::kOwned;
  p.local_bits = owned ? 5 : aqlm::local_bits_of(config, p.s, r, info);  // 5: a block's 32 rows
  if (owned ? n.tokens != 1 : p.s.group_rows != 512 || p.local_bits != 9 || info.arch < 90)
    return false;
  const Tensor workspace = launch_product(config, z, n.type, &p, stream);
  aqlm::MixNormParams m = {};
  m.sv = static_cast<const float*>(sv->const_data_ptr());
  m.x = n.x;
  m.weight = n.weight;
  m.su = n.su;
  m.sum = n.sum;
  m.y = n.y;
  m.type = n.type;
  m.n = n.n;
  m.eps = n.eps;
  m.gain = n.gain;
  if (owned) {
    m.z = p.partials;
    check_cuda(aqlm::launch_mix_norm(m, stream), "mix_norm");
  } else {
    aqlm::RotateParams sums = {};
    sums.partials = p.partials;
    sums.s = p.s;
    sums.tokens = p.tokens;
    check_cuda(aqlm::launch_mix_norm(m, sums, stream), "mix_norm");
  }
  return true;
}

// Up to 16 tokens: U_n^T (su * silu(gate) * up) of a product of gate and up, in place of its second
// kernel. False: not for these.
bool matmul_swiglu(const aqlm::RotatedWeight& w, const Tensor& z, const std::optional<Tensor>& sv,
                   const aqlm::Rotation& r, bool up_first, const float* su,
                   const aqlm::Rotation& next, Tensor& y, cudaStream_t stream) {
  const int tokens = static_cast<int>(y.size(0)), n = next.n;
  aqlm::MixSwigluParams p = {};
  p.type = dtype_of(z, "z");
  if (p.type == aqlm::DType::kFloat32 || !sv || sv->scalar_type() != ScalarType::Float ||
      next.factor != r.factor || tokens > kMostJoinedTokens)
    return false;
  aqlm::DeviceInfo info;
  check_cuda(aqlm::device_info(z.get_device_index(), &info), "device_info");
  const aqlm::RotatedConfig config = aqlm::choose_rotated(w, p.type, tokens, true, info);
  if (config.tiles == 0 || config.share == aqlm::Share::kOwned || tokens > 4 * config.tiles)
    return false;
  aqlm::RotatedMatmul m = {};
  m.w = w;
  m.tokens = tokens;
  aqlm::schedule_rotated(config, info, &m);
  m.local_bits = aqlm::local_bits_of(config, m.s, r, info);
  if (!aqlm::takes_mix_swiglu(r, m.local_bits)) return false;
  const Tensor workspace = launch_product(config, z, p.type, &m, stream);
  p.product.r = r;
  p.product.s = m.s;
  p.product.partials = m.partials;
  p.product.local_bits = m.local_bits;
  p.product.tokens = tokens;
  p.product.post = sv->const_data_ptr();
  p.product.gain = 1.f / std::sqrt(static_cast<float>(r.n));
  p.up_first = up_first;
  p.su = su;
  p.h = next.h;
  p.y = y.mutable_data_ptr();
  p.gain = 1.f / std::sqrt(static_cast<float>(n));
  if (info.arch >= 90 && tokens >= aqlm::kSwigluClusterTokens) {
    check_cuda(aqlm::launch_mix_swiglu_clusters(p, stream), "mix_swiglu");
    return true;
  }
  Tensor columns = fresh(z, {tokens, n}, ScalarType::Float);
  p.columns = static_cast<float*>(columns.mutable_data_ptr());
  check_cuda(aqlm::launch_mix_swiglu(p, stream), "mix_swiglu");
  return true;
}

// sum = x + sv * U (z Wq^T), y = U^T (su * the norm of sum).
std::tuple<Tensor, Tensor> e8p_matmul_norm(const Tensor& z, const Tensor& packed,
                                           const std::optional<Tensor>& sv, const Tensor& h,
                                           int64_t bits, double residual, int64_t factor,
                                           const Tensor& x, const Tensor& weight, double eps,
                                           const Tensor& su) {
  check_input(z, packed, "z");
  CHECK(z.dim() == 2 && x.dim() == 2 && z.size(0) == x.size(0) && z.size(0) < 65536 &&
            z.scalar_type() == x.scalar_type(),
        "z [M, K] and x [M, N] must have as many rows and one dtype");
  const int64_t M = x.size(0), N = x.size(1), power = factor > 0 ? N / factor : 0;
  CHECK(power >= 128, "N=", N, ", factor=", factor, ": N / factor must be at least 128");
  const int device = x.get_device_index();
  DeviceGuard guard(device);
  aqlm::RotatedWeight w = e8p_weight(bits, residual, N, z.size(1));
  set_packed(w, packed);
  const aqlm::Rotation r = rotation_of(h, N, factor, 0, true, device);
  aqlm::DType sv_type;
  vector_of(sv, N, "sv", device, &sv_type);
  auto vector = [&](const Tensor& t, ScalarType type, const char* name) {
    CHECK(t.numel() == N && t.is_contiguous() && t.scalar_type() == type &&
              t.get_device_index() == device &&
              reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0,
          name, " must be ", N, " contiguous values on x's device, 16-byte aligned");
    return t.const_data_ptr();
  };
  Tensor rows = torch::stable::contiguous(x), in = torch::stable::contiguous(z);
  Tensor sum = fresh(x, {M, N}), y = fresh(x, {M, N});
  if (M == 0) return {sum, y};
  aqlm::NormRotateParams n = {};
  n.x = rows.const_data_ptr();
  CHECK(reinterpret_cast<uintptr_t>(n.x) % 16 == 0, "x must be 16-byte aligned");
  n.x_stride = n.delta_stride = N;
  n.weight = vector(weight, x.scalar_type(), "weight");
  n.su = static_cast<const float*>(vector(su, ScalarType::Float, "su"));
  n.h = r.h;
  n.sum = sum.mutable_data_ptr();
  n.y = y.mutable_data_ptr();
  n.type = dtype_of(x, "x");
  n.n = static_cast<int>(N);
  n.factor = static_cast<int>(factor);
  n.tokens = static_cast<int>(M);
  n.eps = static_cast<float>(eps);
  n.gain = 1.f / std::sqrt(static_cast<float>(N));
  cudaStream_t stream = current_stream(device);
  if (matmul_norm(w, in, sv, r, n, stream)) return {sum, y};
  Tensor delta = rotated_matmul(w, in, sv, std::nullopt, h, factor, 0, "exact");
  n.delta = delta.const_data_ptr();
  check_cuda(aqlm::launch_norm_rotate(n, stream), "norm_rotate");
  return {sum, y};
}

// U_n^T (su * silu(gate) * up) of the halves of sv * U (z Wq^T).
Tensor e8p_matmul_swiglu(const Tensor& z, const Tensor& packed, const std::optional<Tensor>& sv,
                         const Tensor& h, int64_t bits, double residual, int64_t factor,
                         bool up_first, const Tensor& su, const Tensor& next_h,
                         int64_t next_factor) {
  check_input(z, packed, "z");
  CHECK(z.dim() == 2, "z must be [M, K]");
  const int64_t M = z.size(0), n = su.numel(), N = 2 * n;
  const int device = z.get_device_index();
  CHECK(su.is_contiguous() && su.scalar_type() == ScalarType::Float &&
            su.get_device_index() == device,
        "su must be contiguous float32 on z's device");
  DeviceGuard guard(device);
  aqlm::RotatedWeight w = e8p_weight(bits, residual, N, z.size(1));
  set_packed(w, packed);
  const aqlm::Rotation r = rotation_of(h, N, factor, 0, false, device);
  const aqlm::Rotation next = rotation_of(next_h, n, next_factor, 0, true, device);
  aqlm::DType sv_type;
  vector_of(sv, N, "sv", device, &sv_type);
  Tensor in = torch::stable::contiguous(z), y = fresh(z, {M, n});
  if (M == 0) return y;
  cudaStream_t stream = current_stream(device);
  const float* signs = static_cast<const float*>(su.const_data_ptr());
  if (matmul_swiglu(w, in, sv, r, up_first, signs, next, y, stream)) return y;
  CHECK(M < (int64_t(1) << 31), "M=", M, " is too large");
  Tensor both = rotated_matmul(w, in, sv, std::nullopt, h, factor, 0, "exact");
  Tensor gated = fresh(z, {M, n});
  aqlm::SwigluParams s = {};
  const void* low = both.const_data_ptr();
  const void* high = static_cast<const uint8_t*>(low) +
                     n * static_cast<int64_t>(both.element_size());
  s.gate = up_first ? high : low;
  s.up = up_first ? low : high;
  s.y = gated.mutable_data_ptr();
  s.gate_stride = s.up_stride = N;
  s.tokens = static_cast<int>(M);
  s.n = static_cast<int>(n);
  s.type = dtype_of(z, "z");
  check_cuda(aqlm::launch_swiglu(s, stream), "swiglu");
  return hadamard(gated, su, std::nullopt, next_h, next_factor, 0, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aqlm_infer, CUDA, m) {
  m.impl("e8p_matmul_norm", TORCH_BOX(&e8p_matmul_norm));
  m.impl("e8p_matmul_swiglu", TORCH_BOX(&e8p_matmul_swiglu));
}
