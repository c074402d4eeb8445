// Instantiates cuda.additive.split for AQLM_T.
#include "../bodies.h"
#include "../enqueue.cuh"
#include "../split.cuh"

namespace aqlm {

namespace {  // the two dtypes must not share these names

template <int kTiles, bool kInt8>
cudaError_t split(const MatmulParams& p, cudaStream_t stream) {
  auto kernel = split_kernel<AQLM_T, kTiles, kInt8>;
  return AQLM_ENQUEUE_SMEM(kernel, 2 << 16, p.s.ctas * p.s.classes, kSplitWarps * 32,
                           2 << p.a.nbits, stream, p);
}

}  // namespace

template <>
cudaError_t launch_split<AQLM_T>(const LaunchConfig& c, const MatmulParams& p,
                                 cudaStream_t stream) {
  const bool int8 = c.precision == Precision::kInt8;
  switch (c.token_tile / (int8 ? 4 : 8)) {
    case 1: return int8 ? split<1, true>(p, stream) : split<1, false>(p, stream);
    case 2: return int8 ? split<2, true>(p, stream) : split<2, false>(p, stream);
    case 4: return int8 ? split<4, true>(p, stream) : split<4, false>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace aqlm
