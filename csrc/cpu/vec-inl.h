// Vectors of W lanes, loads and stores of the three float types: one definition for every ISA.
//
// GCC vector extensions carry the arithmetic (the compiler splits what the target lacks); only
// the float16 conversions and a few shuffles use intrinsics. Included after the target pragma.
#pragma GCC diagnostic ignored "-Wpsabi"

// Loops over arrays of accumulators must be unrolled before GCC decides what lives in registers:
// without this the byte kernels kept their sums on the stack and ran at half speed.
#define AQLM_UNROLL _Pragma("GCC unroll 16")
#define AQLM_INLINE inline __attribute__((always_inline))

namespace aqlm::cpu {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

template <int W>
struct Vec {
  typedef float F __attribute__((vector_size(4 * W)));
  typedef uint32_t U __attribute__((vector_size(4 * W)));
  typedef int32_t I __attribute__((vector_size(4 * W)));
  typedef uint16_t H __attribute__((vector_size(2 * W)));
};
template <>
struct Vec<1> {
  typedef float F;
  typedef uint32_t U;
  typedef int32_t I;
  typedef uint16_t H;
};

template <int W>
using F = typename Vec<W>::F;

// Lanes of the widest float register (portable: what SSE2 and NEON have).
#if AQLM_LEVEL >= 2
constexpr int kLanes = 16;
#elif AQLM_LEVEL >= 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
inline V read(const void* src) {
  V value;
  __builtin_memcpy(&value, src, sizeof value);
  return value;
}

template <class V>
inline void write(void* dst, const V& value) {
  __builtin_memcpy(dst, &value, sizeof value);
}

template <int W, class To, class From>
inline To widen(const From& from) {
  if constexpr (W == 1) return static_cast<To>(from);
  else return __builtin_convertvector(from, To);
}

template <int W>
inline F<W> select(typename Vec<W>::I mask, F<W> yes, F<W> no) {
  return mask ? yes : no;
}

// ---- float16 and bfloat16 to float32 ------------------------------------------------------

template <int W>
inline F<W> half_to_float(typename Vec<W>::H bits) {
#if AQLM_LEVEL >= 1
  if constexpr (W == 4)
    return bit_cast<F<4>>(_mm_cvtph_ps(_mm_cvtsi64_si128(bit_cast<int64_t>(bits))));
  if constexpr (W == 8) return bit_cast<F<8>>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#endif
#if AQLM_LEVEL >= 2
  if constexpr (W == 16) return bit_cast<F<16>>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
#endif
  // Exponent and mantissa move into place and a multiply by 2^112 corrects the bias, which also
  // normalises denormals; infinities and NaN get the largest exponent.
  typedef typename Vec<W>::U U;
  const U wide = widen<W, U>(bits);
  const F<W> scaled = bit_cast<F<W>>(U((wide & 0x7fffu) << 13)) * 0x1p112f;
  const U special = U((wide & 0x7c00u) == 0x7c00u ? U() + 0x7f800000u : U());
  return bit_cast<F<W>>(U(bit_cast<U>(scaled) | special | ((wide & 0x8000u) << 16)));
}

template <>
inline F<1> half_to_float<1>(uint16_t bits) {
  const float scaled = bit_cast<float>(uint32_t(bits & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | special | (uint32_t(bits & 0x8000u) << 16));
}

template <int W>
inline F<W> load(const float* src) {
  return read<F<W>>(src);
}

template <int W>
inline F<W> load(const BFloat* src) {
  typedef typename Vec<W>::U U;
  return bit_cast<F<W>>(U(widen<W, U>(read<typename Vec<W>::H>(src)) << 16));
}

template <int W>
inline F<W> load(const Half* src) {
  return half_to_float<W>(read<typename Vec<W>::H>(src));
}

// Eight values from each address: 16-bit types join as integers, before the conversion.
inline F<16> load_pair(const float* a, const float* b) {
  return __builtin_shufflevector(load<8>(a), load<8>(b), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
                                 13, 14, 15);
}

inline Vec<16>::H join_bits(const void* a, const void* b) {
  typedef Vec<8>::H H;
  return __builtin_shufflevector(read<H>(a), read<H>(b), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
                                 13, 14, 15);
}

inline F<16> load_pair(const BFloat* a, const BFloat* b) {
  typedef Vec<16>::U U;
  return bit_cast<F<16>>(U(widen<16, U>(join_bits(a, b)) << 16));
}

inline F<16> load_pair(const Half* a, const Half* b) {
  return half_to_float<16>(join_bits(a, b));
}

// ---- float32 to bfloat16 and float16, nearest even -----------------------------------------

template <int W>
inline void store(float* dst, F<W> value) {
  write(dst, value);
}

template <int W>
inline void store(BFloat* dst, F<W> value) {
  typedef typename Vec<W>::U U;
  const U bits = bit_cast<U>(value);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U quiet = (bits >> 16) | 0x40u;
  const U result = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  write(dst, widen<W, typename Vec<W>::H>(result));
}

template <int W>
inline void store(Half* dst, F<W> value) {
#if AQLM_LEVEL >= 1
  if constexpr (W == 8) {
    write(dst, _mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
    return;
  }
  if constexpr (W == 4) {
    const __m128i half = _mm_cvtps_ph(bit_cast<__m128>(value), _MM_FROUND_TO_NEAREST_INT);
    write(dst, int64_t(_mm_cvtsi128_si64(half)));
    return;
  }
#endif
#if AQLM_LEVEL >= 2
  if constexpr (W == 16) {
    write(dst, _mm512_cvtps_ph(bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#endif
  // Three ranges of the magnitude: below 2^-14 adding 0.5 rounds at the denormal's last bit;
  // up to 65520 the exponent is rebiased and rounded as an integer; above, infinity or NaN.
  typedef typename Vec<W>::U U;
  const U bits = bit_cast<U>(value);
  const U magnitude = bits & 0x7fffffffu;
  const U small = bit_cast<U>(F<W>(bit_cast<F<W>>(magnitude) + 0.5f)) - 0x3f000000u;
  const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  U result = magnitude < 0x38800000u ? small : normal;
  const U over = magnitude > 0x7f800000u ? U() + 0x7e00u : U() + 0x7c00u;
  result = magnitude >= 0x47800000u ? over : result;
  write(dst, widen<W, typename Vec<W>::H>(U(result | ((bits >> 16) & 0x8000u))));
}

// ---- type dispatch -------------------------------------------------------------------------

template <class Body>
inline void with_type(Dtype dtype, const Body& body) {
  if (dtype == Dtype::f32) body(static_cast<float*>(nullptr));
  else if (dtype == Dtype::bf16) body(static_cast<BFloat*>(nullptr));
  else body(static_cast<Half*>(nullptr));
}

template <int W>
inline float sum_lanes(F<W> value) {
  if constexpr (W == 1) {
    return value;
  } else {
    typedef F<W / 2> Part;
    Part part[2];
    __builtin_memcpy(part, &value, sizeof value);
    return sum_lanes<W / 2>(part[0] + part[1]);
  }
}

}  // namespace
}  // namespace aqlm::cpu
