// Instantiates cuda.e8p or cuda.scalar for AQLM_CODING and AQLM_BITS.
#include "../enqueue.cuh"
#include "../rotated_bodies.h"
#include "../rotated_dequant.cuh"
#include "../rotated_groups.cuh"
#include "../rotated_half.cuh"
#include "../rotated_mma.cuh"
#include "../rotated_owned.cuh"
#include "../rotated_pairs.cuh"
#include "../rotated_resident.cuh"
#include "../rotated_wgmma.cuh"

namespace aqlm {

namespace {

template <int kTiles, bool kGrouped, Share kShare = kTiles == 1 ? Share::kLocal : Share::kRing,
          int kWarps = tune::rotated_warps(AQLM_CODING, AQLM_BITS, kTiles, kGrouped, kShare)>
cudaError_t matmul_tiles(const RotatedMatmul& p, cudaStream_t stream) {
  using Shape = tune::RotatedShape<AQLM_CODING, AQLM_BITS, kTiles>;
  auto kernel = rotated_mma_kernel<AQLM_CODING, AQLM_BITS, kTiles, kGrouped, kWarps, kShare>;
  const int smem = Shape::kTables + tune::staged_bytes(p.s, p.tokens, kTiles, kShare, kWarps);
  int device = 0;
  DeviceInfo info;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = device_info(device, &info);
  if (e != cudaSuccess) return e;
  const int limit = std::min(info.max_smem, Shape::kTables + tune::rotated_most_x(kTiles));
  return AQLM_ENQUEUE_SMEM(kernel, limit, p.s.ctas, kWarps * 32, smem, stream, p);
}

template <bool kLong>
cudaError_t matmul_owned(const RotatedMatmul& p, cudaStream_t stream) {
  auto kernel = rotated_owned_kernel<AQLM_CODING, AQLM_BITS, kLong>;
  const int smem = tune::rotated_owned_smem(p.w, p.tokens);
  int device = 0;
  DeviceInfo info;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = device_info(device, &info);
  if (e != cudaSuccess) return e;
  constexpr int kMost = tune::rotated_tables(AQLM_CODING, AQLM_BITS) + tune::kRotatedMaxX;
  return AQLM_ENQUEUE_SMEM(kernel, std::min(info.max_smem, kMost), p.s.ctas, tune::kOwnedThreads,
                           smem, stream, p);
}

template <int kTokens>
cudaError_t matmul_groups(const RotatedMatmul& p, cudaStream_t stream) {
  auto kernel = rotated_groups_kernel<AQLM_BITS, kTokens>;
  constexpr int kScales = tune::kGroupWarps * kGroupBytes;
  const int smem = kScales + tune::staged_bytes(p.s, kTokens, 1, Share::kLocal, tune::kGroupWarps);
  constexpr int limit = kScales + tune::kRotatedMaxX;
  return AQLM_ENQUEUE_SMEM(kernel, limit, p.s.ctas, tune::kGroupWarps * 32, smem, stream, p);
}

template <int kTiles, bool kGrouped,
          int kCells = tune::rotated_wg_most_cells(AQLM_CODING, AQLM_BITS, kTiles)>
cudaError_t wgmma_tiles(const RotatedMatmul& p, cudaStream_t stream) {
  if constexpr (kGrouped && kCells == 2)
    if (p.s.cells == 1) return wgmma_tiles<kTiles, kGrouped, 1>(p, stream);
  auto kernel = rotated_wgmma_kernel<AQLM_CODING, AQLM_BITS, kTiles, kGrouped, kCells>;
  constexpr int kWarps = tune::rotated_wg_warps(AQLM_CODING, AQLM_BITS, kTiles, kGrouped);
  constexpr int kSmem =
      tune::rotated_wg_smem(AQLM_CODING, AQLM_BITS, kTiles, kGrouped, kCells, kWarps);
  static_assert(kSmem <= 227 << 10, "a block of sm_90 has 227 KB");
  return AQLM_ENQUEUE_SMEM(kernel, kSmem, p.s.ctas, kWarps * 32, kSmem, stream, p);
}

template <int kTiles, bool kOwn, int kGroup>
cudaError_t matmul_resident(const RotatedMatmul& p, cudaStream_t stream) {
  auto kernel = rotated_resident_kernel<kTiles, kOwn, kGroup>;
  const int smem = tune::rotated_resident_smem(tune::local_cells(p.s), p.tokens, kOwn);
  return AQLM_ENQUEUE_SMEM(kernel, 227 << 10, p.s.ctas, tune::kResidentWarps * 32, smem, stream,
                           p);
}
template <int kTiles>
cudaError_t matmul_resident(const RotatedConfig& c, const RotatedMatmul& p, cudaStream_t stream) {
  if (c.share != Share::kLocal) return matmul_resident<kTiles, false, 2>(p, stream);
  const int cells = 2 * tune::local_cells(p.s);
  return tune::rotated_resident_group(p.tokens, cells) == 1
             ? matmul_resident<kTiles, true, 1>(p, stream)
             : matmul_resident<kTiles, true, 2>(p, stream);
}

template <int kTiles>
cudaError_t matmul_pairs(const RotatedMatmul& p, cudaStream_t stream) {
  auto kernel = rotated_pairs_kernel<AQLM_CODING, AQLM_BITS, kTiles>;
  constexpr int kSmem = tune::rotated_pair_smem(AQLM_CODING, AQLM_BITS);
  static_assert(kTiles != 16 || kSmem <= 227 << 10, "a block of sm_90 has 227 KB");
  return AQLM_ENQUEUE_SMEM(kernel, kSmem, p.s.ctas, tune::kPairWarps * 32, kSmem, stream, p);
}

template <int kTiles, int kCells>
cudaError_t half_tiles(const RotatedMatmul& p, cudaStream_t stream) {
  const int items = p.s.units * p.s.cells * 4;
  const dim3 grid((items + kHalfStageThreads - 1) / kHalfStageThreads, p.tokens);
  const cudaError_t e =
      enqueue(stage_half_kernel<4 * kTiles>, grid, kHalfStageThreads, 0, stream, p);
  if (e != cudaSuccess) return e;
  auto kernel = rotated_half_kernel<AQLM_BITS, kTiles, kCells>;
  constexpr int kSmem = tune::rotated_half_smem(AQLM_BITS, kTiles, kCells);
  static_assert(kSmem <= 227 << 10, "a block of sm_90 has 227 KB");
  const int threads = tune::rotated_half_warps(kTiles) * 32;
  return AQLM_ENQUEUE_SMEM(kernel, kSmem, p.s.ctas, threads, kSmem, stream, p);
}
template <int kTiles>
cudaError_t half_tiles(const RotatedMatmul& p, cudaStream_t stream) {
  if constexpr (tune::rotated_half_most_cells(AQLM_BITS) == 2)
    if (p.s.cells == 2) return half_tiles<kTiles, 2>(p, stream);
  return half_tiles<kTiles, 1>(p, stream);
}

template <bool kGrouped>
cudaError_t matmul_all(const RotatedConfig& c, const RotatedMatmul& p, cudaStream_t stream) {
  constexpr bool kE8p = AQLM_CODING == Coding::kE8p;
  constexpr int kMostWg = tune::rotated_max_tiles(AQLM_CODING, AQLM_BITS, kGrouped, true);
  constexpr int kMost = tune::rotated_max_tiles(AQLM_CODING, AQLM_BITS, kGrouped, false);
  const int tiles = c.tiles;
  if constexpr (kGrouped)
    if (c.half) return tiles == 8 ? half_tiles<8>(p, stream) : half_tiles<16>(p, stream);
  if constexpr (kGrouped)
    if (tiles == 1 && tune::rotated_group_scales(p.w))
      return p.tokens == 1 ? matmul_groups<1>(p, stream) : matmul_groups<4>(p, stream);
  if (tiles > 1 && c.share == Share::kRing) {
    const int units = p.s.units * p.s.cells;
    const int ranges = (units * 8 + kStageThreads - 1) / kStageThreads;
    const int planes = c.wgmma ? tune::rotated_planes(AQLM_CODING, AQLM_BITS) : 1;
    const cudaError_t e = enqueue(stage_kernel<kE8p, kGrouped>, dim3(p.tokens, ranges),
                                  kStageThreads, std::max(units, kStageThreads / 32) * 4, stream,
                                  p, 8 * tiles, planes, c.wgmma);
    if (e != cudaSuccess) return e;
  }
  if (c.wgmma) {
    if (tiles == 4) {
      if constexpr (tune::rotated_resident(AQLM_CODING, AQLM_BITS, 4))
        return matmul_resident<4>(c, p, stream);
      else
        return wgmma_tiles<4, kGrouped>(p, stream);
    }
    if (tiles == 8) return wgmma_tiles<8, kGrouped>(p, stream);
    if constexpr (tune::rotated_pairs(AQLM_CODING, AQLM_BITS, kMostWg, kGrouped)) {
      return matmul_pairs<kMostWg>(p, stream);
    } else if constexpr (kMostWg == 16) {
      return wgmma_tiles<16, kGrouped>(p, stream);
    }
    return cudaErrorInvalidValue;
  }
  if constexpr (AQLM_CODING == Coding::kScalar && AQLM_BITS == 2 && !kGrouped)
    if (c.wide) return matmul_tiles<1, false, Share::kLocal, tune::kWideWarps>(p, stream);
  if constexpr (!kGrouped) {
    constexpr int kMostLocal = tune::rotated_local_tiles(AQLM_CODING, AQLM_BITS);
    if (c.share == Share::kOwned) {
      if constexpr (tune::rotated_owned_takes_long(AQLM_CODING, AQLM_BITS))
        if (tune::rotated_owned_long(p.s.units)) return matmul_owned<true>(p, stream);
      return matmul_owned<false>(p, stream);
    }
    if (c.share == Share::kLocal && tiles == 2)
      return matmul_tiles<2, false, Share::kLocal>(p, stream);
    if constexpr (kMostLocal == 4)
      if (c.share == Share::kLocal && tiles == 4)
        return matmul_tiles<4, false, Share::kLocal>(p, stream);
  }
  switch (tiles) {
    case 1: return matmul_tiles<1, kGrouped>(p, stream);
    case 2: return matmul_tiles<2, kGrouped>(p, stream);
    case 4: return matmul_tiles<4, kGrouped>(p, stream);
    case 8: return matmul_tiles<8, kGrouped>(p, stream);
  }
  if constexpr (kMost == 16)
    if (tiles == 16) return matmul_tiles<16, kGrouped>(p, stream);
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t dequant_to(const RotatedDequant& p, cudaStream_t stream) {
  constexpr int kTables = AQLM_CODING == Coding::kE8p ? kE8pTableBytes : 0;
  int device = 0;
  DeviceInfo info;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = device_info(device, &info);
  if (e != cudaSuccess) return e;
  auto kernel = rotated_dequant_kernel<T, AQLM_CODING, AQLM_BITS>;
  const long long cells = (p.row1 - p.row0 + 31ll) / 32 * ((p.col1 - p.col0 + 63) / 64);
  const int per_sm = kTables == 0 ? 8 : 3;
  const int grid = static_cast<int>(std::min<long long>(
      (cells + kRotatedDequantWarps - 1) / kRotatedDequantWarps, info.sms * per_sm));
  return AQLM_ENQUEUE_SMEM(kernel, kTables, grid, kRotatedDequantWarps * 32, kTables, stream, p);
}

}  // namespace

template <>
cudaError_t RotatedBodies<AQLM_CODING, AQLM_BITS>::matmul(const RotatedConfig& c,
                                                          const RotatedMatmul& p,
                                                          cudaStream_t stream) {
  if constexpr (AQLM_CODING == Coding::kScalar)
    if (c.grouped) return matmul_all<true>(c, p, stream);
  return matmul_all<false>(c, p, stream);
}

template <>
cudaError_t RotatedBodies<AQLM_CODING, AQLM_BITS>::dequant(const RotatedDequant& p,
                                                           cudaStream_t stream) {
  if (p.out_type == DType::kFloat16) return dequant_to<__half>(p, stream);
  if (p.out_type == DType::kBFloat16) return dequant_to<__nv_bfloat16>(p, stream);
  return dequant_to<float>(p, stream);
}

}  // namespace aqlm
