// What the root files see of the attention of a decode step.
#pragma once

#include "launch.h"

namespace aqlm {

// One new token a sequence. q and key get their rotary embedding (row *ids of cos and sin), key and
// value become position *filled of the cache, and out is the attention of q to positions
// 0 .. *filled where mask is not 0. Strides are in elements; the last dimension is contiguous, rows
// of the cache are head_dim apart, every vector is 16-byte aligned.
struct StepAttentionParams {
  const void* q;               // [batch, heads * group, head_dim]
  const void *key, *value;     // [batch, heads, head_dim]
  long long q_b, q_h, key_b, key_h, value_b, value_h;
  const void *cos, *sin;       // [length, head_dim]
  const int64_t* ids;          // [batch], ids_b apart
  const int64_t* filled;
  void *keys, *values;         // [batch, heads, length, head_dim]
  long long k_b, k_h, v_b, v_h, ids_b, mask_b;
  const uint8_t* mask;         // [batch, length]
  float* partials;             // step_attention_floats(p) of them
  int* counts;                 // [batch * heads] zeros, left as zeros
  void* out;                   // [batch, heads * group, head_dim] contiguous
  float scale;
  int batch, heads, group, head_dim, length;
  int chunk, chunks, stages;   // set by cut_step_attention
  DType type;                  // of everything but scale and partials: float16 or bfloat16
};

constexpr int kMostGroup = 8;  // query heads of a key/value head

// Sets chunk and chunks: how the positions are cut over thread blocks.
void cut_step_attention(const DeviceInfo& device, StepAttentionParams* p);
size_t step_attention_floats(const StepAttentionParams& p);
cudaError_t launch_step_attention(const StepAttentionParams& p, cudaStream_t stream);

}  // namespace aqlm
