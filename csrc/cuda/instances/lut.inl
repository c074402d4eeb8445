// Instantiates cuda.additive.lut for AQLM_T; see tune.h for what the variants mean.
#include "../bodies.h"
#include "../enqueue.cuh"
#include "../lut.cuh"
#include "../tune.h"

namespace aqlm {

namespace {  // the two dtypes must not share these names

template <int kWarps, int kRuns, int kG, int kBooks>
cudaError_t lut(const MatmulParams& p, cudaStream_t stream) {
  constexpr int kRows = kWarps * kRuns * 8;
  auto kernel = lut_kernel<AQLM_T, kWarps, kRuns, kG, kBooks>;
  const int smem = lut_smem(kRows, p.s.stages);
  return AQLM_ENQUEUE_SMEM(kernel, 227 << 10, p.s.ctas, kWarps * 32, smem, stream, p);
}

template <int kWarps, int kRuns, int kG>
cudaError_t lut_books(const MatmulParams& p, cudaStream_t stream) {
  switch (tune::lut_books(p.a.codebooks)) {
    case 1: return lut<kWarps, kRuns, kG, 1>(p, stream);
    case 2: return lut<kWarps, kRuns, kG, 2>(p, stream);
    case 4: return lut<kWarps, kRuns, kG, 4>(p, stream);
  }
  return lut<kWarps, kRuns, kG, 0>(p, stream);
}

}  // namespace

template <>
cudaError_t launch_lut<AQLM_T>(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream) {
  if (p.a.in_group == 16) return lut_books<16, 4, 16>(p, stream);
  if (p.a.in_group == 32) return lut_books<16, 4, 32>(p, stream);
  switch (c.variant) {
    case 1: return lut_books<16, 8, 8>(p, stream);
    case 2: return lut_books<16, 4, 8>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace aqlm
