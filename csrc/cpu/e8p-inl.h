// cpu.e8p: E8P codes to tiles, u = 2 w + 7.5 in 2..13, and one token against codes without tiles.
//
//   codes   unit of 64 rows, block of 32 columns: [256 lower bytes][256 sign bytes][64 upper bytes]
//   column  four groups of 8 columns make a block: quad j holds element j of all four, so that the
//           bytes of a code vector (4 r + group) are those of a quad and nothing is unpacked
//   half    elements 0..3 or 4..7 of a code, one of 32: four bits in the lower byte, the fifth of
//           code byte i at bits 2 (i / 64) and 2 (i / 64) + 1 of upper byte i % 64
//   signs   bit j: element j is negative (0 and 4: also if the sum of its half is odd); their
//           parity is the shift, and flips bit 0 (e8p.cpp)
//
// A nibble is 9 + 2 d for a magnitude 1/2 + d, XOR 14 if negative, XOR 1 for the shift of -1/4. So
// two look-ups give two elements of two halves each: by the half, and by four signs.

namespace aqlm::cpu {
namespace {

constexpr int64_t kE8PBlockBytes = 576, kE8PSigns = 256, kE8PUpper = 512;

#if AQLM_LEVEL >= 1

// The tables in registers.
struct E8PDecoder {
#if AQLM_LEVEL >= 3
  // 64 entries a look-up: tables are repeated, so that bits above an index need no mask.
  CodeVector nibbles[2], signs[2], parity, first;

  explicit E8PDecoder(const E8PTables& tables)
      : parity(read<CodeVector>(tables.parity)), first(read<CodeVector>(tables.first)) {
    for (int e = 0; e < 2; ++e) {
      nibbles[e] = read<CodeVector>(tables.nibbles[e]);
      signs[e] = read<CodeVector>(tables.signs[e]);
    }
  }
  template <int BIT>
  void halves(CodeVector lower, CodeVector upper, CodeVector* out) const {
    const CodeVector index =
        _mm512_ternarylogic_epi32(bytes(15), lower, shifted<4 - BIT>(upper), 0xca);
    for (int e = 0; e < 2; ++e) out[e] = _mm512_permutexvar_epi8(index, nibbles[e]);
  }
  static CodeVector lookup(CodeVector table, CodeVector index) {
    return _mm512_permutexvar_epi8(index, table);
  }
  static CodeVector low_bits(CodeVector v) { return v; }
  static CodeVector high_bits(CodeVector v) { return shifted<-4>(v); }
#else
  CodeVector nibbles[2][2], signs[2], parity, first;

  explicit E8PDecoder(const E8PTables& tables)
      : parity(repeat16(tables.parity)), first(repeat16(tables.first)) {
    for (int e = 0; e < 2; ++e) {
      for (int s = 0; s < 2; ++s) nibbles[e][s] = repeat16(tables.nibbles[e] + 16 * s);
      signs[e] = repeat16(tables.signs[e]);
    }
  }
  template <int BIT>
  void halves(CodeVector lower, CodeVector upper, CodeVector* out) const {
#if AQLM_LEVEL == 2
    const __mmask64 second = _mm512_test_epi8_mask(upper, bytes(1 << BIT));
    for (int e = 0; e < 2; ++e) {
      out[e] = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(nibbles[e][0], lower), second,
                                        nibbles[e][1], lower);
    }
#else
    CodeVector second = shifted<7 - BIT>(upper);
    asm("" : "+x"(second));  // g++ 12 would compare it with zero first
    for (int e = 0; e < 2; ++e) {
      out[e] = _mm256_blendv_epi8(_mm256_shuffle_epi8(nibbles[e][0], lower),
                                  _mm256_shuffle_epi8(nibbles[e][1], lower), second);
    }
#endif
  }
  static CodeVector lookup(CodeVector table, CodeVector index) {
    return AQLM_V(shuffle_epi8)(table, index);
  }
  static CodeVector low_bits(CodeVector v) { return bit_and(v, bytes(15)); }
  static CodeVector high_bits(CodeVector v) { return bit_and(shifted<-4>(v), bytes(15)); }
#endif

  static CodeVector bytes(int value) { return AQLM_V(set1_epi8)(char(value)); }

  // Calls body(j, element j) of code vector PART of a block.
  template <int PART, class Body>
  AQLM_INLINE void decode(const uint8_t* codes, const Body& body) const {
    constexpr int kOffset = PART * kCodeBytes, kBit = kOffset / 64 * 2;
    const auto lower = read<CodeVector>(codes + kOffset);
    const auto stored = read<CodeVector>(codes + kE8PSigns + kOffset);
    const auto upper = read<CodeVector>(codes + kE8PUpper + kOffset % 64);
    const CodeVector front = low_bits(stored), back = high_bits(stored);
    const CodeVector both = bit_xor(front, back, CodeVector{}), shift = lookup(parity, both);
    CodeVector half[4];
    halves<kBit>(low_bits(lower), upper, half);
    halves<kBit + 1>(high_bits(lower), upper, half + 2);
    AQLM_UNROLL
    for (int e = 0; e < 4; ++e) {
      half[e] = bit_xor(half[e], lookup(signs[e % 2], e < 2 ? front : back),
                        e == 0 ? lookup(first, both) : shift);
      body(e / 2 * 4 + e % 2, bit_and(half[e], bytes(15)));
      body(e / 2 * 4 + e % 2 + 2, bit_and(shifted<-4>(half[e]), bytes(15)));
    }
  }
};

void decode_e8p(const E8PTables& tables, const uint8_t* codes, int64_t blocks, uint8_t* tile) {
  const E8PDecoder decoder(tables);
  for (int64_t b = 0; b < blocks; ++b, codes += kE8PBlockBytes, tile += 8 * kQuadBytes) {
    each_part<0>([&](auto part) {
      decoder.template decode<part>(codes, [&](int j, CodeVector element) AQLM_ALWAYS {
        write(tile + j * kQuadBytes + part * kCodeBytes, element);
      });
    });
  }
}

void decode_residual(const E8PTables& tables, const uint8_t* codes, int64_t blocks,
                     uint8_t* tile) {
  const CodeVector low = E8PDecoder::bytes(15);
  const Shuffle<4, 8> pairs(tables.residual);
  for (int64_t b = 0; b < blocks; ++b, codes += kQuadBytes, tile += 8 * kQuadBytes) {
    for (int first = 0; first < kQuadBytes; first += kCodeBytes) {
      const ShuffleKey<8> key(codes + first);
      for (int p = 0; p < 4; ++p) {
        const CodeVector pair = pairs(p, key);
        uint8_t* out = tile + 2 * p * kQuadBytes + first;
        write(out, bit_and(pair, low));
        write(out + kQuadBytes, bit_and(shifted<-4>(pair), low));
      }
    }
  }
}

void product_e8p(const E8PTables& tables, const uint8_t* codes, int64_t blocks,
                 const ProductArgs& args) {
  const E8PDecoder decoder(tables);
  fused_product(blocks, args, [&](auto part, int64_t b, const auto& body) AQLM_ALWAYS {
    decoder.template decode<part>(codes + b * kE8PBlockBytes, body);
  });
}
constexpr auto kProductE8P = product_e8p;

#else

void decode_e8p(const E8PTables& tables, const uint8_t* codes, int64_t blocks, uint8_t* tile) {
  for (int64_t b = 0; b < blocks; ++b, codes += kE8PBlockBytes, tile += 8 * kQuadBytes) {
    for (int64_t i = 0; i < kQuadBytes; ++i) {
      const int lower = codes[i], stored = codes[kE8PSigns + i];
      const int upper = codes[kE8PUpper + i % 64] >> i / 64 * 2;
      const int both = (stored ^ stored >> 4) & 15;
      for (int e = 0; e < 4; ++e) {
        const int index = (e < 2 ? lower : lower >> 4) & 15, bit = e < 2 ? upper : upper >> 1;
        const int signs = (e < 2 ? stored : stored >> 4) & 15;
        const int pair = tables.nibbles[e % 2][index | (bit & 1) << 4] ^
                         tables.signs[e % 2][signs] ^
                         (e == 0 ? tables.first : tables.parity)[both];
        uint8_t* out = tile + (e / 2 * 4 + e % 2) * kQuadBytes + i;
        out[0] = uint8_t(pair & 15);
        out[2 * kQuadBytes] = uint8_t(pair >> 4);
      }
    }
  }
}

void decode_residual(const E8PTables& tables, const uint8_t* codes, int64_t blocks,
                     uint8_t* tile) {
  for (int64_t b = 0; b < blocks; ++b, codes += kQuadBytes, tile += 8 * kQuadBytes) {
    for (int64_t i = 0; i < kQuadBytes; ++i) {
      for (int j = 0; j < 8; ++j) {
        const int pair = tables.residual[j / 2 * 256 + codes[i]];
        tile[j * kQuadBytes + i] = uint8_t(j % 2 ? pair >> 4 : pair & 15);
      }
    }
  }
}

constexpr void (*kProductE8P)(const E8PTables&, const uint8_t*, int64_t,
                              const ProductArgs&) = nullptr;

#endif

}  // namespace
}  // namespace aqlm::cpu
