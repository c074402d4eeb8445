// Instantiates cuda.additive.split for AQLM_T.
#include "../bodies.h"
#include "../enqueue.cuh"
#include "../split.cuh"

namespace aqlm {

namespace {  // the two dtypes must not share these names

template <int kTiles, bool kInt8, bool kOwn = false>
cudaError_t split(const MatmulParams& p, cudaStream_t stream) {
  DeviceInfo info;
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = device_info(device, &info);
  if (e != cudaSuccess) return e;
  const int smem = tune::split_table_bytes(info.arch, p.a.entries()) +
                   (kOwn ? p.s.units * tune::split_x_unit(kInt8) : 0);
  auto kernel = split_kernel<AQLM_T, kTiles, kInt8, kOwn>;
  return AQLM_ENQUEUE_SMEM(kernel, info.max_smem - tune::kSplitStatic, p.s.ctas * p.s.classes,
                           kSplitWarps * 32, smem, stream, p);
}

}  // namespace

template <>
cudaError_t launch_split<AQLM_T>(const LaunchConfig& c, const MatmulParams& p,
                                 cudaStream_t stream) {
  const bool int8 = c.precision == Precision::kInt8;
  if (c.token_tile == 1)
    return int8 ? split<1, true, true>(p, stream) : split<1, false, true>(p, stream);
  switch (c.token_tile / (int8 ? 4 : 8)) {
    case 1: return int8 ? split<1, true>(p, stream) : split<1, false>(p, stream);
    case 2: return int8 ? split<2, true>(p, stream) : split<2, false>(p, stream);
    case 4: return int8 ? split<4, true>(p, stream) : split<4, false>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace aqlm
