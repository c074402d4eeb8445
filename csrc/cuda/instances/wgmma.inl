// Instantiates cuda.additive.{mma_ring, wgmma, wgmma_int8, wgmma_long, wgmma_wide, split_wgmma} for
// AQLM_T.
#include "../bodies.h"
#include "../enqueue.cuh"
#include "../mma_ring.cuh"
#include "../split_wgmma.cuh"
#include "../wgmma.cuh"
#include "../wgmma_int8.cuh"
#include "../wgmma_long.cuh"
#include "../wgmma_wide.cuh"

namespace aqlm {

namespace {  // the two dtypes must not share these names

template <int B, int kTokens>
cudaError_t wgmma_pass(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.s.x_steps, 8), ceil_div(kTokens, 32), p.s.passes);
  if (p.x != nullptr) {
    const cudaError_t e = enqueue(x_image_kernel<AQLM_T>, grid, 256, 0, stream, p, kTokens);
    if (e != cudaSuccess) return e;
  }
  constexpr int kSmem = wg_smem(B, kTokens), kThreads = (wg_warps(B, kTokens) + 4) * 32;
  auto kernel = wgmma_kernel<AQLM_T, B, kTokens>;
  return AQLM_ENQUEUE_PLACED((Placement{1, c.carveout}), kernel, kSmem, p.s.grid, kThreads, kSmem,
                             stream, p);
}

template <int B>
cudaError_t wgmma_books(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream) {
  switch (c.token_tile) {
    case 16: return wgmma_pass<B, 16>(c, p, stream);
    case 32: return wgmma_pass<B, 32>(c, p, stream);
    case 64: return wgmma_pass<B, 64>(c, p, stream);
    case 128: return wgmma_pass<B, 128>(c, p, stream);
  }
  return cudaErrorInvalidValue;
}

template <int B>
cudaError_t mma_ring(const MatmulParams& p, cudaStream_t stream) {
  constexpr int kSmem = ring_smem(B);
  auto kernel = mma_ring_kernel<AQLM_T, B>;
  return AQLM_ENQUEUE_SMEM(kernel, kSmem, p.s.grid, (kRingWarps + 4) * 32, kSmem, stream, p);
}

template <int B, int kTokens>
cudaError_t wgmma_int8_pass(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream) {
  constexpr int kSmem = wg8_smem(B, 2 * kTokens);
  auto kernel = wgmma_int8_kernel<AQLM_T, B, 2 * kTokens>;
  return AQLM_ENQUEUE_PLACED((Placement{1, c.carveout}), kernel, kSmem, p.s.grid,
                             (kWg8Warps + 4) * 32, kSmem, stream, p);
}

template <int B>
cudaError_t wgmma_int8(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream) {
  switch (c.token_tile) {
    case 8: return wgmma_int8_pass<B, 8>(c, p, stream);
    case 16: return wgmma_int8_pass<B, 16>(c, p, stream);
    case 32: return wgmma_int8_pass<B, 32>(c, p, stream);
  }
  return cudaErrorInvalidValue;
}

template <int B>
cudaError_t wgmma_long(const MatmulParams& p, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.s.x_steps, 8), kLongTokens / 32, p.s.passes);
  const cudaError_t e = enqueue(x_image_kernel<AQLM_T>, grid, 256, 0, stream, p, kLongTokens);
  if (e != cudaSuccess) return e;
  constexpr int kSmem = long_smem(B);
  auto kernel = wgmma_long_kernel<AQLM_T, B>;
  return AQLM_ENQUEUE_SMEM(kernel, kSmem, p.s.grid, (kLongWarps + 4) * 32, kSmem, stream, p);
}

template <int kTokens>
cudaError_t wgmma_wide(const MatmulParams& p, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.s.x_steps, 8), kTokens / 32);
  const cudaError_t e = enqueue(x_wide_kernel<AQLM_T>, grid, 256, 0, stream, p, kTokens);
  if (e != cudaSuccess) return e;
  constexpr int kSmem = wide_smem(kTokens);
  auto kernel = wgmma_wide_kernel<AQLM_T, kTokens>;
  return AQLM_ENQUEUE_SMEM(kernel, kSmem, p.s.ctas * p.s.classes, (kWideWgWarps + 4) * 32, kSmem,
                           stream, p);
}

template <int kTokens, bool kInt8>
cudaError_t split_pass(const MatmulParams& p, cudaStream_t stream) {
  constexpr int kColumns = kInt8 ? 2 * kTokens : kTokens;
  auto kernel = split_wgmma_kernel<AQLM_T, kTokens, kInt8>;
  return AQLM_ENQUEUE_SMEM(kernel, split_wg_smem(16, kColumns), p.s.ctas * p.s.classes,
                           (kSplitWgWarps + 4) * 32, split_wg_smem(p.a.nbits, kColumns), stream, p);
}

}  // namespace

template <>
cudaError_t launch_wgmma<AQLM_T>(const LaunchConfig& c, const MatmulParams& p,
                                 cudaStream_t stream) {
  switch (p.a.codebooks) {
    case 1: return wgmma_books<1>(c, p, stream);
    case 2: return wgmma_books<2>(c, p, stream);
    case 4: return wgmma_books<4>(c, p, stream);
  }
  return cudaErrorInvalidValue;
}

template <>
cudaError_t launch_mma_ring<AQLM_T>(const LaunchConfig&, const MatmulParams& p,
                                    cudaStream_t stream) {
  return p.a.codebooks == 1 ? mma_ring<1>(p, stream) : mma_ring<2>(p, stream);
}

template <>
cudaError_t launch_wgmma_int8<AQLM_T>(const LaunchConfig& c, const MatmulParams& p,
                                      cudaStream_t stream) {
  switch (p.a.codebooks) {
    case 1: return wgmma_int8<1>(c, p, stream);
    case 2: return wgmma_int8<2>(c, p, stream);
  }
  return cudaErrorInvalidValue;
}

template <>
cudaError_t launch_wgmma_long<AQLM_T>(const LaunchConfig&, const MatmulParams& p,
                                      cudaStream_t stream) {
  return p.a.codebooks == 1 ? wgmma_long<1>(p, stream) : wgmma_long<2>(p, stream);
}

template <>
cudaError_t launch_wgmma_wide<AQLM_T>(const LaunchConfig& c, const MatmulParams& p,
                                      cudaStream_t stream) {
  switch (c.token_tile) {
    case 32: return wgmma_wide<32>(p, stream);
    case 64: return wgmma_wide<64>(p, stream);
    case 128: return wgmma_wide<128>(p, stream);
  }
  return cudaErrorInvalidValue;
}

template <>
cudaError_t launch_split_wgmma<AQLM_T>(const LaunchConfig& c, const MatmulParams& p,
                                       cudaStream_t stream) {
  const bool int8 = c.precision == Precision::kInt8;
  switch (c.token_tile) {
    case 16: return int8 ? split_pass<16, true>(p, stream) : split_pass<16, false>(p, stream);
    case 32: return int8 ? split_pass<32, true>(p, stream) : split_pass<32, false>(p, stream);
    case 64: return int8 ? split_pass<64, true>(p, stream) : split_pass<64, false>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace aqlm
