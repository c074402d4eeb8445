// CUDA implementations of the additive ops over the LibTorch stable ABI.
//
// checks -> Params -> launch. Schemas and fakes live in aqlm_infer/ops/. Nothing here
// synchronises; memory comes from the caching allocator, so every op can be captured in a graph.
#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/launch.h"
#include "ops_cuda_additive.h"
#include "ops_cuda_held.h"

namespace {

using namespace aqlm_ops;

// Dense weight alive at a time. Larger slices cost device memory and leave L2, smaller ones leave
// SMs idle at the end of each GEMM: 28672 x 8192, M = 512, GEMMs alone: 404 us in slices of 2048
// rows, 345 of 3072, 333 of 4224, 320 whole (H200, 2026-11-22).
constexpr int64_t kSliceBytes = 72 << 20;
constexpr int64_t kSliceRows = 1056;  // 4 such are two full waves of 128 x 256 tiles at M = 2048

// x as rows of K elements, 16-byte aligned rows, `row_stride` apart. A contiguous x of any
// dimensions is itself: a view costs the host 3 us.
Tensor as_rows(const Tensor& x, int64_t K) {
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  if (x.dim() == 2 && x.stride(1) == 1 && x.stride(0) % 8 == 0 && aligned) return x;
  if (x.dim() != 2 && aligned && K % 8 == 0 && x.is_contiguous()) return x;
  Tensor rows = torch::stable::reshape(torch::stable::contiguous(x), {x.numel() / K, K});
  const bool ok = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 && K % 8 == 0;
  return ok || K % 8 != 0 ? rows : torch::stable::clone(rows);
}

aqlm::DequantParams dequant_params(const aqlm::Additive& a, const Tensor& packed,
                                   const Tensor& codebooks, const Tensor& scales, Tensor& out) {
  aqlm::DequantParams p = {};
  p.a = a;
  p.packed = packed.const_data_ptr<uint8_t>();
  p.codebooks = codebooks.const_data_ptr();
  p.scales = scales.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.row1 = a.out_features();
  p.col1 = a.in_features();
  return p;
}

int64_t slice_length(int64_t total, int64_t other, int64_t element, int64_t multiple) {
  const int64_t fit = kSliceBytes / std::max<int64_t>(1, other * element);
  return std::min(total, std::max(multiple, fit / multiple * multiple));
}

// y = x W^T with W dequantized in row slices.
void matmul_dense(const aqlm::Additive& a, const Tensor& x, const Tensor& packed,
                  const Tensor& codebooks, const Tensor& scales, Tensor& y, cudaStream_t stream) {
  const int64_t N = a.out_features(), K = a.in_features(), element = codebooks.element_size();
  const int64_t rows = slice_length(N, K, element, kSliceRows * a.out_group);
  Tensor w = torch::stable::new_empty(codebooks, {rows, K});
  aqlm::DequantParams p = dequant_params(a, packed, codebooks, scales, w);
  p.out_stride = K;
  p.rounded_sum = true;
  for (int64_t n = 0; n < N; n += rows) {
    const int64_t count = std::min(rows, N - n);
    p.row0 = static_cast<int>(n);
    p.row1 = static_cast<int>(n + count);
    check_cuda(aqlm::launch_dequant(dtype_of(codebooks, "codebooks"), p, stream), "dequantize");
    Tensor block = torch::stable::narrow(w, 0, 0, count);
    Tensor out = torch::stable::narrow(y, 1, n, count);
    mm_out(x, torch::stable::transpose(block, 0, 1), out);
  }
}

Tensor matmul(const Tensor& x, const Tensor& packed, const Tensor& codebooks, const Tensor& scales,
              const std::optional<Tensor>& bias, const Tensor& aux,
              const std::vector<int64_t>& partitions, const std::string& precision_name) {
  CHECK(x.dim() >= 1, "x has no dimensions");
  const int64_t K = x.size(x.dim() - 1);
  const aqlm::Additive a = describe(packed, codebooks, scales, K, partitions);
  const int64_t N = a.out_features(), M = K ? x.numel() / K : 0;
  const aqlm::DType dtype = dtype_of(x, "x");
  CHECK(x.scalar_type() == codebooks.scalar_type(),
        "x and codebooks differ in dtype; cast the layer with .to(x.dtype)");
  CHECK(x.get_device_index() == packed.get_device_index(), "x is on cuda:", x.get_device_index(),
        ", packed on cuda:", packed.get_device_index());
  CHECK(!bias || (bias->numel() == N && bias->scalar_type() == x.scalar_type() &&
                  bias->is_contiguous() && bias->get_device_index() == x.get_device_index()),
        "bias must be ", N, " contiguous values of x's dtype and device");
  const aqlm::Precision precision = precision_of(precision_name);
  DeviceGuard guard(x.get_device_index());
  cudaStream_t stream = current_stream(x.get_device_index());
  aqlm::DeviceInfo device;
  check_cuda(aqlm::device_info(x.get_device_index(), &device), "device_info");

  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(N);
  Tensor y = fresh(x, shape);
  if (M == 0 || N == 0) return y;
  Tensor rows = as_rows(x, K);

  Tensor workspace;
  bool reserved = false;
  for (int64_t m = 0; m < M;) {
    aqlm::MatmulParams p = {};
    p.a = a;
    p.tokens = static_cast<int>(M - m);
    const aqlm::LaunchConfig config = aqlm::choose(a, p.tokens, dtype, precision, device);
    if (config.token_tile == 0) {
      Tensor y2 = torch::stable::reshape(y, {M, N});
      Tensor out = torch::stable::narrow(y2, 0, m, M - m);
      Tensor flat = rows.dim() == 2 ? rows : torch::stable::reshape(rows, {M, K});
      matmul_dense(a, torch::stable::narrow(flat, 0, m, M - m), packed, codebooks, scales, out,
                   stream);
      if (bias)
        check_cuda(aqlm::launch_add_bias(dtype, out.mutable_data_ptr(), bias->const_data_ptr(),
                                         static_cast<int>(M - m), static_cast<int>(N), stream),
                   "add_bias");
      return y;
    }
    p.tokens = std::min(p.tokens, config.token_tile * config.passes);
    aqlm::make_schedule(config, device, &p);
    const aqlm::Workspace w = aqlm::workspace_of(config, p);
    auto padded = [](size_t n) { return static_cast<int64_t>((n + 255) / 256 * 256); };
    const int64_t bytes =
        padded(w.partials) + padded(w.x_fragments) + padded(w.x_scales);
    if (bytes > 0 && (!reserved || workspace.numel() < bytes)) {
      workspace = fresh(packed, {bytes});
      reserved = true;
    }
    if (bytes > 0) {
      uint8_t* at = workspace.mutable_data_ptr<uint8_t>();
      p.partials = reinterpret_cast<float*>(at);
      at += padded(w.partials);
      p.x_fragments = at;
      if (w.x_scales) p.x_scales = reinterpret_cast<float*>(at + padded(w.x_fragments));
    }
    const size_t aux_needed = config.body == aqlm::Body::kSplit ||
                                      config.body == aqlm::Body::kSplitWgmma ||
                                      config.precision == aqlm::Precision::kInt8
                                  ? aqlm::aux_bytes(a, config.precision)
                                  : 0;
    CHECK(static_cast<size_t>(aux.numel()) >= aux_needed &&
              (aux_needed == 0 || aux.get_device_index() == x.get_device_index()),
          "aux holds ", aux.numel(), " bytes, precision '", precision_name, "' needs ", aux_needed,
          "; call additive_prepare with the same precision");
    p.packed = packed.const_data_ptr<uint8_t>();
    p.codebooks = codebooks.const_data_ptr();
    p.aux = static_cast<const uint8_t*>(aux.const_data_ptr());
    p.scales = scales.const_data_ptr();
    p.bias = bias ? bias->const_data_ptr() : nullptr;
    p.x_stride = row_stride(rows, K);
    p.x = static_cast<const uint8_t*>(rows.const_data_ptr()) +
          m * p.x_stride * static_cast<int64_t>(x.element_size());
    p.y = static_cast<uint8_t*>(y.mutable_data_ptr()) +
          m * N * static_cast<int64_t>(x.element_size());
    check_cuda(aqlm::launch_matmul(config, p, stream), "additive_matmul");
    m += p.tokens;
  }
  return y;
}

struct HeldAdditive : HeldLayer {
  Tensor packed, codebooks, scales, aux;
  std::optional<Tensor> bias;
  std::vector<int64_t> partitions;
  std::string precision;

  Tensor product(const Tensor& x) const override {
    return matmul(x, packed, codebooks, scales, bias, aux, partitions, precision);
  }
  int device() const override { return packed.get_device_index(); }
};

int64_t hold_matmul(const Tensor& packed, const Tensor& codebooks, const Tensor& scales,
                    const std::optional<Tensor>& bias, const Tensor& aux,
                    const std::vector<int64_t>& partitions, const std::string& precision) {
  auto layer = std::make_unique<HeldAdditive>();
  layer->packed = packed;
  layer->codebooks = codebooks;
  layer->scales = scales;
  layer->aux = aux;
  layer->bias = bias;
  layer->partitions = partitions;
  layer->precision = precision;
  return hold(std::move(layer));
}

// dx = dy W, W dequantized in column slices so that nothing is accumulated across slices.
Tensor matmul_dx(const Tensor& dy, const Tensor& packed, const Tensor& codebooks,
                 const Tensor& scales, int64_t in_features,
                 const std::vector<int64_t>& partitions) {
  const aqlm::Additive a = describe(packed, codebooks, scales, in_features, partitions);
  const int64_t N = a.out_features(), K = in_features;
  CHECK(dy.dim() >= 1 && dy.size(dy.dim() - 1) == N, "dy's last dimension is ",
        dy.size(dy.dim() - 1), ", expected N=", N);
  CHECK(dy.scalar_type() == codebooks.scalar_type(), "dy and codebooks differ in dtype");
  CHECK(dy.get_device_index() == packed.get_device_index(), "dy and packed are on two devices");
  DeviceGuard guard(dy.get_device_index());
  cudaStream_t stream = current_stream(dy.get_device_index());
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < dy.dim(); ++i) shape.push_back(dy.size(i));
  shape.push_back(K);
  const int64_t M = N ? dy.numel() / N : 0;
  if (M == 0 || N == 0 || K == 0) return torch::stable::new_zeros(dy, shape);
  Tensor dx = torch::stable::new_empty(dy, {M, K});
  Tensor rows = torch::stable::reshape(torch::stable::contiguous(dy), {M, N});
  const int64_t multiple = int64_t(aqlm::kTileVectors) * a.in_group;
  const int64_t columns = slice_length(K, N, codebooks.element_size(), multiple);
  Tensor w = torch::stable::new_empty(codebooks, {N * columns});
  aqlm::DequantParams p = dequant_params(a, packed, codebooks, scales, w);
  p.rounded_sum = true;
  for (int64_t k = 0; k < K; k += columns) {
    const int64_t count = std::min(columns, K - k);
    p.col0 = static_cast<int>(k);
    p.col1 = static_cast<int>(k + count);
    p.out_stride = count;
    check_cuda(aqlm::launch_dequant(dtype_of(codebooks, "codebooks"), p, stream), "dequantize");
    Tensor block = torch::stable::reshape(torch::stable::narrow(w, 0, 0, N * count), {N, count});
    mm_out(rows, block, torch::stable::narrow(dx, 1, k, count));
  }
  return torch::stable::reshape(dx, shape);
}

Tensor dequantize(const Tensor& packed, const Tensor& codebooks, const Tensor& scales,
                  int64_t in_features, const std::vector<int64_t>& partitions) {
  const aqlm::Additive a = describe(packed, codebooks, scales, in_features, partitions);
  DeviceGuard guard(packed.get_device_index());
  Tensor out = torch::stable::new_empty(codebooks, {a.out_features(), in_features});
  aqlm::DequantParams p = dequant_params(a, packed, codebooks, scales, out);
  p.out_stride = in_features;
  check_cuda(aqlm::launch_dequant(dtype_of(codebooks, "codebooks"), p,
                                  current_stream(packed.get_device_index())),
             "additive_dequantize");
  return out;
}

Tensor pack(const Tensor& codes, int64_t nbits, int64_t out_group, int64_t in_group,
            const std::vector<int64_t>& partitions) {
  CHECK(codes.dim() == 3, "codes must be [O, I, B]; got ", codes.dim(), " dimensions");
  const bool bytes = codes.scalar_type() == ScalarType::Char;
  CHECK(bytes || codes.scalar_type() == ScalarType::Short, "codes must be int8 or int16");
  CHECK(!bytes || nbits <= 8, "int8 codes cannot hold nbits=", nbits);
  const aqlm::Additive a =
      make_additive(codes.size(1), codes.size(2), nbits, out_group, in_group, partitions);
  CHECK(a.out_groups() == codes.size(0), "codes have ", codes.size(0),
        " output groups, partitions ", a.out_groups());
  DeviceGuard guard(codes.get_device_index());
  Tensor from = torch::stable::contiguous(codes);
  Tensor packed = torch::stable::new_empty(codes, {static_cast<int64_t>(a.packed_bytes())},
                                           ScalarType::Byte);
  check_cuda(aqlm::launch_pack(a, from.const_data_ptr(), packed.mutable_data_ptr<uint8_t>(),
                               bytes ? 1 : 2, current_stream(codes.get_device_index())),
             "additive_pack");
  return packed;
}

Tensor unpack(const Tensor& packed, int64_t out_groups, int64_t in_groups, int64_t codebooks,
              int64_t nbits, int64_t out_group, int64_t in_group,
              const std::vector<int64_t>& partitions) {
  const aqlm::Additive a =
      make_additive(in_groups, codebooks, nbits, out_group, in_group, partitions);
  CHECK(a.out_groups() == out_groups, "partitions hold ", a.out_groups(), " output groups, not ",
        out_groups);
  CHECK(static_cast<size_t>(packed.numel()) == a.packed_bytes(), "packed has ", packed.numel(),
        " bytes, expected ", a.packed_bytes());
  DeviceGuard guard(packed.get_device_index());
  const ScalarType type = nbits <= 8 ? ScalarType::Char : ScalarType::Short;
  Tensor codes = torch::stable::new_empty(packed, {out_groups, in_groups, codebooks}, type);
  check_cuda(aqlm::launch_unpack(a, packed.const_data_ptr<uint8_t>(), codes.mutable_data_ptr(),
                                 nbits <= 8 ? 1 : 2, current_stream(packed.get_device_index())),
             "additive_unpack");
  return codes;
}

Tensor prepare(const Tensor& codebooks, const std::string& precision_name,
               const std::vector<int64_t>& partitions) {
  const int64_t parts = static_cast<int64_t>(partitions.size());
  CHECK(codebooks.dim() == 4 && parts > 0 && codebooks.size(0) % parts == 0,
        "codebooks.size(0)=", codebooks.size(0), " is not a multiple of the ", parts,
        " partitions");
  int nbits = 0;
  while ((int64_t(1) << nbits) < codebooks.size(1)) ++nbits;
  const aqlm::Additive a = make_additive(1, codebooks.size(0) / parts, nbits, codebooks.size(2),
                                         codebooks.size(3), partitions);
  const aqlm::Precision precision = precision_of(precision_name);
  const aqlm::DType dtype = dtype_of(codebooks, "codebooks");
  const size_t bytes = dtype == aqlm::DType::kFloat32 ? 0 : aqlm::aux_bytes(a, precision);
  DeviceGuard guard(codebooks.get_device_index());
  Tensor from = torch::stable::contiguous(codebooks);
  Tensor aux =
      torch::stable::new_empty(codebooks, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  if (bytes > 0)
    check_cuda(aqlm::launch_prepare(a, precision, dtype, from.const_data_ptr(),
                                    aux.mutable_data_ptr<uint8_t>(),
                                    current_stream(codebooks.get_device_index())),
               "additive_prepare");
  return aux;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aqlm_infer, CUDA, m) {
  m.impl("additive_pack", TORCH_BOX(&pack));
  m.impl("additive_unpack", TORCH_BOX(&unpack));
  m.impl("additive_prepare", TORCH_BOX(&prepare));
  m.impl("additive_matmul", TORCH_BOX(&matmul));
  m.impl("hold_additive", TORCH_BOX(&hold_matmul));
  m.impl("additive_matmul_dx", TORCH_BOX(&matmul_dx));
  m.impl("additive_dequantize", TORCH_BOX(&dequantize));
}
