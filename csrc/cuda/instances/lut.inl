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

template <int kWarps, int kBooks, int kCtas, int kPrefetch = 0, bool kPaired = false>
cudaError_t columns(const MatmulParams& p, cudaStream_t stream) {
  constexpr int kSmem = columns_smem(kWarps * kBlockRows);
  auto kernel = columns_kernel<AQLM_T, kWarps, kBooks, kCtas, kPrefetch, kPaired>;
  return AQLM_ENQUEUE_SMEM(kernel, kSmem, p.s.ctas, kWarps * 32, kSmem, stream, p);
}

}  // namespace

template <>
cudaError_t launch_columns<AQLM_T>(const LaunchConfig& c, const MatmulParams& p,
                                   cudaStream_t stream) {
  switch (p.a.codebooks * 16 + c.variant) {
    case 16 + 1: return columns<8, 1, 1>(p, stream);
    case 16 + 2: return columns<8, 1, 2>(p, stream);
    case 32 + 1: return columns<8, 2, 1>(p, stream);
    case 32 + 2: return columns<8, 2, 2>(p, stream);
    case 64 + 1: return columns<8, 4, 1>(p, stream);
    case 64 + 2: return columns<8, 4, 2>(p, stream);
#ifdef AQLM_TUNE
    case 16 + 8: return columns<8, 1, 2, 0, true>(p, stream);
    case 32 + 8: return columns<8, 2, 2, 0, true>(p, stream);
    case 64 + 8: return columns<8, 4, 2, 0, true>(p, stream);
    case 16 + 4: return columns<8, 1, 1, 4>(p, stream);
    case 16 + 5: return columns<8, 1, 2, 4>(p, stream);
    case 16 + 3: return columns<16, 1, 1>(p, stream);
    case 16 + 6: return columns<16, 1, 1, 4>(p, stream);
    case 32 + 4: return columns<8, 2, 1, 4>(p, stream);
    case 32 + 5: return columns<8, 2, 2, 4>(p, stream);
    case 32 + 3: return columns<16, 2, 1>(p, stream);
    case 32 + 6: return columns<16, 2, 1, 4>(p, stream);
    case 64 + 3: return columns<16, 4, 1>(p, stream);
#endif
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
