// cpu.e8p: E8P codes to tiles, u = 4 w + 12 in 1..23.
//
//   codes  unit of 64 rows, group of 8 columns: [64 index bytes][64 sign bytes]
//   index  which magnitudes: a byte shuffle of 256 entries gives two bits an element
//   signs  bit j: element j is negative; bit 0 holds the shift flag p instead. An even number of
//          signs is negative, counting the one that an odd sum adds to element 7, so element 0's
//          sign is the parity of the other seven and of the magnitudes' low bits.
//
// Element vectors of 64 rows become quads by two rounds of unpacks, which move rows about: stored
// position 16 L + 4 q + i holds row 16 q + 4 L + i (e8p.cpp).

namespace aqlm::cpu {
namespace {

#if AQLM_LEVEL >= 1

#if AQLM_LEVEL >= 2
typedef __m512i CodeVector;
#define AQLM_V(name) _mm512_##name
inline CodeVector nibble_table(const uint8_t* table) {
  return _mm512_broadcast_i32x4(read<__m128i>(table));
}
// `one` where bit J of the byte is set.
template <int J>
inline CodeVector pick_bit(CodeVector bytes, CodeVector zero, CodeVector one) {
  const __mmask64 mask = _mm512_test_epi8_mask(bytes, _mm512_set1_epi8(char(1 << J)));
  return _mm512_mask_blend_epi8(mask, zero, one);
}
#else
typedef __m256i CodeVector;
#define AQLM_V(name) _mm256_##name
inline CodeVector nibble_table(const uint8_t* table) {
  return _mm256_broadcastsi128_si256(read<__m128i>(table));
}
template <int J>
inline CodeVector pick_bit(CodeVector bytes, CodeVector zero, CodeVector one) {
  return _mm256_blendv_epi8(zero, one, _mm256_slli_epi16(bytes, 7 - J));
}
#endif

constexpr int kCodeLanes = kShuffleBytes / 4;  // rows of one quad vector

// Elements 0..3 of kShuffleBytes rows, stored from position `first` -> a quad.
inline void store_quad(CodeVector a, CodeVector b, CodeVector c, CodeVector d, int first,
                       uint8_t* quad) {
  const CodeVector ab = AQLM_V(unpacklo_epi8)(a, b), ab2 = AQLM_V(unpackhi_epi8)(a, b);
  const CodeVector cd = AQLM_V(unpacklo_epi8)(c, d), cd2 = AQLM_V(unpackhi_epi8)(c, d);
  uint8_t* out = quad + first / 4 * kQuad;
  constexpr int kStep = 16 * int(kQuad);
  write(out, AQLM_V(unpacklo_epi16)(ab, cd));
  write(out + kStep, AQLM_V(unpackhi_epi16)(ab, cd));
  write(out + 2 * kStep, AQLM_V(unpacklo_epi16)(ab2, cd2));
  write(out + 3 * kStep, AQLM_V(unpackhi_epi16)(ab2, cd2));
}

template <class V>
inline V set_bytes(int value);
#if AQLM_LEVEL >= 2
template <>
inline __m512i set_bytes<__m512i>(int value) {
  return _mm512_set1_epi8(char(value));
}
inline CodeVector bit_and(CodeVector a, CodeVector b) {
  return _mm512_and_si512(a, b);
}
inline CodeVector bit_xor(CodeVector a, CodeVector b) {
  return _mm512_xor_si512(a, b);
}
#else
template <>
inline __m256i set_bytes<__m256i>(int value) {
  return _mm256_set1_epi8(char(value));
}
inline CodeVector bit_and(CodeVector a, CodeVector b) {
  return _mm256_and_si256(a, b);
}
inline CodeVector bit_xor(CodeVector a, CodeVector b) {
  return _mm256_xor_si256(a, b);
}
#endif

// One element of every row: base + m, or base - m where sign bit J is set.
template <int J>
inline CodeVector signed_sum(CodeVector signs, CodeVector base, CodeVector m) {
  return pick_bit<J>(signs, AQLM_V(add_epi8)(base, m), AQLM_V(sub_epi8)(base, m));
}

void decode_e8p(const E8PTables& tables, const uint8_t* codes, int64_t groups, uint8_t* tile) {
  const auto bytes = [](int value) { return set_bytes<CodeVector>(value); };
  const Shuffle<2, 8> magnitudes(tables.magnitudes);
  const CodeVector lower = nibble_table(tables.lower), upper = nibble_table(tables.upper);
  for (int64_t i = 0; i < groups; ++i, codes += 2 * kTileRows, tile += 2 * kQuadBytes) {
    for (int first = 0; first < kTileRows; first += kShuffleBytes) {
      const ShuffleKey<8> key(codes + first);
      const CodeVector front = magnitudes(0, key), back = magnitudes(1, key);
      const auto stored = read<CodeVector>(codes + kTileRows + first);
      CodeVector parity = bit_xor(bit_and(stored, bytes(0xfe)),
                                  bit_and(bit_xor(front, back), bytes(0x55)));
      parity = bit_xor(parity, AQLM_V(srli_epi16)(parity, 4));
      parity = bit_xor(parity, AQLM_V(srli_epi16)(parity, 2));
      parity = bit_xor(parity, AQLM_V(srli_epi16)(parity, 1));
      const CodeVector base = pick_bit<0>(stored, bytes(13), bytes(11));  // 12 + 1, or 12 - 1
      const auto half = [&](CodeVector packed, CodeVector* m) {
        const CodeVector low = bit_and(packed, bytes(15));
        const CodeVector high = bit_and(AQLM_V(srli_epi16)(packed, 4), bytes(15));
        m[0] = AQLM_V(shuffle_epi8)(lower, low);
        m[1] = AQLM_V(shuffle_epi8)(upper, low);
        m[2] = AQLM_V(shuffle_epi8)(lower, high);
        m[3] = AQLM_V(shuffle_epi8)(upper, high);
      };
      CodeVector m[4];
      half(front, m);
      store_quad(signed_sum<0>(parity, base, m[0]), signed_sum<1>(stored, base, m[1]),
                 signed_sum<2>(stored, base, m[2]), signed_sum<3>(stored, base, m[3]), first, tile);
      half(back, m);
      store_quad(signed_sum<4>(stored, base, m[0]), signed_sum<5>(stored, base, m[1]),
                 signed_sum<6>(stored, base, m[2]), signed_sum<7>(stored, base, m[3]), first,
                 tile + kQuadBytes);
    }
  }
}

void decode_residual(const E8PTables& tables, const uint8_t* codes, int64_t groups,
                     uint8_t* tile) {
  const CodeVector low = set_bytes<CodeVector>(15);
  const Shuffle<4, 8> pairs(tables.residual);
  for (int64_t i = 0; i < groups; ++i, codes += kTileRows, tile += 2 * kQuadBytes) {
    for (int first = 0; first < kTileRows; first += kShuffleBytes) {
      const ShuffleKey<8> key(codes + first);
      CodeVector elements[8];
      AQLM_UNROLL
      for (int p = 0; p < 4; ++p) {
        const CodeVector pair = pairs(p, key);
        elements[2 * p] = bit_and(pair, low);
        elements[2 * p + 1] = bit_and(AQLM_V(srli_epi16)(pair, 4), low);
      }
      store_quad(elements[0], elements[1], elements[2], elements[3], first, tile);
      store_quad(elements[4], elements[5], elements[6], elements[7], first, tile + kQuadBytes);
    }
  }
}

#undef AQLM_V

#else

// Row of a stored position.
inline int64_t row_of(int64_t position) {
  return position % 16 / 4 * 16 + position / 16 * 4 + position % 4;
}

void decode_e8p(const E8PTables& tables, const uint8_t* codes, int64_t groups, uint8_t* tile) {
  for (int64_t i = 0; i < groups; ++i, codes += 2 * kTileRows, tile += 2 * kQuadBytes) {
    for (int64_t s = 0; s < kTileRows; ++s) {
      const uint8_t stored = codes[kTileRows + s];
      const int packed = tables.magnitudes[codes[s]] | tables.magnitudes[256 + codes[s]] << 8;
      const int parity = __builtin_parity((stored & 0xfe) ^ (packed & 0x5555) << 8);
      const int signs = (stored & 0xfe) | parity, base = stored & 1 ? 11 : 13;
      for (int j = 0; j < 8; ++j) {
        const int m = tables.lower[packed >> 2 * j & 3];
        tile[j / 4 * kQuadBytes + row_of(s) * kQuad + j % 4] =
            uint8_t(signs >> j & 1 ? base - m : base + m);
      }
    }
  }
}

void decode_residual(const E8PTables& tables, const uint8_t* codes, int64_t groups,
                     uint8_t* tile) {
  for (int64_t i = 0; i < groups; ++i, codes += kTileRows, tile += 2 * kQuadBytes) {
    for (int64_t s = 0; s < kTileRows; ++s) {
      for (int j = 0; j < 8; ++j) {
        const int pair = tables.residual[j / 2 * 256 + codes[s]];
        tile[j / 4 * kQuadBytes + row_of(s) * kQuad + j % 4] =
            uint8_t(j % 2 ? pair >> 4 : pair & 15);
      }
    }
  }
}

#endif

}  // namespace
}  // namespace aqlm::cpu
