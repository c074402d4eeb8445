// What the root files see of attention in a decode step. Strides are in elements, the last dimension
// of everything is contiguous.
#pragma once

#include "launch.h"

namespace aqlm {

// out = softmax(scale q k^T) v of one new token a sequence, whose q and key still want their rotary
// embedding; its key, with it, and value become position `filled` of the cache.
struct StepAttentionParams {
  const void *q, *key, *value;  // [batch, heads * group or heads, head_dim]
  long long q_b, q_h, key_b, key_h, value_b, value_h;
  const void *cos, *sin;        // [length, head_dim] contiguous
  const int64_t* ids;           // [batch], ids_b apart: rotary positions
  const int64_t* filled;        // [1]
  void *keys, *values;          // [batch, heads, length, head_dim]
  long long k_b, k_h, k_l, v_b, v_h, v_l;
  const uint8_t* mask;          // [batch, length], rows mask_b apart: 0 is not seen
  long long ids_b, mask_b;
  void* out;                    // [batch, heads * group * head_dim], or its image
  int image;                    // tokens that the image is wide; 0: rows
  int batch, heads, group, length, head_dim;
  float scale;
  DType type;                   // 16-bit
};

constexpr int kMostGroup = 8;
// head_dim 64 or 128, groups of up to 8, every address and stride (but the mask's) a multiple of 16
// bytes; on devices with clusters.
cudaError_t launch_step_attention(const StepAttentionParams& p, cudaStream_t stream);

}  // namespace aqlm
