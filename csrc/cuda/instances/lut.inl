// Instantiates cuda.additive.lut and cuda.additive.columns for AQLM_T; variants: see tune.h.
#include "../bodies.h"
#include "../columns.cuh"
#include "../enqueue.cuh"
#include "../lut.cuh"
#include "../tune.h"

namespace aqlm {

namespace {  // the two dtypes must not share these names

template <int kWarps, int kBlocks, int kStages>
cudaError_t lut(const MatmulParams& p, cudaStream_t stream) {
  const int steps = (2 * p.s.max_units - 1) / p.a.codebooks + 2;
  const int xs = steps * kStepVectors * p.a.in_group * sizeof(AQLM_T);
  if (xs > tune::kLutMaxX) return cudaErrorInvalidConfiguration;
  const int tables = 2 * kStages * kLutStepBytes + lut_ring_bytes(kWarps, kBlocks);
  constexpr int limit =
      2 * kStages * kLutStepBytes + lut_ring_bytes(kWarps, kBlocks) + tune::kLutMaxX;
  if (p.a.in_group == 8) {
    auto kernel = lut_kernel<AQLM_T, kWarps, kBlocks, kStages, 8>;
    return AQLM_ENQUEUE_SMEM(kernel, limit, p.s.ctas, kWarps * 32, tables + xs, stream, p);
  }
  auto kernel = lut_kernel<AQLM_T, kWarps, kBlocks, kStages, 0>;
  return AQLM_ENQUEUE_SMEM(kernel, limit, p.s.ctas, kWarps * 32, tables + xs, stream, p);
}

template <int kBooks, int kCtas>
cudaError_t columns(const MatmulParams& p, cudaStream_t stream) {
  auto kernel = columns_kernel<AQLM_T, kBooks, kCtas>;
  return AQLM_ENQUEUE_SMEM(kernel, kColumnSmem, p.s.ctas, kColumnWarps * 32, kColumnSmem, stream,
                           p);
}

}  // namespace

template <>
cudaError_t launch_columns<AQLM_T>(const LaunchConfig& c, const MatmulParams& p,
                                   cudaStream_t stream) {
  const bool two = c.variant == 2;  // CTAs an SM
  switch (p.a.codebooks) {
    case 1: return two ? columns<1, 2>(p, stream) : columns<1, 1>(p, stream);
    case 2: return two ? columns<2, 2>(p, stream) : columns<2, 1>(p, stream);
    case 4: return two ? columns<4, 2>(p, stream) : columns<4, 1>(p, stream);
  }
  return cudaErrorInvalidValue;
}

template <>
cudaError_t launch_lut<AQLM_T>(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream) {
  switch (c.variant) {
    case 1: return lut<8, 1, 1>(p, stream);
    case 2: return lut<8, 2, 1>(p, stream);
    case 4: return lut<8, 4, 1>(p, stream);
    case 8: return lut<16, 4, 2>(p, stream);
    case 16: return lut<32, 2, 2>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace aqlm
