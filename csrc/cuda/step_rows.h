// What the root files see of the kernels between a model's matmuls: norms, SwiGLU, a prompt's
// rotary embedding. Strides are in elements, the last dimension is contiguous.
#pragma once

#include "launch.h"

namespace aqlm {

// sum = x + delta, y = weight * (sum / rms(sum)), rounded as transformers does.
struct NormParams {
  const void* x;          // [tokens, n], or with numbers a table whose rows they name
  const void* delta;      // [tokens, n] or null
  const int64_t* numbers; // [tokens] or null
  const void* weight;     // [n]
  void* sum;              // [tokens, n] contiguous
  void* y;                // [tokens, n] contiguous
  long long x_stride, delta_stride, numbers_stride;
  int tokens, n;
  float eps;
  DType type;
};

constexpr int kMostNorm = 32768;  // values of a row

// y = silu(gate) * up, each rounded.
struct SwigluParams {
  const void *gate, *up;  // [tokens, n]
  void* y;                // [tokens, n] contiguous
  long long gate_stride, up_stride;
  int tokens, n;
  DType type;
};

// out = q with its rotary embedding; key, with it, and value become the cache's first positions.
struct RopeParams {
  const void *q, *key, *value;  // [batch, length, heads of q or heads, head_dim]
  long long q_b, q_t, q_h, key_b, key_t, key_h, value_b, value_t, value_h;
  const void *cos, *sin;        // [positions, head_dim] contiguous
  const int64_t* ids;           // [batch, length], rows ids_b and tokens ids_t apart
  long long ids_b, ids_t;
  void* out;                    // like q, contiguous
  void *keys, *values;          // [batch, heads, positions, head_dim]
  long long k_b, k_h, k_l, v_b, v_h, v_l;
  int batch, length, q_heads, heads, head_dim;
  DType type;
};

cudaError_t launch_norm(const NormParams& p, cudaStream_t stream);
cudaError_t launch_swiglu(const SwigluParams& p, cudaStream_t stream);
cudaError_t launch_rope(const RopeParams& p, cudaStream_t stream);

}  // namespace aqlm
