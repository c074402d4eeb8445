// CUDA implementations of the rotated and scalar ops over the LibTorch stable ABI.
//
// checks -> params -> launch, as in ops_cuda.cpp. Schemas and fakes: aqlm_infer/ops/{rotated,
// scalar}.py. Nothing here synchronises; memory comes from the caching allocator, so every op can
// be captured in a graph.
#include <algorithm>
#include <utility>

#include "ops_cuda_held.h"
#include "ops_cuda_rotated.h"

namespace {

using namespace aqlm_ops;

constexpr int64_t kSliceBytes = 40 << 20;  // dense weight alive at a time (mostly stays in L2)
constexpr int64_t kSliceRows = 1056;       // rows of one full wave of GEMM tiles on 132 SMs, halved

// Float16 products of unit-variance weights with K activations stay in range: 4w is an integer
// below 16, so that an eighth of it is exact too.
constexpr float kDenseGain = 0.125f;

// x as rows of K with unit stride, `row_stride` apart; copies only what is neither. A contiguous x
// of any dimensions is itself: a view costs the host 3 us.
Tensor rows_of(const Tensor& x, int64_t K) {
  if (x.dim() == 2 ? x.stride(1) == 1 || K == 1 : x.is_contiguous()) return x;
  return torch::stable::reshape(torch::stable::contiguous(x), {K ? x.numel() / K : 0, K});
}

std::vector<int64_t> shape_with(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(last);
  return shape;
}

const void* input_row(const Tensor& rows, int64_t m, int64_t K) {
  return static_cast<const uint8_t*>(rows.const_data_ptr()) +
         m * row_stride(rows, K) * static_cast<int64_t>(rows.element_size());
}
void* at_row(Tensor& rows, int64_t m, int64_t width) {
  return static_cast<uint8_t*>(rows.mutable_data_ptr()) +
         m * width * static_cast<int64_t>(rows.element_size());
}

aqlm::RotatedWeight scalar_weight(int64_t bits, int64_t N, int64_t K) {
  CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits=", bits,
        ": scalar grids have 2, 3, 4 or 8");
  CHECK(K * bits % 8 == 0, "K=", K, ": a row of ", bits, "-bit codes does not fill whole bytes");
  CHECK(N < (1 << 30) && K < (1 << 30), "N=", N, ", K=", K, " is too large");
  aqlm::RotatedWeight w = {};
  w.coding = aqlm::Coding::kScalar;
  w.bits = static_cast<int>(bits);
  w.N = static_cast<int>(N);
  w.K = static_cast<int>(K);
  w.group = std::max(1, w.K);
  return w;
}

void set_scales(aqlm::RotatedWeight& w, const Tensor& scales, const std::optional<Tensor>& zeros,
                int64_t group, int device) {
  CHECK(group >= 1 && w.K % group == 0, "K=", w.K, " is not a multiple of group_size=", group);
  const int64_t count = w.N * (w.K / group);
  CHECK(scales.numel() == count && scales.is_contiguous() && scales.get_device_index() == device,
        "scales must be ", count, " contiguous values on the input's cuda:", device, "; got ",
        scales.numel(), " on cuda:", scales.get_device_index());
  CHECK(!zeros || (zeros->numel() == count && zeros->is_contiguous() &&
                   zeros->scalar_type() == scales.scalar_type() &&
                   zeros->get_device_index() == device),
        "zeros must be like scales");
  w.group = static_cast<int>(group);
  w.scales = scales.const_data_ptr();
  w.zeros = zeros ? zeros->const_data_ptr() : nullptr;
  w.scale_type = dtype_of(scales, "scales");
}

int64_t slice_length(int64_t total, int64_t other, int64_t element, int64_t multiple) {
  const int64_t fit = kSliceBytes / std::max<int64_t>(1, other * element);
  return std::min(total, std::max(multiple, fit / multiple * multiple));
}

// z = x Wq^T with Wq (times `gain`) dequantized in row slices.
void matmul_dense(const aqlm::RotatedWeight& w, const Tensor& x, Tensor& z, float gain,
                  cudaStream_t stream) {
  const int64_t rows = slice_length(w.N, w.K, x.element_size(), kSliceRows);
  Tensor dense = fresh(x, {rows, static_cast<int64_t>(w.K)});
  aqlm::RotatedDequant p = {};
  p.w = w;
  p.out = dense.mutable_data_ptr();
  p.out_type = dtype_of(x, "x");
  p.out_stride = w.K;
  p.gain = gain;
  p.col1 = w.K;
  for (int64_t n = 0; n < w.N; n += rows) {
    const int64_t count = std::min<int64_t>(rows, w.N - n);
    p.row0 = static_cast<int>(n);
    p.row1 = static_cast<int>(n + count);
    check_cuda(aqlm::launch_rotated_dequant(p, stream), "dequantize");
    Tensor block = torch::stable::narrow(dense, 0, 0, count);
    mm_out(x, torch::stable::transpose(block, 0, 1), torch::stable::narrow(z, 1, n, count));
  }
}

}  // namespace

namespace aqlm_ops {

Tensor rotated_matmul(const aqlm::RotatedWeight& w, const Tensor& x,
                      const std::optional<Tensor>& sv, const std::optional<Tensor>& bias,
                      const Tensor& h, int64_t factor, int64_t block,
                      const std::string& precision) {
  CHECK(precision == "exact", "precision='", precision, "': these kernels have 'exact' only");
  const int device = x.get_device_index();
  const int64_t N = w.N, K = w.K, M = K ? x.numel() / K : 0;
  CHECK(!bias || (bias->numel() == N && bias->scalar_type() == x.scalar_type() &&
                  bias->is_contiguous() && bias->get_device_index() == device),
        "bias must be ", N, " contiguous values of x's dtype and device");
  aqlm::RotateParams r = {};
  r.r = rotation_of(h, N, factor, block, false, device);
  r.post = vector_of(sv, N, "sv", device, &r.post_type);
  r.bias = bias ? bias->const_data_ptr() : nullptr;
  r.gain = 1.f;
  r.x_type = r.y_type = dtype_of(x, "x");
  Tensor y = fresh(x, shape_with(x, N));
  if (M == 0 || N == 0) return y;
  cudaStream_t stream = current_stream(device);
  aqlm::DeviceInfo info;
  check_cuda(aqlm::device_info(device, &info), "device_info");
  Tensor rows = rows_of(x, K);

  std::optional<Tensor> workspace;
  for (int64_t m = 0; m < M;) {
    const aqlm::RotatedConfig config =
        aqlm::choose_rotated(w, r.x_type, static_cast<int>(std::min<int64_t>(M - m, 1 << 20)),
                             factor != 0, info);
    if (config.tiles == 0) {
      Tensor flat = rows.dim() == 2 ? rows : torch::stable::reshape(rows, {M, K});
      Tensor rest = torch::stable::narrow(flat, 0, m, M - m);
      if (rest.stride(0) < K || reinterpret_cast<uintptr_t>(rest.const_data_ptr()) % 16 != 0)
        rest = torch::stable::clone(torch::stable::contiguous(rest));
      const bool plain = factor == 0 && !sv && !bias;
      const bool scaled = w.coding == aqlm::Coding::kE8p && !plain;
      Tensor z = plain && m == 0 ? torch::stable::reshape(y, {M, N})
                                 : fresh(x, {M - m, N});
      matmul_dense(w, rest, z, scaled ? kDenseGain : 1.f, stream);
      if (plain && m == 0) return y;
      r.x = z.const_data_ptr();
      r.x_stride = N;
      r.partials = nullptr;
      r.gain = scaled ? 1.f / kDenseGain : 1.f;
      r.tokens = static_cast<int>(M - m);
      r.y = at_row(y, m, N);
      check_cuda(aqlm::launch_rotate(r, stream), "rotate");
      return y;
    }
    aqlm::RotatedMatmul p = {};
    p.w = w;
    p.tokens = static_cast<int>(std::min<int64_t>(M - m, 4 * config.tiles));
    aqlm::schedule_rotated(config, info, &p);
    set_workspace(config, x, workspace, &p);
    p.x = input_row(rows, m, K);
    p.x_stride = row_stride(rows, K);
    p.x_type = r.x_type;
    p.local_bits = r.local_bits = aqlm::local_bits_of(config, p.s, r.r, info);
    r.partials = p.partials;
    r.s = p.s;
    r.tokens = p.tokens;
    r.y = at_row(y, m, N);
    const bool finishes = config.share == aqlm::Share::kOwned && factor == 0;
    if (finishes) p.finish = r;
    check_cuda(aqlm::launch_rotated(config, p, stream), "matmul");
    if (!finishes) check_cuda(aqlm::launch_rotate(r, stream), "rotate");
    m += p.tokens;
  }
  return y;
}

Tensor hadamard(const Tensor& x, const std::optional<Tensor>& pre,
                const std::optional<Tensor>& post, const Tensor& h, int64_t factor, int64_t block,
                bool transpose) {
  CHECK(x.dim() >= 1, "x has no dimensions");
  CHECK(factor >= 1, "factor=", factor, ": a transform needs at least 1");
  const int device = x.get_device_index();
  const int64_t K = x.size(x.dim() - 1), M = K ? x.numel() / K : 0;
  DeviceGuard guard(device);
  aqlm::RotateParams r = {};
  r.r = rotation_of(h, K, factor, block, transpose, device);
  r.pre = vector_of(pre, K, "pre", device, &r.pre_type);
  r.post = vector_of(post, K, "post", device, &r.post_type);
  Tensor y = fresh(x, shape_with(x, K));
  if (M == 0) return y;
  Tensor rows = rows_of(x, K);
  r.x = rows.const_data_ptr();
  r.x_stride = row_stride(rows, K);
  r.x_type = r.y_type = dtype_of(x, "x");
  r.gain = 1.f;
  r.y = y.mutable_data_ptr();
  r.tokens = static_cast<int>(M);
  check_cuda(aqlm::launch_rotate(r, current_stream(device)), "hadamard");
  return y;
}

}  // namespace aqlm_ops

namespace {

// dx = (U_N^T (sv * dy)) Wq, Wq dequantized in column slices so that nothing is accumulated.
Tensor matmul_dx(const aqlm::RotatedWeight& w, const Tensor& dy, const std::optional<Tensor>& sv,
                 const Tensor& h, int64_t factor, int64_t block) {
  const int device = dy.get_device_index();
  const int64_t N = w.N, K = w.K, M = N ? dy.numel() / N : 0;
  aqlm::RotateParams r = {};
  r.r = rotation_of(h, N, factor, block, true, device);
  r.pre = vector_of(sv, N, "sv", device, &r.pre_type);
  if (M == 0 || N == 0 || K == 0) return torch::stable::new_zeros(dy, shape_with(dy, K));
  cudaStream_t stream = current_stream(device);
  Tensor rows = torch::stable::reshape(torch::stable::contiguous(dy), {M, N});
  if (factor != 0 || sv) {
    Tensor back = fresh(dy, {M, N});
    r.x = rows.const_data_ptr();
    r.x_stride = N;
    r.x_type = r.y_type = dtype_of(dy, "dy");
    r.gain = 1.f;
    r.y = back.mutable_data_ptr();
    r.tokens = static_cast<int>(M);
    check_cuda(aqlm::launch_rotate(r, stream), "rotate");
    rows = back;
  }
  Tensor dx = fresh(dy, {M, K});
  const int64_t columns = slice_length(K, N, dy.element_size(), aqlm::kCellColumns);
  Tensor dense = fresh(dy, {N * columns});
  aqlm::RotatedDequant p = {};
  p.w = w;
  p.out = dense.mutable_data_ptr();
  p.out_type = dtype_of(dy, "dy");
  p.gain = 1.f;
  p.row1 = w.N;
  for (int64_t k = 0; k < K; k += columns) {
    const int64_t count = std::min<int64_t>(columns, K - k);
    p.col0 = static_cast<int>(k);
    p.col1 = static_cast<int>(k + count);
    p.out_stride = count;
    check_cuda(aqlm::launch_rotated_dequant(p, stream), "dequantize");
    Tensor flat = torch::stable::narrow(dense, 0, 0, N * count);
    Tensor slice = torch::stable::reshape(flat, {N, count});
    mm_out(rows, slice, torch::stable::narrow(dx, 1, k, count));
  }
  return torch::stable::reshape(dx, shape_with(dy, K));
}

Tensor dequantize(const aqlm::RotatedWeight& w, const Tensor& packed) {
  Tensor out = fresh(
      packed, {static_cast<int64_t>(w.N), static_cast<int64_t>(w.K)}, ScalarType::Float);
  aqlm::RotatedDequant p = {};
  p.w = w;
  p.out = out.mutable_data_ptr();
  p.out_type = aqlm::DType::kFloat32;
  p.out_stride = w.K;
  p.gain = 1.f;
  p.row1 = w.N;
  p.col1 = w.K;
  check_cuda(aqlm::launch_rotated_dequant(p, current_stream(packed.get_device_index())),
             "dequantize");
  return out;
}

Tensor pack(aqlm::RotatedWeight w, const Tensor& codes) {
  Tensor from = torch::stable::contiguous(codes);
  Tensor packed =
      fresh(codes, {static_cast<int64_t>(w.bytes())}, ScalarType::Byte);
  w.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  check_cuda(aqlm::launch_rotated_pack(w, from.const_data_ptr(),
                                       static_cast<uint8_t*>(packed.mutable_data_ptr()),
                                       current_stream(codes.get_device_index())),
             "pack");
  return packed;
}

Tensor e8p_pack(const Tensor& Qidxs, int64_t bits) {
  CHECK(Qidxs.dim() == 2 && Qidxs.scalar_type() == ScalarType::Long,
        "Qidxs must be int64 [N, K * bits / 64]");
  CHECK(bits >= 2 && bits <= 4 && Qidxs.size(1) % bits == 0, "Qidxs with ", Qidxs.size(1),
        " columns do not hold ", bits, "-bit codes");
  DeviceGuard guard(Qidxs.get_device_index());
  return pack(e8p_weight(bits, 0, Qidxs.size(0), Qidxs.size(1) / bits * 64), Qidxs);
}

Tensor e8p_unpack(const Tensor& packed, int64_t bits, int64_t N, int64_t K) {
  DeviceGuard guard(packed.get_device_index());
  aqlm::RotatedWeight w = e8p_weight(bits, 0, N, K);
  set_packed(w, packed);
  Tensor codes = fresh(packed, {N, K / 64 * bits}, ScalarType::Long);
  check_cuda(aqlm::launch_rotated_unpack(w, codes.mutable_data_ptr(),
                                         current_stream(packed.get_device_index())),
             "e8p_unpack");
  return codes;
}

Tensor e8p_matmul(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& sv,
                  const std::optional<Tensor>& bias, const Tensor& h, int64_t bits, double residual,
                  int64_t N, int64_t factor, int64_t block, const std::string& precision) {
  check_input(x, packed, "x");
  DeviceGuard guard(x.get_device_index());
  aqlm::RotatedWeight w = e8p_weight(bits, residual, N, x.size(x.dim() - 1));
  set_packed(w, packed);
  return rotated_matmul(w, x, sv, bias, h, factor, block, precision);
}

Tensor e8p_matmul_dx(const Tensor& dy, const Tensor& packed, const std::optional<Tensor>& sv,
                     const Tensor& h, int64_t bits, double residual, int64_t in_features,
                     int64_t factor, int64_t block) {
  check_input(dy, packed, "dy");
  DeviceGuard guard(dy.get_device_index());
  aqlm::RotatedWeight w = e8p_weight(bits, residual, dy.size(dy.dim() - 1), in_features);
  set_packed(w, packed);
  return matmul_dx(w, dy, sv, h, factor, block);
}

Tensor e8p_dequantize(const Tensor& packed, int64_t bits, double residual, int64_t N, int64_t K) {
  DeviceGuard guard(packed.get_device_index());
  aqlm::RotatedWeight w = e8p_weight(bits, residual, N, K);
  set_packed(w, packed);
  return dequantize(w, packed);
}

Tensor scalar_pack(const Tensor& qweight, int64_t bits, int64_t K) {
  CHECK(qweight.dim() == 2 && qweight.scalar_type() == ScalarType::Byte,
        "qweight must be uint8 [N, K * bits / 8]");
  const aqlm::RotatedWeight w = scalar_weight(bits, qweight.size(0), K);
  CHECK(qweight.size(1) * 8 == K * bits, "qweight has ", qweight.size(1), " bytes a row, K=", K,
        " of ", bits, " bits needs ", K * bits / 8);
  DeviceGuard guard(qweight.get_device_index());
  return pack(w, qweight);
}

Tensor scalar_unpack(const Tensor& packed, int64_t bits, int64_t N, int64_t K) {
  DeviceGuard guard(packed.get_device_index());
  aqlm::RotatedWeight w = scalar_weight(bits, N, K);
  set_packed(w, packed);
  Tensor codes = fresh(packed, {N, K * bits / 8}, ScalarType::Byte);
  check_cuda(aqlm::launch_rotated_unpack(w, codes.mutable_data_ptr(),
                                         current_stream(packed.get_device_index())),
             "scalar_unpack");
  return codes;
}

Tensor scalar_matmul(const Tensor& x, const Tensor& packed, const Tensor& scales,
                     const std::optional<Tensor>& zeros, const std::optional<Tensor>& sv,
                     const std::optional<Tensor>& bias, const Tensor& h, int64_t bits,
                     int64_t group_size, int64_t N, int64_t factor, int64_t block,
                     const std::string& precision) {
  check_input(x, packed, "x");
  DeviceGuard guard(x.get_device_index());
  aqlm::RotatedWeight w = scalar_weight(bits, N, x.size(x.dim() - 1));
  set_packed(w, packed);
  set_scales(w, scales, zeros, group_size, x.get_device_index());
  return rotated_matmul(w, x, sv, bias, h, factor, block, precision);
}

Tensor scalar_matmul_dx(const Tensor& dy, const Tensor& packed, const Tensor& scales,
                        const std::optional<Tensor>& zeros, const std::optional<Tensor>& sv,
                        const Tensor& h, int64_t bits, int64_t group_size, int64_t in_features,
                        int64_t factor, int64_t block) {
  check_input(dy, packed, "dy");
  DeviceGuard guard(dy.get_device_index());
  aqlm::RotatedWeight w = scalar_weight(bits, dy.size(dy.dim() - 1), in_features);
  set_packed(w, packed);
  set_scales(w, scales, zeros, group_size, dy.get_device_index());
  return matmul_dx(w, dy, sv, h, factor, block);
}

Tensor scalar_dequantize(const Tensor& packed, const Tensor& scales,
                         const std::optional<Tensor>& zeros, int64_t bits, int64_t group_size,
                         int64_t K) {
  CHECK(scales.dim() == 2, "scales must be [N, K / group_size]");
  DeviceGuard guard(packed.get_device_index());
  aqlm::RotatedWeight w = scalar_weight(bits, scales.size(0), K);
  set_packed(w, packed);
  set_scales(w, scales, zeros, group_size, packed.get_device_index());
  return dequantize(w, packed);
}

// y = sv * U_N (z w^T) + bias of a held layer, whatever its codes are.
struct HeldProduct : HeldLayer {
  Tensor packed, h;
  std::optional<Tensor> sv, bias;
  int64_t bits, N, factor, block;
  std::string precision;

  int device() const override { return packed.get_device_index(); }
};

struct HeldE8p : HeldProduct {
  double residual;

  Tensor product(const Tensor& z) const override {
    return e8p_matmul(z, packed, sv, bias, h, bits, residual, N, factor, block, precision);
  }
};

struct HeldScalar : HeldProduct {
  Tensor scales;
  std::optional<Tensor> zeros;
  int64_t group_size;

  Tensor product(const Tensor& z) const override {
    return scalar_matmul(z, packed, scales, zeros, sv, bias, h, bits, group_size, N, factor, block,
                         precision);
  }
};

void fill(HeldProduct& layer, const Tensor& packed, const std::optional<Tensor>& sv,
          const std::optional<Tensor>& bias, const Tensor& h, int64_t bits, int64_t N,
          int64_t factor, int64_t block, const std::string& precision) {
  layer.packed = packed;
  layer.h = h;
  layer.sv = sv;
  layer.bias = bias;
  layer.bits = bits;
  layer.N = N;
  layer.factor = factor;
  layer.block = block;
  layer.precision = precision;
}

int64_t hold_e8p(const Tensor& packed, const Tensor& su, const Tensor& h_in,
                 const std::optional<Tensor>& sv, const std::optional<Tensor>& bias,
                 const Tensor& h, int64_t bits, double residual, int64_t N, int64_t in_factor,
                 int64_t factor, int64_t block, const std::string& precision) {
  auto layer = std::make_unique<HeldE8p>();
  layer->input = InputRotation{su, h_in, in_factor, block};
  fill(*layer, packed, sv, bias, h, bits, N, factor, block, precision);
  layer->residual = residual;
  return hold(std::move(layer));
}

// Without su the input is not rotated.
int64_t hold_scalar(const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                    const std::optional<Tensor>& su, const Tensor& h_in,
                    const std::optional<Tensor>& sv, const std::optional<Tensor>& bias,
                    const Tensor& h, int64_t bits, int64_t group_size, int64_t N,
                    int64_t in_factor, int64_t factor, int64_t block,
                    const std::string& precision) {
  auto layer = std::make_unique<HeldScalar>();
  if (su) layer->input = InputRotation{*su, h_in, in_factor, block};
  fill(*layer, packed, sv, bias, h, bits, N, factor, block, precision);
  layer->scales = scales;
  layer->zeros = zeros;
  layer->group_size = group_size;
  return hold(std::move(layer));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aqlm_infer, CUDA, m) {
  m.impl("hadamard", TORCH_BOX(&hadamard));
  m.impl("e8p_pack", TORCH_BOX(&e8p_pack));
  m.impl("e8p_unpack", TORCH_BOX(&e8p_unpack));
  m.impl("e8p_matmul", TORCH_BOX(&e8p_matmul));
  m.impl("hold_e8p", TORCH_BOX(&hold_e8p));
  m.impl("e8p_matmul_dx", TORCH_BOX(&e8p_matmul_dx));
  m.impl("e8p_dequantize", TORCH_BOX(&e8p_dequantize));
  m.impl("scalar_pack", TORCH_BOX(&scalar_pack));
  m.impl("scalar_unpack", TORCH_BOX(&scalar_unpack));
  m.impl("scalar_matmul", TORCH_BOX(&scalar_matmul));
  m.impl("hold_scalar", TORCH_BOX(&hold_scalar));
  m.impl("scalar_matmul_dx", TORCH_BOX(&scalar_matmul_dx));
  m.impl("scalar_dequantize", TORCH_BOX(&scalar_dequantize));
}
