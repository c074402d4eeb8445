// What the root files see of SwiGLU between two rotated layers.
#pragma once

#include "rotated.h"

namespace aqlm {

// y = gain * U_n^T (su * silu(gate) * up), where gate and up are the halves of a product of 2 n
// outputs, gain_2n * sv * U_2n z. Both rotations have one factor. The product is rounded to `type`
// as a matmul rounds it, silu(gate) and its product with up as those operators are.
struct MixSwigluParams {
  RotateParams product;  // partials, s, r of 2 n, local_bits, tokens, gain; post: float32 [2 n]
  const float* su;       // [n]
  const int8_t* h;       // [F, F] of the rotation of n
  float* columns;        // workspace [tokens, n] of launch_mix_swiglu
  void* y;               // [tokens, n] contiguous
  DType type;            // 16-bit
  float gain;            // of the rotation of n
  bool up_first;         // up is the first half
};

// Whether a matmul whose rows were transformed over `local_bits` is finished so.
bool takes_mix_swiglu(const Rotation& r, int local_bits);

cudaError_t launch_mix_swiglu(const MixSwigluParams& p, cudaStream_t stream);

// In one launch; where clusters are, from so many tokens on. One token, E8P of 14336 x 4096, H200: 3.7
// us instead of 3.6 + 1.0, but its blocks leave no room for those of the next matmul, which takes
// 8.5 instead of 7.2. 16 tokens: 5.1 instead of 6.7 + 1.7.
constexpr int kSwigluClusterTokens = 5;
cudaError_t launch_mix_swiglu_clusters(const MixSwigluParams& p, cudaStream_t stream);

}  // namespace aqlm
