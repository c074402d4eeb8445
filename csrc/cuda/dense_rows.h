// What the root files see of the dense product of one token.
#pragma once

#include "launch.h"

namespace aqlm {

// y = weight x + bias for one token; 16-bit types, k a multiple of 256 up to 12288, n even, x and
// weight 16-byte aligned.
struct DenseRowsParams {
  const void* x;       // [k]
  const void* weight;  // [n, k] contiguous
  const void* bias;    // [n] or null
  void* y;             // [n]
  int n, k;
  DType type;          // of all of them
};
inline bool takes_dense_rows(long long n, long long k) {
  return n > 0 && n % 2 == 0 && n < (1 << 30) && k > 0 && k % 256 == 0 && k <= 12288;
}

cudaError_t launch_dense_rows(const DenseRowsParams& p, cudaStream_t stream);

}  // namespace aqlm
