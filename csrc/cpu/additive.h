// The additive-codebook operations of this folder, on raw buffers. Every entry point checks its
// arguments (std::invalid_argument) before it starts threads, and is exact under threads: rows
// are shared out, the order of operations within a row never depends on num_threads.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "packed.h"

namespace aqlm::cpu {

enum class Precision { exact, fast };

struct Scheme {
  int64_t N, K;
  int num_codebooks, nbits;
  int64_t in_group_size, out_group_size;

  PackedShape packed() const {
    return {N / out_group_size, K / in_group_size, num_codebooks, nbits};
  }
};

struct MatmulCall {
  Scheme scheme;
  const void* x;
  int64_t x_row_stride;
  Dtype x_dtype;  // of x and y
  const uint8_t* packed;
  const void* codebooks;
  const void* scales;
  const void* bias;  // may be null
  Dtype param_dtype;
  const uint8_t* prepared;  // of additive_prepare, or null
  void* y;
  int64_t y_row_stride;
  int64_t M;
  Precision precision;
  int num_threads;
};

struct DequantizeCall {
  Scheme scheme;
  const uint8_t* packed;
  const void* codebooks;
  const void* scales;
  Dtype param_dtype;
  void* out;
  int64_t out_row_stride;
  Dtype out_dtype;
  int64_t out_group_begin, out_group_end;
  bool apply_scales;
  int num_threads;
};

void check_scheme(const Scheme& scheme);

void additive_pack(const PackedShape& shape, const void* codes, int code_bytes, uint8_t* packed,
                   int num_threads);
void additive_unpack(const PackedShape& shape, const uint8_t* packed, void* codes, int code_bytes,
                     int num_threads);
// Forms of the codebooks that additive_matmul would otherwise compute in every call (forms.h):
// their size (0: nothing to prepare), and filling them in.
int64_t additive_prepared_bytes(const Scheme& scheme, Dtype dtype);
void additive_prepare(const Scheme& scheme, const void* codebooks, Dtype dtype, uint8_t* prepared);

void additive_matmul(const MatmulCall& call);
void additive_dequantize(const DequantizeCall& call);

// Largest M for which additive_matmul beats decoding row slices and a dense GEMM in x's dtype.
int64_t matmul_max_m(const Scheme& scheme, Dtype x_dtype);

}  // namespace aqlm::cpu
