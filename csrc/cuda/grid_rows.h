// What the root files see of the product of one token with a quantized output head.
#pragma once

#include "rotated.h"

namespace aqlm {

// y = W x + bias, W on a scalar grid of 4 or 8 bits with scale groups of 128 columns, x, y, bias,
// scales and zeros of one 16-bit type.
struct GridRowsParams {
  RotatedWeight w;
  const void* x;     // [K], 8-byte aligned
  const void* bias;  // [N] or null
  void* y;           // [N]
  DType type;
};
bool takes_grid_rows(const RotatedWeight& w, DType x_type);

cudaError_t launch_grid_rows(const GridRowsParams& p, cudaStream_t stream);

}  // namespace aqlm
