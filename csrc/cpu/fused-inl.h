// One token against codes without tiles: decoded vectors are multiplied while in registers.
//
// A code vector holds kCodeBytes of the 256 bytes of a quad, 64 rows x 4 columns; blocks are 32
// columns, 8 quads. x is in two planes of bytes (tile.h).

#if AQLM_LEVEL >= 1

namespace aqlm::cpu {
namespace {

#if AQLM_LEVEL >= 2
typedef __m512i CodeVector;
#define AQLM_V(name) _mm512_##name
inline CodeVector bit_and(CodeVector a, CodeVector b) {
  return _mm512_and_si512(a, b);
}
inline CodeVector bit_xor(CodeVector a, CodeVector b, CodeVector c) {
  return _mm512_ternarylogic_epi32(a, b, c, 0x96);
}
inline CodeVector repeat16(const uint8_t* table) {
  return _mm512_broadcast_i32x4(read<__m128i>(table));
}
#else
typedef __m256i CodeVector;
#define AQLM_V(name) _mm256_##name
inline CodeVector bit_and(CodeVector a, CodeVector b) {
  return _mm256_and_si256(a, b);
}
inline CodeVector bit_xor(CodeVector a, CodeVector b, CodeVector c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
inline CodeVector repeat16(const uint8_t* table) {
  return _mm256_broadcastsi128_si256(read<__m128i>(table));
}
#endif

#define AQLM_ALWAYS __attribute__((always_inline))
constexpr int kCodeBytes = int(sizeof(CodeVector));
constexpr int kCodeParts = int(kQuadBytes) / kCodeBytes;  // code vectors of a block

// Words shifted left, or right where SHIFT is negative.
template <int SHIFT>
inline CodeVector shifted(CodeVector v) {
  if constexpr (SHIFT > 0) return AQLM_V(slli_epi16)(v, SHIFT);
  else if constexpr (SHIFT < 0) return AQLM_V(srli_epi16)(v, -SHIFT);
  else return v;
}

template <int PART, class Body>
AQLM_INLINE void each_part(const Body& body) {
  if constexpr (PART < kCodeParts) {
    body(std::integral_constant<int, PART>());
    each_part<PART + 1>(body);
  }
}

#if AQLM_LEVEL >= 3

AQLM_INLINE void dot_broadcast(__m512i& sum, __m512i weights, const uint8_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sum) : "v"(weights), "m"(*reinterpret_cast<const int32_t*>(x)));
}

// Two sums a plane: one would wait for the instruction before it.
template <int PLANES, class Decode>
void fused_planes(int64_t blocks, const ProductArgs& args, const Decode& decode) {
  each_part<0>([&](auto part) {
    __m512i sums[2][PLANES] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      decode(part, b, [&](int j, CodeVector element) AQLM_ALWAYS {
        const uint8_t* x = args.x + (8 * b + j) * kQuantBytes;
        AQLM_UNROLL
        for (int p = 0; p < PLANES; ++p) dot_broadcast(sums[j % 2][p], element, x + 4 * p);
      });
    }
    typedef Vec<16>::I I;
    I total = bit_cast<I>(sums[0][0]) + bit_cast<I>(sums[1][0]);
    if constexpr (PLANES == 2) {
      total = (total << 8) + bit_cast<I>(sums[0][1]) + bit_cast<I>(sums[1][1]);
    }
    spill(args, 0, part * 16, __builtin_convertvector(total, F<16>));
  });
}

#else

// Sums of 16 bits hold the 8 quads of a block: 15 * 128 * 2 each at most.
template <int PLANES, class Decode>
void fused_planes(int64_t blocks, const ProductArgs& args, const Decode& decode) {
  alignas(64) CodeVector x[kTileQuads * PLANES];
  for (int64_t q = 0; q < 8 * blocks; ++q) {
    for (int p = 0; p < PLANES; ++p)
      x[PLANES * q + p] = AQLM_V(set1_epi32)(read<int32_t>(args.x + q * kQuantBytes + 4 * p));
  }
  const CodeVector steps[2] = {AQLM_V(set1_epi16)(PLANES == 2 ? 256 : 1), AQLM_V(set1_epi16)(1)};
  each_part<0>([&](auto part) {
    CodeVector total = {};
    for (int64_t b = 0; b < blocks; ++b) {
      CodeVector sums[PLANES];
      decode(part, b, [&](int j, CodeVector element) AQLM_ALWAYS {
        AQLM_UNROLL
        for (int p = 0; p < PLANES; ++p) {
          const CodeVector product = AQLM_V(maddubs_epi16)(element, x[PLANES * (8 * b + j) + p]);
          sums[p] = j == 0 ? product : AQLM_V(add_epi16)(sums[p], product);
        }
      });
      AQLM_UNROLL
      for (int p = 0; p < PLANES; ++p)
        total = AQLM_V(add_epi32)(total, AQLM_V(madd_epi16)(sums[p], steps[p]));
    }
    typedef Vec<kLanes>::I I;
    spill(args, 0, part * kLanes, __builtin_convertvector(bit_cast<I>(total), F<kLanes>));
  });
}

#endif

// decode(part, b, body) calls body(j, quad j) for code vector `part` of block b; quads hold at most
// 15.
template <class Decode>
void fused_product(int64_t blocks, const ProductArgs& args, const Decode& decode) {
  if (args.fast) fused_planes<1>(blocks, args, decode);
  else fused_planes<2>(blocks, args, decode);
}

}  // namespace
}  // namespace aqlm::cpu

#endif
