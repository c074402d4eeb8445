// A warp's stream of codes: cells in the order of the CTA's range, one contiguous run a row block.
#pragma once

#include "rotated_rows.cuh"

namespace aqlm {

template <int kBits, int kWarps>
struct CodeStream {
  static constexpr int kBytes = kCellRows * kCellColumns / 8 * kBits;  // of a cell
  const uint8_t* from;
  int units, blocks, block;  // of the warp
  int wrap, left;            // cells until the row group ends; until the range does

  // `count` cells from cell `first` on (row group * units + unit), of row block `own` of kWarps.
  __device__ __forceinline__ CodeStream(const RotatedMatmul& p, int first, int count, int own)
      : units(p.s.units), blocks(p.w.blocks()) {
    const int unit = first % units;
    block = first / units * kWarps + own;
    wrap = units - unit;
    left = block < blocks ? count : 0;
    from = p.w.packed + (size_t(block) * units + unit) * kBytes + threadIdx.x % 32 * 16;
  }
  // Brings the next 4 KB to L2: memory would idle while the block waits for x and stages it.
  __device__ __forceinline__ void prefetch(int lane) const {
    if (lane * 128 < min(left, wrap) * kBytes)
      asm volatile("prefetch.global.L2 [%0];" :: "l"(from + lane * (128 - 16)));
  }
  // Starts loading the next cell.
  __device__ __forceinline__ void fetch(ScalarCodes<kBits>& c) {
    if (left > 0) {
#pragma unroll
      for (int i = 0; i < int(sizeof(c.a) / 16); ++i) c.a[i] = load_stream(from + i * 512);
      if constexpr (kBits == 3) c.b = load_stream8(from - threadIdx.x % 32 * 8 + 512);
    }
    --left;
    from += kBytes;
    if (--wrap == 0) {  // on to the warp's block of the next row group
      wrap = units;
      from += size_t(kWarps - 1) * units * kBytes;
      block += kWarps;
      if (block >= blocks) left = 0;
    }
  }
};

// Makes codes depend on the wait before. 8-bit codes are operands as they are: without an operation
// in between they would be loaded into registers that MMAs still read.
template <int kBits>
__device__ __forceinline__ void after_wait(ScalarCodes<kBits>& c, uint32_t no_bits) {
#pragma unroll
  for (int i = 0; i < int(sizeof(c.a) / 16); ++i) {
    uint32_t* w[4] = {&c.a[i].x, &c.a[i].y, &c.a[i].z, &c.a[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if constexpr (kBits == 8) asm volatile("xor.b32 %0, %0, %1;" : "+r"(*w[j]) : "r"(no_bits));
      else asm volatile("" : "+r"(*w[j]));
  }
  asm volatile("" : "+r"(c.b.x), "+r"(c.b.y));
}

}  // namespace aqlm
