// cpu.scalar: 2, 3, 4 and 8-bit codes to tiles.
//
// Codes are stored in the tile's own order, several quads in the bits of one byte: a shift and a
// mask give a quad. Byte 4 r + j of 256 bytes belongs to row r and column j of each of its quads.
//
//   chunk of 32 columns (8 quads), 256 bytes a bit
//     8 bits  quad 0 | quad 1 | ... | quad 7
//     4 bits  quads 0, 1 | 2, 3 | 4, 5 | 6, 7      quad i at bits 4 (i % 2)
//     2 bits  quads 0..3 | 4..7                    quad i at bits 2 (i % 4)
//     3 bits  upper bits: quad i at bit i | lower two bits as for 2

namespace aqlm::cpu {
namespace {

constexpr int kWide = AQLM_LEVEL >= 2 ? 64 : AQLM_LEVEL == 1 ? 32 : 16;
typedef uint8_t WideBytes __attribute__((vector_size(kWide)));
typedef uint16_t WideWords __attribute__((vector_size(kWide)));

inline WideBytes bits_of(WideBytes bytes, int shift, int mask) {
  return bit_cast<WideBytes>(WideWords(bit_cast<WideWords>(bytes) >> shift)) & uint8_t(mask);
}

// The 8 / BITS quads in 256 bytes.
template <int BITS>
inline void decode_plane(const uint8_t* codes, uint8_t* tile) {
  for (int64_t b = 0; b < kQuadBytes; b += kWide) {
    const auto bytes = read<WideBytes>(codes + b);
    AQLM_UNROLL
    for (int i = 0; i < 8 / BITS; ++i) {
      write(tile + i * kQuadBytes + b, bits_of(bytes, i * BITS, (1 << BITS) - 1));
    }
  }
}

constexpr int kChunkQuads = 8;

void decode_bits(const uint8_t* codes, int bits, int64_t chunks, uint8_t* tile) {
  for (int64_t c = 0; c < chunks; ++c, tile += kChunkQuads * kQuadBytes) {
    const uint8_t* upper = codes;
    if (bits == 3) codes += kQuadBytes;
    for (int64_t i = 0; i < (bits == 3 ? 2 : bits); ++i, codes += kQuadBytes) {
      if (bits == 8) decode_plane<8>(codes, tile + i * kQuadBytes);
      else if (bits == 4) decode_plane<4>(codes, tile + 2 * i * kQuadBytes);
      else decode_plane<2>(codes, tile + 4 * i * kQuadBytes);
    }
    if (bits != 3) continue;
    for (int64_t b = 0; b < kQuadBytes; b += kWide) {
      const auto bytes = read<WideBytes>(upper + b);
      AQLM_UNROLL
      for (int i = 0; i < kChunkQuads; ++i) {
        uint8_t* out = tile + i * kQuadBytes + b;
        write(out, read<WideBytes>(out) | (bits_of(bytes, i, 1) << 2));
      }
    }
  }
}

#if AQLM_LEVEL >= 1

template <int BITS>
void product_bits_of(const uint8_t* codes, int64_t chunks, const ProductArgs& args) {
  constexpr int kField = BITS == 3 ? 2 : BITS, kFields = 8 / kField;
  fused_product(chunks, args, [&](auto part, int64_t b, const auto& body) AQLM_ALWAYS {
    const uint8_t* at = codes + b * BITS * kQuadBytes + part * kCodeBytes;
    const auto upper = read<WideBytes>(at);  // 3 bits
    if constexpr (BITS == 3) at += kQuadBytes;
    AQLM_UNROLL
    for (int j = 0; j < kChunkQuads; ++j) {
      const auto bytes = read<WideBytes>(at + j / kFields * kQuadBytes);
      WideBytes quad = bits_of(bytes, j % kFields * kField, (1 << kField) - 1);
      if constexpr (BITS == 3) quad |= bits_of(upper, j, 1) << 2;
      body(j, bit_cast<CodeVector>(quad));
    }
  });
}

void product_bits(const uint8_t* codes, int bits, int64_t chunks, const ProductArgs& args) {
  if (bits == 2) product_bits_of<2>(codes, chunks, args);
  else if (bits == 3) product_bits_of<3>(codes, chunks, args);
  else product_bits_of<4>(codes, chunks, args);
}
constexpr auto kProductBits = product_bits;

#else

constexpr void (*kProductBits)(const uint8_t*, int, int64_t, const ProductArgs&) = nullptr;

#endif

}  // namespace
}  // namespace aqlm::cpu
