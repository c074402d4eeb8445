// Byte table lookups: Shuffle<PLANES, BITS> holds the tables of one lookup, ShuffleKey the codes
// of one vector of rows.
//
//   VBMI            tables in registers; one vpermb (6 bits), one vpermi2b (7), two and a blend (8)
//   AVX-512, AVX2   pshufb looks up 16 entries by the low four bits; a tree of blends picks among
//                   the 2^(BITS-4) results by the upper bits

namespace aqlm::cpu {
namespace {

#if AQLM_LEVEL >= 3

constexpr int kShuffleBytes = 64;
constexpr int kShuffleVectors = 4;  // vectors of rows that share the tables in registers
constexpr int kShuffleMinBits = 6;

template <int BITS>
struct ShuffleKey {
  __m512i codes;
  __mmask64 upper;

  explicit ShuffleKey(const uint8_t* src) : codes(read<__m512i>(src)), upper(0) {
    if constexpr (BITS == 8) upper = _mm512_movepi8_mask(codes);
  }
};

template <int PLANES, int BITS>
struct Shuffle {
  static constexpr int kParts = 1 << (BITS - 6);
  __m512i part[PLANES][kParts];

  explicit Shuffle(const uint8_t* tables) {
    for (int p = 0; p < PLANES; ++p) {
      for (int s = 0; s < kParts; ++s) part[p][s] = read<__m512i>(tables + 64 * (p * kParts + s));
    }
  }
  __m512i operator()(int p, const ShuffleKey<BITS>& key) const {
    const __m512i(&t)[kParts] = part[p];
    if constexpr (BITS == 6) return _mm512_permutexvar_epi8(key.codes, t[0]);
    if constexpr (BITS == 7) return _mm512_permutex2var_epi8(t[0], key.codes, t[1]);
    if constexpr (BITS == 8) {
      return _mm512_mask_blend_epi8(key.upper, _mm512_permutex2var_epi8(t[0], key.codes, t[1]),
                                    _mm512_permutex2var_epi8(t[2], key.codes, t[3]));
    }
  }
};

#else

#if AQLM_LEVEL == 2
typedef __m512i ShuffleVector;
typedef __mmask64 ShuffleBit;
#else
typedef __m256i ShuffleVector;
typedef __m256i ShuffleBit;
#endif

constexpr int kShuffleBytes = sizeof(ShuffleVector);
constexpr int kShuffleVectors = 1;
constexpr int kShuffleMinBits = 4;

// Sixteen table bytes in every 128-bit lane, looked up by the low nibbles.
inline ShuffleVector shuffle16(const uint8_t* table, ShuffleVector low) {
#if AQLM_LEVEL == 2
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(read<__m128i>(table)), low);
#else
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(read<__m128i>(table)), low);
#endif
}

inline ShuffleVector pick(ShuffleBit bit, ShuffleVector zero, ShuffleVector one) {
#if AQLM_LEVEL == 2
  return _mm512_mask_blend_epi8(bit, zero, one);
#else
  return _mm256_blendv_epi8(zero, one, bit);  // looks at the sign of each byte
#endif
}

template <int BITS>
struct ShuffleKey {
  ShuffleVector low;
  ShuffleBit bit[BITS > 4 ? BITS - 4 : 1];

  explicit ShuffleKey(const uint8_t* src) {
    const auto codes = read<ShuffleVector>(src);
#if AQLM_LEVEL == 2
    low = _mm512_and_si512(codes, _mm512_set1_epi8(15));
    for (int b = 4; b < BITS; ++b) {
      bit[b - 4] = _mm512_test_epi8_mask(codes, _mm512_set1_epi8(char(1 << b)));
    }
#else
    low = _mm256_and_si256(codes, _mm256_set1_epi8(15));
    for (int b = 4; b < BITS; ++b) bit[b - 4] = _mm256_slli_epi16(codes, 7 - b);
#endif
  }
};

template <int BITS, int LEVEL>
inline ShuffleVector shuffle_tree(const uint8_t* table, const ShuffleKey<BITS>& key) {
  if constexpr (LEVEL == 4) {
    return shuffle16(table, key.low);
  } else {
    return pick(key.bit[LEVEL - 5], shuffle_tree<BITS, LEVEL - 1>(table, key),
                shuffle_tree<BITS, LEVEL - 1>(table + (1 << (LEVEL - 1)), key));
  }
}

template <int PLANES, int BITS>
struct Shuffle {
  const uint8_t* tables;

  explicit Shuffle(const uint8_t* src) : tables(src) {}
  ShuffleVector operator()(int p, const ShuffleKey<BITS>& key) const {
    return shuffle_tree<BITS, BITS>(tables + (p << BITS), key);
  }
};

#endif

}  // namespace
}  // namespace aqlm::cpu
