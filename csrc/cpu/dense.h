// cpu.dense: y = W x + bias for a dense weight and one token, bound by reading W.
//
// For the output head of a quantized model: 525 of the 770 MB of a Llama-3.2-1B at 2x8. torch's
// product of one bfloat16 row reads it at 12 GB/s a thread where the memory gives 33 (Zen 4).
#pragma once

#include <cstdint>

#include "tile.h"

namespace aqlm::cpu {

struct DenseMatvec {
  const void* x;       // [K]
  const void* weight;  // [N, K], rows `row_stride` apart
  int64_t row_stride;
  const void* bias;  // [N], or null
  void* y;           // [N]
  Dtype dtype;       // of all of them
  int64_t N, K;
  int num_threads;
};

// float32 sums, in an order that depends on K alone; rounded once.
void dense_matvec(const DenseMatvec& call);

}  // namespace aqlm::cpu
