// What the root files see of the kernels that add an additive matmul's partial sums and go on to
// the next matmul's input (sum_joined.cu): in place of its second kernel (reduce.cuh).
#pragma once

#include "launch.h"

namespace aqlm {

// Where a result [tokens, n] goes: rows, or an image of it that the next matmul reads (wgmma.cuh;
// int8: wgmma_int8.cuh), `image` tokens wide. Tokens of the image past `tokens` are not written.
struct SumTarget {
  void* y;
  int image;      // 0: rows
  float* scales;  // [tokens] of the int8 image; null: 16 bits
};

// sum = x + product, y = weight * sum / rms(sum); n = 512, 1024, .. 4096 or 8 * 1024, one part. The
// product and the sum are rounded to `type`, the norm where transformers rounds it. Rows are
// contiguous, every pointer is 16-byte aligned.
struct SumNormParams {
  MatmulParams product;
  const void* x;       // [tokens, n]
  const void* weight;  // [n]
  void* sum;           // [tokens, n]
  SumTarget to;
  float eps;
};

// y = silu(gate) * up of the two halves (parts) of the product, each rounded.
struct SumSwigluParams {
  MatmulParams product;
  SumTarget to;
  bool up_first;  // up is the first half
};

// Whether these kernels add the sums of a scheduled matmul: row groups of 512 that are whole, one
// pass, and not more slots than shared memory takes. Then each for its own shapes:
bool takes_sums(const LaunchConfig& c, const MatmulParams& p, const DeviceInfo& device);
bool takes_sum_norm(const MatmulParams& p);
bool takes_sum_swiglu(const MatmulParams& p);
bool takes_int8_image(const MatmulParams& p);  // SwiGLU's result as one

cudaError_t launch_sum_norm(DType type, const SumNormParams& p, cudaStream_t stream);
cudaError_t launch_sum_swiglu(DType type, const SumSwigluParams& p, cudaStream_t stream);
// y = product + bias, as rows.
cudaError_t launch_sum_rows(DType type, const MatmulParams& p, cudaStream_t stream);

}  // namespace aqlm
