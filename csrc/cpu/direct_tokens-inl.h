// cpu.additive.direct-tokens: 9..16-bit codes, tokens as the vector dimension.
//
// A tile of 24 rows x 256 weights is decoded to float32, once for 16 tokens, and multiplied while
// it is in L1: every step loads the 16 tokens of one input and broadcasts one weight a row, with
// the sums of 24 rows (AVX-512; 4 with fewer registers) in registers.
//
//   x     [K][16] float32                   (unused tokens are zero)
//   tile  [24 rows][256 + 16] float32       (26 KB; padded against cache aliasing)
//   acc   [row][16] float32
//
// 1x16g8 4096 x 4096, M=16, one thread (EPYC Zen 5, 2026-11-22, machine shared, minimum): AVX-512
// 4.5 ms against 5.6 in passes of `direct`; AVX2 7.2 against 8.2. The products alone need 2.2 ms
// at two a cycle; each one loads its broadcast weight, and decoding takes most of the rest.

namespace aqlm::cpu {
namespace {

constexpr int64_t kTileStride = kDirectTileWeights + 16;
constexpr int kTileBlocks = int(kDirectTileRows / kWideRows);

// acc[R rows] += tile[R rows][0..count) * x[0..count). Registers, not 16 lanes, are the unit here:
// g++ keeps wider vectors on the stack (AVX2: 47 ms instead of 7).
template <int R>
inline void tile_product(const float* tile, const float* x, int64_t count, float* acc) {
  constexpr int V = kTokenLanes / kLanes;
  F<kLanes> sums[R][V];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) {
    AQLM_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = load<kLanes>(acc + r * kTokenLanes + v * kLanes);
  }
  for (int64_t j = 0; j < count; ++j, x += kTokenLanes) {
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      AQLM_UNROLL
      for (int v = 0; v < V; ++v) {
        sums[r][v] += tile[r * kTileStride + j] * load<kLanes>(x + v * kLanes);
      }
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) {
    AQLM_UNROLL
    for (int v = 0; v < V; ++v) store<kLanes>(acc + r * kTokenLanes + v * kLanes, sums[r][v]);
  }
}

inline void tile_rows(int rows, const float* tile, const float* x, int64_t count, float* acc) {
#if AQLM_LEVEL >= 2
  if (rows == 24) tile_product<24>(tile, x, count, acc);
  else if (rows == 16) tile_product<16>(tile, x, count, acc);
  else tile_product<8>(tile, x, count, acc);
#else
  constexpr int R = AQLM_LEVEL == 1 ? 4 : 2;
  for (int r = 0; r < rows; r += R) {
    tile_product<R>(tile + r * kTileStride, x, count, acc + r * kTokenLanes);
  }
#endif
}

// Blocks [b0, b1), at most 3.
void direct_tokens_of(const DirectArgs& args, int64_t b0, int64_t b1, float* acc) {
  DecodeArgs decode{};
  decode.shape = args.shape;
  decode.ig = args.ig;
  decode.codebook = args.codebook;
  decode.entry_stride = args.entry_stride;
  const int64_t step = kDirectTileWeights / args.ig, books = args.shape.num_codebooks;
  const int rows = int((b1 - b0) * kWideRows);
  alignas(64) float tile[kTileBlocks * kWideRows * kTileStride];
  for (int i = 0; i < rows * kTokenLanes; ++i) acc[i] = 0;
  with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t i = 0; i < args.shape.in_groups; i += step) {
      const int64_t left = args.shape.in_groups - i, groups = left < step ? left : step;
      for (int r = 0; r < rows; ++r) {
        const auto* block = reinterpret_cast<const uint16_t*>(
            args.packed + (b0 + r / kWideRows) * args.shape.wide_block_bytes());
        decode_any<T>(decode, block + i * books * kWideRows + r % kWideRows, kWideRows, groups,
                      1.0f, tile + r * kTileStride);
      }
      tile_rows(rows, tile, args.x + i * args.ig * kTokenLanes, groups * args.ig, acc);
    }
  });
}

}  // namespace
}  // namespace aqlm::cpu
