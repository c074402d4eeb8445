// cuda.additive.split: y = x W^T for one codebook of up to 65,536 entries (1x16 and 1x9 .. 1x15).
//
// The codebook is larger than shared memory, so its *dimensions* are split over classes of CTAs:
//   int8:  class i holds dimensions {2i, 2i + 1} of every entry as int8  (2 B x 64 K = 128 KB)
//   exact: class i holds dimension i of every entry as stored            (2 B x 64 K = 128 KB)
// A code then costs one 2-byte shared-memory lookup per class instead of a 32-byte L2 sector. The
// classes of one cell run side by side and re-read its codes from L2; their partial sums are added
// in the common reduction.
//
//   unit: 16 rows x 16 vectors, 8 codes per lane -> 8 lookups -> the A registers of one MMA
//     reg 0: (row g,     vectors 4t, 4t+1)   reg 2: (row g,     vectors 4t+2, 4t+3)
//     reg 1: (row g + 8, vectors 4t, 4t+1)   reg 3: (row g + 8, vectors 4t+2, 4t+3)
//   A 2-byte lookup is two int8 (m16n8k32.s8) or one 16-bit float (m16n8k16): the same registers.
//
// Activations come in fragment order from fragments.cuh. The lookups dominate, so up to
// 8 * kTiles columns cost little more than one. H200, 2026-11-22, 28672 x 8192, M = 1: int8 76 us,
// exact 146 us (shared-memory conflicts: 3.5 wavefronts per lookup).
// Architectures sm_80+ with 164 KB shared memory.
#pragma once

#include "decode/additive.cuh"
#include "streamk.cuh"

namespace aqlm {

constexpr int kSplitWarps = 32;
constexpr int kSplitDepth = 2;  // units in flight per warp, in registers: LDS is the limit

// kTiles: MMA column tiles (8 tokens exact, 4 tokens int8).
template <typename T, int kTiles, bool kInt8>
__global__ void __launch_bounds__(kSplitWarps * 32, 1)
split_kernel(const __grid_constant__ MatmulParams p) {
  constexpr int kDepth = kSplitDepth;
  extern __shared__ __align__(1024) unsigned char smem[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int row_warps = p.s.group_rows / kTileRows, k_warps = p.s.lanes;
  const int row_warp = warp % row_warps, k_warp = warp / row_warps;
  const int units = p.s.units, dims = blockIdx.x % p.s.classes;
  const uint8_t* fragments =
      p.x_fragments + (size_t(dims) * units * kTiles * 32 + lane) * 8;
  const int columns = p.tokens * (kInt8 ? 2 : 1);
  int loaded_part = -1;
  grid_dependents_start();

  for_each_piece(p.a, p.s, [&](const Piece& piece) {
    const bool active = row_warp < piece.tiles;
    const int u0 = piece.u0 + k_warp, u_end = active ? piece.u1 : 0;
    const uint8_t* codes = p.packed + size_t(piece.tile + row_warp) * kUnitBytes + lane * 16;
    const size_t unit_stride = size_t(p.s.tiles) * kUnitBytes;
    float accf[kInt8 ? 1 : kTiles][4] = {};
    int acci[kInt8 ? kTiles : 1][4] = {};

    uint4 ring[kDepth] = {};
    auto fetch = [&](int d, int u) {
      if (u < u_end) ring[d] = load_stream(codes + u * unit_stride);
    };
    auto fill_table = [&] {
      const int bytes = p.a.entries() * 2;
      const uint8_t* from = p.aux + kAuxHeader +
                            size_t(piece.part * p.s.classes + dims) * bytes;
      for (int i = threadIdx.x * 16; i < bytes; i += kSplitWarps * 32 * 16)
        *reinterpret_cast<uint4*>(smem + i) = *reinterpret_cast<const uint4*>(from + i);
    };
    auto pair = [&](uint32_t w) {
      const uint32_t lo = *reinterpret_cast<const uint16_t*>(smem + low_word_offset(w));
      const uint32_t hi = *reinterpret_cast<const uint16_t*>(smem + high_word_offset(w));
      return lo | hi << 16;
    };
    auto multiply = [&](int u, uint4 c) {
      const uint32_t a[4] = {pair(c.x), pair(c.z), pair(c.y), pair(c.w)};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        uint2 x = make_uint2(0, 0);  // columns past M need no load
        if (n * 8 + g < columns) x = load_cached8(fragments + (size_t(u) * kTiles + n) * 256);
        if constexpr (kInt8) mma_16832(acci[n], a, x.x, x.y);
        else mma_16816(accf[n], a, x.x, x.y, T());
      }
    };
    auto write = [&] {
      float* out = slot_of(p, piece, k_warp) + row_warp * kTileRows + g;
      auto put = [&](int token, int row, float v) {
        if (token < p.tokens) out[token * p.s.group_rows + row] = v;
      };
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if constexpr (kInt8) {
            put(n * 4 + t, h * 8, 256.f * acci[n][2 * h] + acci[n][2 * h + 1]);
          } else {
            put(n * 8 + 2 * t, h * 8, accf[n][2 * h]);
            put(n * 8 + 2 * t + 1, h * 8, accf[n][2 * h + 1]);
          }
        }
    };

#pragma unroll
    for (int d = 0; d < kDepth; ++d) fetch(d, u0 + d * k_warps);
    if (piece.part != loaded_part) {
      fill_table();
      if (loaded_part < 0) grid_dependency_wait();
      loaded_part = piece.part;
      __syncthreads();
    }
    for (int base = u0; base < u_end; base += kDepth * k_warps) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const int u = base + d * k_warps;
        if (u >= u_end) break;
        const uint4 c = ring[d];
        fetch(d, u + kDepth * k_warps);
        multiply(u, c);
      }
    }
    if (active) write();
  });
}

}  // namespace aqlm
