// Additive matmuls of few tokens joined with what follows them in a decode step.
//
// checks -> params -> launch, as in ops_cuda.cpp. Schemas, fakes and the operators apart:
// aqlm_infer/generation/additive_ops.py.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/sum_joined.h"
#include "ops_cuda_additive.h"

namespace {

using namespace aqlm_ops;

// An image's code: its tokens, and whether it is of int8. Shapes [K / 32, 4, tokens, 8] of 16 bits;
// [K / 32 + 1, 2, tokens, 2, 16] of uint8, with the tokens' float scales in the last step.
constexpr int kInt8Image = 1 << 16;

// A matmul that is scheduled.
struct Product {
  aqlm::LaunchConfig config;
  aqlm::MatmulParams p;
  bool joins;  // the kernels of sum_joined.h add its sums
  int image;   // code of the image that it takes for x; 0: rows only
};

Product schedule(const Tensor& packed, const Tensor& codebooks, const Tensor& scales, int64_t K,
                 const std::vector<int64_t>& partitions, const std::string& precision,
                 int64_t tokens) {
  Product q = {};
  q.p.a = describe(packed, codebooks, scales, K, partitions);
  CHECK(tokens > 0 && tokens < 65536, "tokens=", tokens, " is outside 1..65535");
  q.p.tokens = static_cast<int>(tokens);
  aqlm::DeviceInfo device;
  check_cuda(aqlm::device_info(packed.get_device_index(), &device), "device_info");
  q.config = aqlm::choose(q.p.a, q.p.tokens, dtype_of(codebooks, "codebooks"),
                          precision_of(precision), device, true);
  if (q.config.token_tile == 0 || q.p.tokens > q.config.token_tile) return q;
  aqlm::make_schedule(q.config, device, &q.p);
  q.joins = aqlm::takes_sums(q.config, q.p, device);
  q.image = aqlm::image_tokens(q.config, q.p);
  if (q.image && q.config.precision == aqlm::Precision::kInt8) q.image |= kInt8Image;
  return q;
}

// Contiguous values of the dtype and device of `like` at a 16-byte address.
const void* values_of(const Tensor& t, int64_t count, const Tensor& like, const char* name) {
  CHECK(t.numel() == count && t.is_contiguous() && t.scalar_type() == like.scalar_type() &&
            t.get_device_index() == like.get_device_index() &&
            reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0,
        name, " must be ", count, " contiguous values of the weights' dtype and device, 16-byte"
        " aligned; got ", t.numel());
  return t.const_data_ptr();
}

// In-features of z: rows [M, K] or an image.
int64_t width_of(const Tensor& z) {
  CHECK(z.dim() == 2 || z.dim() == 4 || z.dim() == 5, "z must be [M, K] or an image; it has ",
        z.dim(), " dimensions");
  return z.dim() == 2 ? z.size(1) : (z.size(0) - (z.dim() == 5)) * 32;
}
float* scales_of(const Tensor& image) {
  uint8_t* const at = static_cast<uint8_t*>(const_cast<void*>(image.const_data_ptr()));
  return reinterpret_cast<float*>(at + (image.size(0) - 1) * image.size(2) * 64);
}

// Launches the matmul up to its partial sums. The workspace must live until what reads them is
// launched.
[[nodiscard]] Tensor launch(Product& q, const Tensor& z, const Tensor& packed,
                            const Tensor& codebooks, const Tensor& scales, const Tensor& aux,
                            cudaStream_t stream) {
  aqlm::MatmulParams& p = q.p;
  const bool image = z.dim() != 2, int8 = z.dim() == 5;
  CHECK(z.scalar_type() == (int8 ? ScalarType::Byte : codebooks.scalar_type()) &&
            z.get_device_index() == packed.get_device_index(),
        "z must have the codebooks' dtype (an int8 image: uint8) and device");
  CHECK(q.joins, "the matmul of ", p.tokens, " tokens is not joined: see additive_joins");
  const int64_t K = p.a.in_features();
  if (image) {
    const int64_t code = z.size(2) | (int8 ? kInt8Image : 0);
    CHECK(code == q.image, "z is an image with code ", code, ", the matmul takes one of ", q.image,
          " (0: none)");
    const int64_t count = int8 ? (K + 32) * 2 * z.size(2) : K * z.size(2);
    p.x_fragments = static_cast<uint8_t*>(const_cast<void*>(values_of(z, count, z, "z")));
  } else {
    CHECK(z.size(0) == p.tokens, "z has ", z.size(0), " rows for ", p.tokens, " tokens");
    p.x = values_of(z, p.tokens * K, z, "z");
    p.x_stride = K;
  }
  const aqlm::Workspace w = aqlm::workspace_of(q.config, p);
  auto padded = [](size_t n) { return static_cast<int64_t>((n + 255) / 256 * 256); };
  Tensor workspace =
      fresh(packed, {padded(w.partials) + padded(w.x_fragments) + padded(w.x_scales)});
  uint8_t* at = workspace.mutable_data_ptr<uint8_t>();
  p.partials = reinterpret_cast<float*>(at);
  at += padded(w.partials);
  if (!image) p.x_fragments = at;
  if (w.x_scales)
    p.x_scales = int8 ? scales_of(z) : reinterpret_cast<float*>(at + padded(w.x_fragments));
  const bool split = q.config.body == aqlm::Body::kSplit ||
                     q.config.body == aqlm::Body::kSplitWgmma;
  const bool prepared = split || q.config.precision == aqlm::Precision::kInt8;
  const size_t needed = prepared ? aqlm::aux_bytes(p.a, q.config.precision) : 0;
  CHECK(static_cast<size_t>(aux.numel()) >= needed &&
            (needed == 0 || aux.get_device_index() == z.get_device_index()),
        "aux holds ", aux.numel(), " bytes, needed are ", needed,
        "; call additive_prepare with the same precision");
  p.packed = packed.const_data_ptr<uint8_t>();
  p.codebooks = codebooks.const_data_ptr();
  p.aux = static_cast<const uint8_t*>(aux.const_data_ptr());
  p.scales = values_of(scales, p.a.out_groups(), codebooks, "scales");
  check_cuda(aqlm::launch_partials(q.config, p, stream), "additive_matmul");
  return workspace;
}

// What the next matmul reads: rows [M, n], or an image.
Tensor target(const Tensor& codebooks, int64_t tokens, int64_t n, int64_t code,
              aqlm::SumTarget* to) {
  const int64_t image = code & ~kInt8Image;
  CHECK(code == 0 || (image >= tokens && image % 8 == 0 && n % 32 == 0), "image=", code,
        " is no image of ", tokens, " tokens of ", n);
  const bool int8 = code & kInt8Image;
  Tensor y = int8    ? fresh(codebooks, {n / 32 + 1, 2, image, 2, 16}, ScalarType::Byte)
             : image ? fresh(codebooks, {n / 32, 4, image, 8})
                     : fresh(codebooks, {tokens, n});
  to->y = y.mutable_data_ptr();
  to->image = static_cast<int>(image);
  to->scales = int8 ? scales_of(y) : nullptr;
  return y;
}

// -1: not joined with `then`; else the code of the image that it takes for x, 0 where none.
int64_t joins(const Tensor& packed, const Tensor& codebooks, const Tensor& scales, int64_t K,
              const std::vector<int64_t>& partitions, const std::string& precision, int64_t tokens,
              const std::string& then) {
  if (codebooks.scalar_type() == ScalarType::Float || K % 8 != 0) return -1;
  const Product q = schedule(packed, codebooks, scales, K, partitions, precision, tokens);
  CHECK(then == "norm" || then == "swiglu" || then == "rows", "then='", then,
        "' is none of norm, swiglu, rows");
  const bool int8 = q.image & kInt8Image;
  const bool shape =
      then == "norm"     ? q.joins && aqlm::takes_sum_norm(q.p)
      : then == "swiglu" ? q.joins && aqlm::takes_sum_swiglu(q.p) &&
                               (!int8 || aqlm::takes_int8_image(q.p))
                         : q.joins;
  return shape ? q.image : -1;
}

std::tuple<Tensor, Tensor> matmul_norm(
    const Tensor& z, const Tensor& packed, const Tensor& codebooks, const Tensor& scales,
    const Tensor& aux, const std::vector<int64_t>& partitions, const std::string& precision,
    const Tensor& x, const Tensor& weight, double eps, int64_t image) {
  DeviceGuard guard(z.get_device_index());
  CHECK(x.dim() == 2, "x must be [M, N]");
  const int64_t M = x.size(0), N = x.size(1);
  Product q =
      schedule(packed, codebooks, scales, width_of(z), partitions, precision, M);
  CHECK(q.joins && aqlm::takes_sum_norm(q.p), "N=", N, " at ", M,
        " tokens is not joined with a norm: see additive_joins");
  CHECK(N == q.p.a.out_features(), "x has ", N, " columns, the matmul ", q.p.a.out_features());
  aqlm::SumNormParams n = {};
  n.x = values_of(x, M * N, codebooks, "x");
  n.weight = values_of(weight, N, codebooks, "weight");
  n.eps = static_cast<float>(eps);
  Tensor sum = fresh(x, {M, N});
  n.sum = sum.mutable_data_ptr();
  Tensor y = target(codebooks, M, N, image, &n.to);
  cudaStream_t stream = current_stream(z.get_device_index());
  const Tensor workspace = launch(q, z, packed, codebooks, scales, aux, stream);
  n.product = q.p;
  check_cuda(aqlm::launch_sum_norm(q.config.dtype, n, stream), "sum_norm");
  return {sum, y};
}

Tensor matmul_swiglu(const Tensor& z, const Tensor& packed, const Tensor& codebooks,
                     const Tensor& scales, const Tensor& aux,
                     const std::vector<int64_t>& partitions, const std::string& precision,
                     int64_t tokens, bool up_first, int64_t image) {
  DeviceGuard guard(z.get_device_index());
  Product q = schedule(packed, codebooks, scales, width_of(z), partitions, precision, tokens);
  CHECK(q.joins && aqlm::takes_sum_swiglu(q.p), tokens,
        " tokens are not joined with SwiGLU: see additive_joins");
  aqlm::SumSwigluParams s = {};
  s.up_first = up_first;
  CHECK(!(image & kInt8Image) || aqlm::takes_int8_image(q.p), "no int8 image of so many numbers");
  Tensor y = target(codebooks, tokens, q.p.a.out_features() / 2, image, &s.to);
  cudaStream_t stream = current_stream(z.get_device_index());
  const Tensor workspace = launch(q, z, packed, codebooks, scales, aux, stream);
  s.product = q.p;
  check_cuda(aqlm::launch_sum_swiglu(q.config.dtype, s, stream), "sum_swiglu");
  return y;
}

Tensor matmul_rows(const Tensor& z, const Tensor& packed, const Tensor& codebooks,
                   const Tensor& scales, const std::optional<Tensor>& bias, const Tensor& aux,
                   const std::vector<int64_t>& partitions, const std::string& precision,
                   int64_t tokens) {
  DeviceGuard guard(z.get_device_index());
  Product q = schedule(packed, codebooks, scales, width_of(z), partitions, precision, tokens);
  const int64_t N = q.p.a.out_features();
  if (bias) q.p.bias = values_of(*bias, N, codebooks, "bias");
  Tensor y = fresh(codebooks, {tokens, N});
  q.p.y = y.mutable_data_ptr();
  cudaStream_t stream = current_stream(z.get_device_index());
  const Tensor workspace = launch(q, z, packed, codebooks, scales, aux, stream);
  check_cuda(aqlm::launch_sum_rows(q.config.dtype, q.p, stream), "sum_rows");
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aqlm_infer, CUDA, m) {
  m.impl("additive_joins", TORCH_BOX(&joins));
  m.impl("additive_matmul_norm", TORCH_BOX(&matmul_norm));
  m.impl("additive_matmul_swiglu", TORCH_BOX(&matmul_swiglu));
  m.impl("additive_matmul_rows", TORCH_BOX(&matmul_rows));
}
