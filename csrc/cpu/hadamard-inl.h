// cpu.hadamard: Sylvester transforms by butterflies, factor matrices as small products, and the
// vectors before and after them. float32, in a fixed order of operations.

namespace aqlm::cpu {
namespace {

// Butterflies of distance 1, 2, 4 and 8 within a vector of 16.
inline F<16> fwht16(F<16> v) {
  typedef Vec<16>::I I;
  constexpr I kIndex = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const F<16> one = F<16>() + 1.0f;
  AQLM_UNROLL
  for (int h = 1; h < 16; h *= 2) {
    const F<16> sign = (kIndex & h) != 0 ? -one : one;
    v = __builtin_shuffle(v, kIndex ^ h) + v * sign;
  }
  return v;
}

// Two stages at once: distances h and 2h over [0, n).
template <int W>
inline void butterflies4(float* x, int64_t n, int64_t h) {
  for (int64_t i = 0; i < n; i += 4 * h) {
    for (int64_t j = i; j < i + h; j += W) {
      const F<W> a = load<W>(x + j), b = load<W>(x + j + h);
      const F<W> c = load<W>(x + j + 2 * h), d = load<W>(x + j + 3 * h);
      const F<W> ab = a + b, ba = a - b, cd = c + d, dc = c - d;
      store<W>(x + j, F<W>(ab + cd));
      store<W>(x + j + h, F<W>(ba + dc));
      store<W>(x + j + 2 * h, F<W>(ab - cd));
      store<W>(x + j + 3 * h, F<W>(ba - dc));
    }
  }
}

template <int W>
inline void butterflies2(float* x, int64_t n, int64_t h) {
  for (int64_t i = 0; i < n; i += 2 * h) {
    for (int64_t j = i; j < i + h; j += W) {
      const F<W> a = load<W>(x + j), b = load<W>(x + j + h);
      store<W>(x + j, F<W>(a + b));
      store<W>(x + j + h, F<W>(a - b));
    }
  }
}

void fwht(float* x, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r, x += n) {
    if (n < 16) {
      for (int64_t h = 1; h < n; h *= 2) butterflies2<1>(x, n, h);
      continue;
    }
    for (int64_t i = 0; i < n; i += 16) store<16>(x + i, fwht16(load<16>(x + i)));
    int64_t h = 16;
    for (; 4 * h <= n; h *= 4) butterflies4<kLanes>(x, n, h);
    if (2 * h <= n) butterflies2<kLanes>(x, n, h);
  }
}

// A rows of the product, W columns.
template <int A, int W>
inline void mix_rows(const float* h, int64_t F_, int64_t P, const float* x, float* out) {
  F<W> sums[A] = {};
  for (int64_t c = 0; c < F_; ++c) {
    const F<W> value = load<W>(x + c * P);
    AQLM_UNROLL
    for (int a = 0; a < A; ++a) sums[a] += h[a * F_ + c] * value;
  }
  AQLM_UNROLL
  for (int a = 0; a < A; ++a) store<W>(out + a * P, sums[a]);
}

template <int W>
void mix_columns(const float* h, int64_t F_, int64_t P, const float* x, float* out) {
  for (int64_t b = 0; b < P; b += W) {
    int64_t a = 0;
    // Eight independent sums hide the latency of an FMA.
    for (; a + 8 <= F_; a += 8) mix_rows<8, W>(h + a * F_, F_, P, x + b, out + a * P + b);
    for (; a + 4 <= F_; a += 4) mix_rows<4, W>(h + a * F_, F_, P, x + b, out + a * P + b);
    for (; a < F_; ++a) mix_rows<1, W>(h + a * F_, F_, P, x + b, out + a * P + b);
  }
}

void mix(const float* h, int64_t F_, int64_t P, const float* x, float* out) {
  if (P >= kLanes) mix_columns<kLanes>(h, F_, P, x, out);
  else if (P >= 4) mix_columns<4>(h, F_, P, x, out);
  else mix_columns<1>(h, F_, P, x, out);
}

void scale_in(const void* x, Dtype dtype, const float* pre, int64_t count, float* out) {
  to_float(x, dtype, count, out);
  if (pre == nullptr) return;
  for (int64_t i = 0; i < count; ++i) out[i] *= pre[i];
}

template <class Y>
void scale_out_as(const ScaleOutArgs& args, Y* y) {
  const auto run = [&](auto width, int64_t i) {
    constexpr int W = decltype(width)::value;
    F<W> value = load<W>(args.value + i) * args.norm;
    if (args.post != nullptr) value *= load<W>(args.post + i);
    if (args.bias != nullptr) value += load<W>(args.bias + i);
    store<W>(y + i, value);
  };
  int64_t i = 0;
  for (; i + 16 <= args.count; i += 16) run(std::integral_constant<int, 16>(), i);
  for (; i < args.count; ++i) run(std::integral_constant<int, 1>(), i);
}

void scale_out(const ScaleOutArgs& args) {
  with_type(args.dtype,
            [&](auto* type) { scale_out_as(args, static_cast<decltype(type)>(args.y)); });
}

constexpr TileKernels kTileKernels = {
    AQLM_LEVEL >= 3,
    quantize,    product, decode_e8p, decode_residual, decode_bits, kProductE8P,
    kProductBits, add_row, scale_in,  scale_out,       fwht,        mix};

}  // namespace
}  // namespace aqlm::cpu
