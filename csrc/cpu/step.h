// Between the matmuls of a decode step: norms, SwiGLU, rotary embedding with the cache's update and
// attention, the likeliest token. Rounded to the model's dtype where transformers rounds.
//
// A token has a few thousand numbers for each, so one thread does most of them in microseconds;
// prompts and long caches are shared out. Results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "tile.h"

namespace aqlm::cpu {

// Rows [M, N], `stride` elements apart.
struct Rows {
  const void* data;
  int64_t stride;
};

// total = x + delta (without delta: x, not written), y = weight * (total / rms(total)); [M, N].
struct AddNorm {
  Rows x, delta;
  const void* weight;  // [N]
  float eps;
  void *total, *y;
  Dtype dtype;
  int64_t M, N;
  int num_threads;
};
void add_norm(const AddNorm& call);

// y [M, N] = silu(gate) * up
struct Swiglu {
  Rows gate, up;
  void* y;
  Dtype dtype;
  int64_t M, N;
  int num_threads;
};
void swiglu(const Swiglu& call);

// The first of the largest of each row of scores [M, N]; NaN counts as infinity.
void argmax(const Rows& scores, Dtype dtype, int64_t M, int64_t N, int64_t* best);

// One new token for each of `batch` sequences: q [B, H, D], key and value [B, Hkv, D].
struct RopeAttention {
  const void *q, *key, *value;
  int64_t q_stride[2], key_stride[2], value_stride[2];  // of sequences and heads
  const void *cos, *sin;                                // [length, D]
  const int64_t* ids;                                   // [B], rotary positions
  int64_t filled;                                       // where the new key and value go
  void *keys, *values;                                  // [B, Hkv, length, D]
  int64_t keys_stride[3], values_stride[3];
  const bool* mask;  // [B, length]
  int64_t mask_stride;
  float scale;
  void* y;  // [B, H, D]
  Dtype dtype;
  int64_t batch, heads, kv_heads, head_dim, length;
  int num_threads;
};
void rope_attention(const RopeAttention& call);

// ---- what an instruction set provides --------------------------------------------------------

struct NormRow {
  const void *x, *delta, *weight;  // delta: or null
  float eps;
  void *total, *y;
  Dtype dtype;
  int64_t count;
};

// One key/value head of one sequence and the `heads` query heads that read it.
struct AttentionHead {
  const void* q;  // query heads `q_stride` apart
  int64_t q_stride, heads, head_dim;
  const void *key, *value;  // of the new token
  const void *cos, *sin;    // of its position, [head_dim]
  void *keys, *values;      // positions `..._stride` apart
  int64_t keys_stride, values_stride, filled;
  const bool* mask;
  float scale;
  void* y;  // [heads][head_dim]
  Dtype dtype;
  float* scratch;  // heads * (2 head_dim + filled + 1)
};

struct StepKernels {
  void (*norm)(const NormRow& row);
  void (*swiglu)(const void* gate, const void* up, Dtype dtype, int64_t count, void* y);
  void (*attend)(const AttentionHead& head);
  int64_t (*argmax)(const void* scores, Dtype dtype, int64_t count);
};

}  // namespace aqlm::cpu
