// Shared by the matmul drivers: the families and the rows of x and y.
#pragma once

#include <cstddef>

#include "additive.h"

namespace aqlm::cpu {

void matmul_lut(const MatmulCall& call, const KernelTable& table);
void matmul_direct(const MatmulCall& call, const KernelTable& table);

inline void* y_row(const MatmulCall& call, int64_t m) {
  return static_cast<std::byte*>(call.y) + m * call.y_row_stride * dtype_size(call.x_dtype);
}

inline const void* x_row(const MatmulCall& call, int64_t m) {
  return static_cast<const std::byte*>(call.x) + m * call.x_row_stride * dtype_size(call.x_dtype);
}

// [tokens][K] -> [K][16], unused tokens zero; 16 inputs at a time, so that both sides stay in L1.
inline void lanes_of(const float* x, int tokens, int64_t K, float* out) {
  for (int64_t j0 = 0; j0 < K; j0 += 16, out += 16 * kTokenLanes) {
    const int64_t count = K - j0 < 16 ? K - j0 : 16;
    for (int m = 0; m < kTokenLanes; ++m) {
      for (int64_t j = 0; j < count; ++j) {
        out[j * kTokenLanes + m] = m < tokens ? x[m * K + j0 + j] : 0.0f;
      }
    }
  }
}

inline FinishArgs finish_args(const MatmulCall& call, int64_t a) {
  return {call.scales, call.bias, call.param_dtype, call.x_dtype, call.scheme.out_group_size, a};
}

}  // namespace aqlm::cpu
