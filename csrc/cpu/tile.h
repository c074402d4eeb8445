// Tiles: the form every integer weight takes on its way to a product.
//
//   tile  [32 quads][64 rows][4] uint8: 64 rows x 128 columns, 8 KB; a quad is 4 columns
//
// Codes are decoded to unsigned bytes u with w = scale * (u - zero). Tokens are quantized to 16-bit
// integers (8-bit for `fast`), one scale for every piece: columns that lie in one tile and in one
// scale group. Sums within a piece are exact integers, so a product costs no more than the
// quantization of x: 1e-4 relative (2-norm) at worst, where one of 128 columns is all of x.
//
//   x     8 bytes a quad: planes      high bytes of 4 values, low bytes (signed, both)
//                         avx512,avx2 16-bit values 0, 2, 1, 3
//                         portable    16-bit values 0, 1, 2, 3
//
// VBMI has planes always, AVX2 and AVX-512 for one token (fused-inl.h). Quads of E8P are not four
// neighbours but one element of four codes (e8p-inl.h): position 4 j + i of 32 holds column 8 i + j.
#pragma once

#include <cstddef>
#include <cstdint>

namespace aqlm::cpu {

enum class Dtype { f32, bf16, f16 };

constexpr int64_t kTileRows = 64, kTileCols = 128, kQuad = 4;
constexpr int64_t kTileQuads = kTileCols / kQuad, kQuadBytes = kTileRows * kQuad;
constexpr int64_t kTileSize = kTileQuads * kQuadBytes;
constexpr int64_t kQuantBytes = 8;  // of x, a quad

// One piece of x for one token.
struct QuantizeArgs {
  const float* x;      // at the first column of the first quad
  int64_t begin, end;  // the piece's columns; the others of its quads count as zero
  int64_t quads;
  bool fast, planes, e8p;  // e8p: in the order of its quads; all quads whole
  uint8_t* out;  // [quads][8]
  float* scale;  // x = scale * q; NaN if a value is not finite
  float* sum;    // of all q
};

// acc += row_scale * scale * x_scale * (sum of u q - (row_zero + zero) * x_sum)
struct ProductArgs {
  const uint8_t* tile;  // at the piece's first quad
  int64_t quads;
  int tokens;
  bool fast;
  const uint8_t* x;
  int64_t x_stride;  // bytes a token
  const float* x_scale;
  const float* x_sum;
  int64_t piece_stride;    // of x_scale and x_sum, a token
  const float* row_scale;  // [64], or null: 1
  const float* row_zero;   // [64], or null: 0
  float scale, zero;
  float* acc;  // [token][64]
};

// The values of E8P codes as the kernels read them (e8p.cpp makes them from the closed form).
struct E8PTables {
  // Elements e and e + 2 of a half as nibbles: of half h nibbles[e][h]; what signs and shift XOR to
  // those, by the five bits of the sign byte that a half depends on, and by the upper four of the
  // back as if the fifth were 1. Entries repeat up to 64.
  alignas(64) uint8_t nibbles[2][64], front[2][64], back[2][64], back_odd[2][64];
  // Residual code b: 4 + twice elements 2p and 2p + 1, as nibbles of byte p * 256 + b.
  alignas(64) uint8_t residual[1024];
};

// y = value * norm * post + bias, rounded once.
struct ScaleOutArgs {
  const float* value;
  float norm;
  const float* post;  // or null
  const float* bias;  // or null
  int64_t count;
  void* y;
  Dtype dtype;
};

// Half codes of the published indices, and back (e8p.cpp).
struct E8PHalves {
  uint8_t front[256], back[256];  // of 32
  uint8_t index[32][32];          // [front][back], where there is one
  bool odd[32];                   // the sum of a half
};

// A tile's codes in `count` units, `bytes` apart: they share x as it is in registers' form.
struct E8PUnits {
  const uint8_t* codes;
  int64_t count, bytes;
};

struct TileKernels {
  bool planes;  // x of `product`
  void (*quantize)(const QuantizeArgs& args);
  void (*product)(const ProductArgs& args);
  // Codes of `blocks` blocks of 32 columns -> u = 2 w + 7.5, and of the residual -> u = 2 w + 4.
  void (*decode_e8p)(const E8PTables& tables, const uint8_t* codes, int64_t blocks, uint8_t* tile);
  void (*decode_residual)(const E8PTables& tables, const uint8_t* codes, int64_t blocks,
                          uint8_t* tile);
  // `chunks` chunks of 32 columns of 2, 3, 4 or 8 bits -> u = code.
  void (*decode_bits)(const uint8_t* codes, int bits, int64_t chunks, uint8_t* tile);
  // Decoding and product of one token at once, x in planes, at most 4 bits; null: there are none.
  // E8P: acc [unit][64].
  void (*product_e8p)(const E8PTables& tables, const E8PUnits& units, int64_t blocks,
                      const ProductArgs& args);
  void (*product_bits)(const uint8_t* codes, int bits, int64_t chunks, const ProductArgs& args);
  // out[k] += scale * (u - zero) for the columns [begin, end) of one row of the tile.
  void (*add_row)(const uint8_t* tile, int64_t row, int64_t begin, int64_t end, float scale,
                  float zero, bool e8p, float* out);

  void (*scale_in)(const void* x, Dtype dtype, const float* pre, int64_t count, float* out);
  void (*scale_out)(const ScaleOutArgs& args);
  // x <- S_n x for each of `rows` rows, n a power of two.
  void (*fwht)(float* x, int64_t rows, int64_t n);
  // out[a][b] = sum over c of h[a][c] x[c][b]; a, c < F and b < P.
  void (*mix)(const float* h, int64_t F, int64_t P, const float* x, float* out);
};

}  // namespace aqlm::cpu
