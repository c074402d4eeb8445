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

inline FinishArgs finish_args(const MatmulCall& call, int64_t a) {
  return {call.scales, call.bias, call.param_dtype, call.x_dtype, call.scheme.out_group_size, a};
}

}  // namespace aqlm::cpu
