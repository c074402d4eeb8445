// cuda.additive.lut: y = x W^T for one token from tables of partial dot products.
//
// Any B, nbits <= 8, G in {8, 16, 32}. For each step (4 vectors of x, one codebook) a CTA builds
// T[entry][vector] = <codebook entry, x vector> in float32 with one MMA per 16 entries, and then a
// weight vector of any row costs one 4-byte lookup and one add: a quarter of the shared-memory
// traffic of fetching the 16-byte entry itself.
//
//   T, one step (32 KB):  entry e: | row slot 0: v0 v1 v2 v3 | row slot 1: v0 .. v3 | ... slot 7 |
//                                    each lane (row slot, vector) reads its own bank: no conflicts
//   CTA: kWarps warps, each with kBlocks row blocks of 64 rows, all in registers (8 sums per lane
//        and block); the K units of the CTA are walked with two steps (64 KB) resident.
//
// Bytes per weight vector and codebook: 1 of codes, 4 of shared memory. Architectures sm_80+.
// H200, 2026-11-22, 2x8 g8 28672 x 8192: 30 us = 46 % of copy bandwidth; 4096 x 4096: 6.6 us.
#pragma once

#include "decode/additive.cuh"
#include "streamk.cuh"

namespace aqlm {

constexpr int kLutStepBytes = 256 * 128;  // 256 entries x 32 lanes x 4 bytes

// Units of codes in flight: what shared memory leaves beside the tables.
AQLM_HD constexpr int lut_ahead(int warps, int blocks) { return warps * blocks < 32 ? 4 : 2; }
AQLM_HD constexpr int lut_ring_bytes(int warps, int blocks) {
  return warps * blocks * lut_ahead(warps, blocks) * kUnitBytes;
}

// kStages = 2 builds the next unit's tables while the present ones are read. kG: the vector length
// when it is 8, else 0 (read at run time).
template <typename T, int kWarps, int kBlocks, int kStages, int kG>
__global__ void __launch_bounds__(kWarps * 32, kStages > 1 ? 1 : kBlocks < 4 ? 3 : 2)
lut_kernel(const __grid_constant__ MatmulParams p) {
  constexpr int kAhead = lut_ahead(kWarps, kBlocks);
  constexpr int kThreads = kWarps * 32, kItems = 32 / kWarps;  // 16-entry tiles of a unit per warp
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned char* ring = smem + 2 * kStages * kLutStepBytes;
  T* xs = reinterpret_cast<T*>(ring + lut_ring_bytes(kWarps, kBlocks));
  const Additive& a = p.a;
  const int B = a.codebooks, G = kG ? kG : a.in_group, entries = a.entries();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t lane_offset = lane * 4;
  uint32_t store_offset[4];  // of this lane's first entry, row slots r (t < 2) or 4 + r
#pragma unroll
  for (int r = 0; r < 4; ++r)
    store_offset[r] = (warp * 16 + g) * 128 + t / 2 * 64 + ((r + g) & 3) * 16 + t % 2 * 8;
  bool waited = false;
  grid_dependents_start();

  for_each_piece(a, p.s, [&](const Piece& piece) {
    const int u0 = piece.u0, u1 = piece.u1, kstep0 = 2 * u0 / B;
    const int values = ((2 * u1 - 1) / B - kstep0 + 1) * kStepVectors * G;
    const size_t unit_stride = size_t(p.s.tiles) * kUnitBytes;
    const uint8_t* packed = p.packed + u0 * unit_stride + size_t(piece.tile) * kUnitBytes;
    int next_book = 2 * u0 % B, next_x = 0;  // of the next step that build() makes
    uint32_t row_offset[kBlocks];
    float acc[kBlocks][8] = {};

    // This lane's 16 bytes of one unit and row block in the ring.
    auto slot = [&](int u, int j) {
      const int index = ((u - u0) % kAhead * kBlocks + j) * kWarps + warp;
      return reinterpret_cast<uint4*>(ring + index * kUnitBytes) + lane;
    };
    auto fetch = [&](int u) {
      if (u < u1)
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
          copy_async(slot(u, j), packed + (u - u0) * unit_stride + row_offset[j]);
      copy_commit();
    };
    // x of the piece's K range, zero past K.
    auto stage_x = [&] {
      const T* x = static_cast<const T*>(p.x) + kstep0 * kStepVectors * G;
      const int valid = a.in_features() - kstep0 * kStepVectors * G;
      for (int i = threadIdx.x; i < values; i += kThreads)
        xs[i] = i < valid ? x[i] : from_float<T>(0.f);
    };
    // Tiles of 16 entries x 4 vectors; MMA columns 4 .. 7 repeat 0 .. 3, so that lanes t >= 2 hold
    // what lanes t - 2 hold and store it to the other four row slots. Rotating the slot by the
    // entry keeps the stores of a half warp in different banks.
    auto build = [&](int stage) {
      const T* book = static_cast<const T*>(p.codebooks) + size_t(piece.part) * B * entries * G;
      const int book0 = next_book, x0 = next_x;
      auto advance = [&] {
        if (++next_book == B) {
          next_book = 0;
          next_x += kStepVectors * G;
        }
      };
      advance();
      float dot[kItems][4] = {};
#pragma unroll
      for (int i = 0; i < kItems; ++i) {  // tile `item % 16` of step `item / 16`
        const int item = warp + i * kWarps, e = item % 16 * 16 + g;
        const T* entry = book + ((item < 16 ? book0 : next_book) * entries + e) * G + 2 * t;
        const T* x = xs + (item < 16 ? x0 : next_x) + (g & 3) * G + 2 * t;
#pragma unroll 1
        for (int c = 0; c < G; c += 8) {
          const uint32_t lo = e < entries ? load_pair(entry + c) : 0;
          const uint32_t hi = e + 8 < entries ? load_pair(entry + c + 8 * G) : 0;
          mma_1688(dot[i], lo, hi, *reinterpret_cast<const uint32_t*>(x + c), T());
          if constexpr (kG == 8) break;
        }
      }
      advance();
#pragma unroll
      for (int i = 0; i < kItems; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          unsigned char* slot =
              smem + 2 * stage * kLutStepBytes + store_offset[r] + i * kWarps * 16 * 128;
          *reinterpret_cast<float2*>(slot) = make_float2(dot[i][0], dot[i][1]);
          *reinterpret_cast<float2*>(slot + 8 * 128) = make_float2(dot[i][2], dot[i][3]);
        }
    };
    auto lookup = [&](int j, int stage, uint4 c) {
      const uint32_t w[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const unsigned char* entry = smem + (2 * stage + i / 8) * kLutStepBytes +
                                     entry_offset<7>(w[i / 4], i & 3, lane_offset);
        acc[j][i & 7] += *reinterpret_cast<const float*>(entry);
      }
    };
    // Lanes of one row slot hold four vectors' sums; lane t keeps rows 2t and 2t + 1.
    auto write = [&] {
      float* out = slot_of(p, piece, 0);
#pragma unroll
      for (int j = 0; j < kBlocks; ++j)
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          float v = acc[j][r];
          v += __shfl_xor_sync(~0u, v, 1);
          v += __shfl_xor_sync(~0u, v, 2);
          if (r / 2 == t) out[(j * kWarps + warp) * kBlockRows + r * 8 + g] = v;
        }
    };

    // Warps past the part's last row block repeat it; the reduction skips their rows.
#pragma unroll
    for (int j = 0; j < kBlocks; ++j)
      row_offset[j] = min(j * kWarps + warp, piece.tiles - 1) * kUnitBytes + lane * 16;
#pragma unroll
    for (int i = 0; i < kAhead - 1; ++i) fetch(u0 + i);
    if (!waited) grid_dependency_wait();
    waited = true;
    stage_x();
    __syncthreads();
    if constexpr (kStages == 2) build(0);
    for (int u = u0; u < u1; ++u) {
      const int stage = kStages == 2 ? (u - u0) & 1 : 0;
      fetch(u + kAhead - 1);
      if constexpr (kStages == 1) build(0);
      __syncthreads();
      if (kStages == 2 && u + 1 < u1) build(stage ^ 1);
      copy_wait<kAhead - 1>();
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) lookup(j, stage, *slot(u, j));
      if constexpr (kStages == 1) __syncthreads();
    }
    write();
  });
}

}  // namespace aqlm
