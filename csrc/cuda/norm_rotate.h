// What the root files see of the norm with a rotation after it.
#pragma once

#include "rotated.h"

namespace aqlm {

// sum = x + delta, y = gain * U^T (su * weight * sum / rms(sum)) with U = H_F (x) S_{n/F}, the
// Sylvester part n / F at least 128 and n a multiple of 4. Every pointer is 16-byte aligned, and so
// are rows of x and delta.
struct NormRotateParams {
  const void* x;            // [tokens, n], rows x_stride elements apart
  const void* delta;        // [tokens, n], rows delta_stride elements apart
  long long x_stride, delta_stride;
  const void* weight;       // [n] of the same type
  const float* su;          // [n]
  const int8_t* h;          // [F, F]; F = 1: not read
  void* sum;                // [tokens, n] contiguous
  void* y;                  // [tokens, n] contiguous
  DType type;               // of x, delta, weight, sum and y
  int n, factor, tokens;
  float eps, gain;
};

cudaError_t launch_norm_rotate(const NormRotateParams& p, cudaStream_t stream);

// U = S_n, n = 1024, 2048 or 4096, 16-bit types. z: the product of a matmul; of one token with
// owned rows, transformed over the low five bits, or as partial sums, over the low nine.
// sum = x + sv * U z, y = U (su * weight * sum / rms(sum)); gain = 1 / sqrt(n) is that of U. Every
// pointer is 16-byte aligned.
struct MixNormParams {
  const float* z;           // [n]; null: partial sums
  const float* sv;          // [n]
  const void* x;            // [tokens, n] contiguous, as sum and y
  const void* weight;       // [n] of the same type
  const float* su;          // [n]
  void* sum;
  void* y;
  DType type;               // of x, weight, sum and y
  int n;
  float eps, gain;
};
inline bool takes_mix_norm(int n) { return n == 1024 || n == 2048 || n == 4096; }

cudaError_t launch_mix_norm(const MixNormParams& p, cudaStream_t stream);

// Of partial sums (partials, s, tokens), row groups being 512 rows; on devices with clusters.
cudaError_t launch_mix_norm(const MixNormParams& p, const RotateParams& sums, cudaStream_t stream);

}  // namespace aqlm
