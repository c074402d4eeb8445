// Instantiates cuda.additive.owned_int8 for AQLM_T.
#include "../bodies.h"
#include "../enqueue.cuh"
#include "../owned_int8.cuh"

namespace aqlm {

namespace {  // the two dtypes must not share these names

template <int B, int kTiles, int kOctets, bool kShort = false>
cudaError_t owned(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream) {
  const int pairs = B == 1 ? p.s.units : ceil_div(p.s.units, 2);
  const int smem = tune::owned_smem(pairs, p.tokens, p.s.group_rows);
  auto kernel = owned_int8_kernel<AQLM_T, B, kTiles, kOctets, kShort>;
  return AQLM_ENQUEUE_PLACED((Placement{1, c.carveout}), kernel, tune::kOwnedMaxSmem, p.s.grid,
                             tune::kOwnedWarps * 32, smem, stream, p);
}

template <int B>
cudaError_t forms(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream) {
  if (c.variant == 0) return owned<B, 1, 4, true>(c, p, stream);
  if (c.variant == 64) return owned<B, 1, 8>(c, p, stream);
  return c.token_tile == 2 ? owned<B, 1, 4>(c, p, stream) : owned<B, 2, 4>(c, p, stream);
}

}  // namespace

template <>
cudaError_t launch_owned<AQLM_T>(const LaunchConfig& c, const MatmulParams& p,
                                 cudaStream_t stream) {
  return p.a.codebooks == 1 ? forms<1>(c, p, stream) : forms<2>(c, p, stream);
}

}  // namespace aqlm
