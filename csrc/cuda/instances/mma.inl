// Instantiates cuda.additive.mma for AQLM_T; AQLM_INT8 picks the precision.
#include "../bodies.h"
#include "../enqueue.cuh"
#include "../mma.cuh"

namespace aqlm {

namespace {  // the two dtypes must not share these names

template <int B, int kTiles>
cudaError_t mma(const MatmulParams& p, cudaStream_t stream) {
  constexpr int kSmem = tune::mma_smem(B, kTiles);
  auto kernel = mma_kernel<AQLM_T, B, kTiles, AQLM_INT8>;
  return AQLM_ENQUEUE_SMEM(kernel, kSmem, p.s.ctas, tune::mma_warps(B) * 32, kSmem, stream, p);
}

}  // namespace

template <>
cudaError_t AQLM_LAUNCH<AQLM_T>(const LaunchConfig& c, const MatmulParams& p,
                                cudaStream_t stream) {
  const int tiles = c.token_tile / (AQLM_INT8 ? 4 : 8);
  switch (p.a.codebooks * 16 + tiles) {
    case 16 + 1: return mma<1, 1>(p, stream);
    case 16 + 2: return mma<1, 2>(p, stream);
    case 16 + 4: return mma<1, 4>(p, stream);
    case 16 + 8: return mma<1, 8>(p, stream);
    case 32 + 1: return mma<2, 1>(p, stream);
    case 32 + 2: return mma<2, 2>(p, stream);
    case 32 + 4: return mma<2, 4>(p, stream);
    case 32 + 8: return mma<2, 8>(p, stream);
    case 64 + 1: return mma<4, 1>(p, stream);
    case 64 + 2: return mma<4, 2>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace aqlm
