// Instantiates cuda.additive.owned_int8 for AQLM_T; variants: see tune.h.
#include "../bodies.h"
#include "../enqueue.cuh"
#include "../owned_int8.cuh"

namespace aqlm {

namespace {  // the two dtypes must not share these names

template <int B, int kTiles, int kVariant>
cudaError_t owned(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream) {
  const int pairs = p.a.codebooks == 1 ? p.a.units() : ceil_div(p.a.units(), 2);
  const int smem = tune::owned_smem(kVariant, pairs, p.tokens, p.s.group_rows);
  constexpr tune::Owned shape = tune::owned(kVariant);
  if (shape.shorter && (p.tokens > 1 || pairs > shape.depth * shape.warps || p.s.group_rows > 32))
    return cudaErrorInvalidConfiguration;
  auto kernel = owned_int8_kernel<AQLM_T, B, kTiles, kVariant>;
  return AQLM_ENQUEUE_PLACED((Placement{shape.cluster, c.carveout}), kernel, 227 << 10, p.s.grid,
                             shape.warps * 32, smem, stream, p);
}

template <int B, int kTiles>
cudaError_t variants(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream) {
  switch (c.variant) {
    case 1: return owned<B, 1, 1>(c, p, stream);
    case 2: return owned<B, kTiles, 2>(c, p, stream);
    case 3: return owned<B, kTiles, 3>(c, p, stream);
    case 4: return owned<B, kTiles, 4>(c, p, stream);
    case 5: return owned<B, kTiles, 5>(c, p, stream);
    case 6: return owned<B, kTiles, 6>(c, p, stream);
    case 7: return owned<B, kTiles, 7>(c, p, stream);
    case 8: return owned<B, kTiles, 8>(c, p, stream);
    case 9: return owned<B, kTiles, 9>(c, p, stream);
    case 10: return owned<B, kTiles, 10>(c, p, stream);
    case 13: return owned<B, 1, 13>(c, p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

template <>
cudaError_t launch_owned<AQLM_T>(const LaunchConfig& c, const MatmulParams& p,
                                 cudaStream_t stream) {
  if (p.a.codebooks == 1)
    return c.token_tile == 2 ? variants<1, 1>(c, p, stream) : variants<1, 2>(c, p, stream);
  return c.token_tile == 2 ? variants<2, 1>(c, p, stream) : variants<2, 2>(c, p, stream);
}

}  // namespace aqlm
