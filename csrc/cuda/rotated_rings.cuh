// How the warpgroup bodies begin: a block's share of the cells, its ring of x and its warps' rings
// of codes. A step is kCells cells of a row block.
#pragma once

#include "rotated_rows.cuh"
#include "wgmma_ptx.cuh"

namespace aqlm {

// The steps of a block: `count` from step `first` (row group * units + unit) on, at unit0 of a row.
struct BlockShare {
  int first, count, unit0;
  __device__ __forceinline__ explicit BlockShare(const RotatedSchedule& s) {
    const long long all = static_cast<long long>(s.groups) * s.units;
    first = static_cast<int>(blockIdx.x * all / s.ctas);
    count = static_cast<int>((blockIdx.x + 1) * all / s.ctas) - first;
    unit0 = first % s.units;
  }
};

// Steps of a block's share in which row block `own` of `each` a row group exists: the first ones.
__device__ __forceinline__ int steps_of_warp(const RotatedMatmul& p, const BlockShare& share,
                                             int each, int own) {
  const int groups = (p.w.blocks() - own + each - 1) / each;
  return min(share.count, groups * p.s.units - share.first);
}

// Staged x: thread 0 copies it, kX bytes of cells and kSums bytes of their sums a step, into stages
// that all warps read and give back.
template <int kStages, int kX, int kSums>
struct StageRing {
  unsigned char* stages;
  uint64_t *full, *empty;
  int unit, filled;
  Ring<kStages> ring;

  __device__ __forceinline__ StageRing(unsigned char* at, int unit0)
      : stages(at), full(reinterpret_cast<uint64_t*>(at + kStages * (kX + kSums))),
        empty(full + kStages), unit(unit0), filled(0) {}
  // Starts the next step's copy. Its stage was that of kStages steps before.
  __device__ __forceinline__ void fill(const RotatedMatmul& p, int count) {
    if (threadIdx.x != 0 || filled == count) return;
    if (filled >= kStages) mbar::wait(empty + ring.stage, ring.phase ^ 1);
    unsigned char* const to = stages + ring.stage * (kX + kSums);
    uint64_t* const done = full + ring.stage;
    mbar::expect(done, kX + kSums);
    mbar::bulk_copy(to, p.x_cells + size_t(unit) * kX, kX, done);
    if constexpr (kSums > 0)
      mbar::bulk_copy(to + kX, reinterpret_cast<const uint8_t*>(p.x_sums) + size_t(unit) * kSums,
                      kSums, done);
    if (++unit == p.s.units) unit = 0;
    ++filled;
    ring.advance();
  }
};

// A warp's codes: kDepth steps, of row block `block` and on to the warp's next. A row's last cell
// may be missing where kCells is 2, but not if rows are kWhole steps.
template <int kBits, int kWarps, int kDepth, int kCells, bool kWhole>
struct CodeRing {
  static constexpr int kCodes = kCellRows * kCellColumns / 8 * kBits;  // of a cell
  int row_cells, missing, blocks, units;
  int block, wrap, left, slot;
  const uint8_t* from;
  unsigned char* own;  // the lane's in slot 0

  __device__ __forceinline__ CodeRing(const RotatedMatmul& p, const BlockShare& share,
                                      unsigned char* codes, int warp, int lane)
      : row_cells(p.w.units()), missing(kWhole ? 0 : p.s.units * kCells - row_cells),
        blocks(p.w.blocks()), units(p.s.units), slot(0) {
    block = share.first / units * kWarps + warp;
    wrap = units - share.unit0;
    left = block < blocks ? share.count : 0;
    from = p.w.packed + (size_t(block) * row_cells + share.unit0 * kCells) * kCodes + lane * 16;
    own = codes + warp * kDepth * kCells * kCodes + lane * 16;
  }
  // Starts copying the next step.
  __device__ __forceinline__ void fetch(int lane) {
    if (left > 0) {
#pragma unroll
      for (int c = 0; c < kCells; ++c) {
        if (!kWhole && c > 0 && wrap == 1 && missing > 0) break;
        unsigned char* const to = own + (slot * kCells + c) * kCodes;
#pragma unroll
        for (int i = 0; i < kBits * 256 / 512; ++i)
          copy_async(to + i * 512, from + c * kCodes + i * 512);
        if constexpr (kBits == 3)
          copy_async8(to + 512 - lane * 8, from + c * kCodes + 512 - lane * 8);
      }
    }
    copy_commit();
    if (++slot == kDepth) slot = 0;
    --left;
    from += kCells * kCodes;
    if (--wrap == 0) {
      wrap = units;
      from += (size_t(kWarps - 1) * row_cells - missing) * kCodes;
      block += kWarps;
      if (block >= blocks) left = 0;
    }
  }
  // The lane's codes of a step in slot `read`.
  __device__ __forceinline__ void read(int read, int lane, ScalarCodes<kBits> (&c)[kCells]) const {
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      const unsigned char* const at = own + (read * kCells + n) * kCodes;
#pragma unroll
      for (int j = 0; j < int(sizeof(c[n].a) / 16); ++j)
        c[n].a[j] = *reinterpret_cast<const uint4*>(at + j * 512);
      if constexpr (kBits == 3) c[n].b = *reinterpret_cast<const uint2*>(at + 512 - lane * 8);
    }
  }
};

}  // namespace aqlm
