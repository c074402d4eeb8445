// What one instruction set provides: a table of function pointers over plain argument structs.
//
// The bodies live in *-inl.h and are compiled once per isa_*.cpp. Drivers (additive_*.cpp) own
// threads, memory and the choice of kernel; kernels own the arithmetic of one thread's share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packed.h"
#include "step.h"
#include "tile.h"

namespace aqlm::cpu {

inline int64_t dtype_size(Dtype dtype) {
  return dtype == Dtype::f32 ? 4 : 2;
}

// One pass of a look-up-table kernel: `tokens` tokens against all rows.
struct LutArgs {
  PackedShape shape;
  const uint8_t* packed;
  int64_t ig;
  int64_t entries;        // 2^nbits, padded to a multiple of 16 in `codebook`
  const float* codebook;  // [B][ig][entries] (by_entry) or [B][entries][ig]
  const float* norms;     // [B] largest length of a centred entry
  const float* x;         // [tokens][K], or [K][lanes] when tokens are the vector dimension
  int tokens;
};

// A look-up-table kernel works on chunks of `chunk` consecutive lookups: `build` fills the tables
// of one chunk, `accumulate` adds chunks [c0, c1) to the accumulators of row units [u0, u1).
struct LutKernel {
  const char* id;
  int chunk;         // lookups a chunk
  int tokens;        // tokens a pass serves
  bool token_lanes;  // tokens are the vector dimension
  bool centred;      // codebooks must be centred (tables are quantized symmetrically)
  int64_t (*chunk_bytes)(const LutArgs& args);
  void (*build)(const LutArgs& args, int64_t chunk, std::byte* tables, float* scratch);
  void (*accumulate)(const LutArgs& args, int64_t u0, int64_t u1, int64_t c0, int64_t c1,
                     const std::byte* tables, float* acc);
  // Sums of one unit and token in row order; `acc` as left by accumulate, at this unit.
  void (*collect)(const LutArgs& args, const float* acc, int token, float* rows);
};

// Direct decode of 16-bit codes: rows of blocks [b0, b1) for up to `tokens` tokens.
struct DirectArgs {
  PackedShape shape;
  const uint8_t* packed;
  int64_t ig;
  const void* codebook;  // entry (k, c) at ((k << nbits) + c) * entry_stride, in `dtype`
  int64_t entry_stride;
  Dtype dtype;
  const float* x;  // [tokens][K], or [K][16]
  int tokens;
};

struct FinishArgs {
  const void* scales;
  const void* bias;  // may be null
  Dtype param_dtype;
  Dtype y_dtype;
  int64_t og, a;  // output n = o * og + a
};

struct DecodeArgs {
  PackedShape shape;
  const uint8_t* packed;
  int64_t ig;
  const void* codebook;  // as DirectArgs (byte codes: float32)
  int64_t entry_stride;
  Dtype dtype;
  const void* scales;  // null: not applied
  Dtype param_dtype;
  void* out;  // row o at out + (o - row0) * out_stride
  int64_t row0;
  int64_t out_stride;
  Dtype out_dtype;
};

// Rows of a dense weight, `row_stride` elements apart.
struct DenseArgs {
  const void* weight;
  int64_t row_stride;
  Dtype dtype;
  int64_t K;
  const float* x;
};

// Direct decode with tokens as the vector dimension: rows a call takes, and weights of a group.
constexpr int kTokenLanes = 16;
constexpr int64_t kDirectTileRows = 24, kDirectTileWeights = 256;

struct KernelTable {
  const char* isa;
  LutKernel lut_exact;     // byte codes, few tokens
  LutKernel lut_fast;      // 8-bit tables where the instruction set has them
  LutKernel lut_float;     // float32 tables, one token
  LutKernel lut_tokens;    // float32 tables, tokens as the vector dimension
  LutKernel lut_many;      // the kernel for passes of more than lut_max_tokens tokens
  int64_t exact_max_tokens, fast_max_tokens;  // up to here passes of lut_exact and lut_fast
  // Up to here a product beats decoding plus a dense GEMM: for one codebook (the cost of a token
  // grows with the codebooks), and for wide codes.
  int64_t matmul_max_m_lut, matmul_max_m_direct;

  int direct_tokens;  // tokens one call of `direct` serves
  void (*direct)(const DirectArgs& args, int64_t b0, int64_t b1, float* acc);  // [block][token][8]

  int64_t direct_max_tokens;  // up to here passes of `direct`, above it
  // x [K][16]; blocks [b0, b1) of at most kDirectTileRows rows; acc [row][16]
  void (*direct_many)(const DirectArgs& args, int64_t b0, int64_t b1, float* acc);

  void (*decode_rows)(const DecodeArgs& args, int64_t row_begin, int64_t row_end);

  // Writes scale * sum + bias of `count` rows from row o, rounded once, to y (one token's row).
  void (*finish)(const FinishArgs& args, const float* sums, int64_t o, int64_t count, void* y);
  void (*to_float)(const void* src, Dtype dtype, int64_t count, float* dst);
  // Largest magnitude as float32 bits: above 0x7f7fffff if anything is not finite.
  uint32_t (*max_abs_bits)(const float* src, int64_t count);
  // [entries][ig] -> [ig][entries]
  void (*transpose)(const float* src, int64_t rows, int64_t cols, int64_t dst_stride, float* dst);

  // Products of rows with x, not yet rounded.
  void (*dense_rows)(const DenseArgs& args, int64_t rows, float* sums);

  StepKernels step;  // between matmuls
  TileKernels tile;  // E8P, scalar grids, rotations
};

}  // namespace aqlm::cpu
