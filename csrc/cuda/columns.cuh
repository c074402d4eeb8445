// cuda.additive.columns: y = x W^T for one token from tables of partial dot products.
//
// nbits <= 8, G = 8, B in {1, 2, 4}: the idea of cuda.additive.lut (any format, eight copies of
// each table) with one copy. A step is 32 columns = 8 (4 vectors, codebook) pairs. A CTA builds
// T[entry][column] = <codebook entry, x vector> in float32 with MMAs, and then a weight vector of
// any row costs one 4-byte lookup and one add.
//
//   T: entry e: | stage 0: columns 0 .. 31 | stage 1: columns 0 .. 31 |     256 bytes, 64 KB in all
//      Lane l of every warp looks up column l only, so each lane has a bank of its own: no
//      conflicts and no replicas. One PRMT makes the offset: byte 0 lane and stage, byte 1 code.
//   CTA: 8 warps of 64 rows; a lane holds the sums of all rows of its warp over its columns.
//      The lanes are added once per row group, by shuffles.
//   Codes: bulk copies into a ring of steps; the warps issue them in turn, because every warp waits
//      for the slowest one (an issuer of its own doubled that one's instructions).
//
// In the middle of step k every warp builds its share of table k + 1, so that neither waiting for
// tables (`ready`) nor for their readers (`read`) keeps a warp unless it is half a step ahead.
// CTAs cut the K range evenly (streamk.cuh); reduce.cuh adds their partial sums.
//
// Bytes per weight vector and codebook: 1 of codes, 4 of shared memory. Architectures sm_90+.
// H200, 2026-11-28, 2x8 g8: 28672 x 8192 24.0 us, 14336 x 4096 10.7 (lut: 30, 13.2).
#pragma once

#include "decode/additive.cuh"
#include "mbarrier.cuh"
#include "streamk.cuh"
#include "tune.h"

namespace aqlm {

constexpr int kColumnPitch = 2 * 32 * 4;  // bytes of an entry
constexpr int kColumnTableBytes = 256 * kColumnPitch;
constexpr int kColumnWarps = 8;
static_assert(tune::kColumnRows == kColumnWarps * kBlockRows);
constexpr int kColumnStepUnits = 4;  // packed units of one step
constexpr int kColumnUnitBytes = kColumnWarps * kUnitBytes;
constexpr int kColumnStages = 3;  // steps of codes in flight: two CTAs share an SM
// Two of the four units of a step lie 64 bytes further, in other banks.
constexpr int kColumnStageBytes = kColumnStepUnits * kColumnUnitBytes + 64;
constexpr int kColumnSmem =
    kColumnTableBytes + kColumnStages * kColumnStageBytes + (kColumnStages + 4) * 8;

// Shared memory starts here in a block's window (the runtime keeps what lies below), so that the
// address of a lookup is this constant plus 16 bits that one PRMT puts together.
constexpr uint32_t kColumnTableAt = 1024;

// Entry of the table at 16 bits of offset (and the bits above 16 of the window).
__device__ __forceinline__ float column_entry(uint32_t at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1 + 1024];" : "=f"(v) : "r"(at));
  return v;
}

// kBooks: B; a warp's codebook entries stay in registers. kCtas: of an SM.
template <typename T, int kBooks, int kCtas>
__global__ void __launch_bounds__(kColumnWarps * 32, kCtas)
columns_kernel(const __grid_constant__ MatmulParams p) {
#if __CUDA_ARCH__ >= 900
  constexpr int kWarps = kColumnWarps, kGroupRows = tune::kColumnRows, kStages = kColumnStages;
  constexpr int kTiles = 16 / kWarps;  // of 16 entries that a warp computes
  constexpr int kStage = kColumnStageBytes, kUnitStride = kColumnUnitBytes;
  constexpr int kX = 4 / kBooks;  // distinct x fragments of a step
  constexpr int kXStep = 32 / kBooks * 8;  // elements of x in a step
  extern __shared__ __align__(1024) unsigned char smem[];
  const Additive& a = p.a;
  const Schedule& s = p.s;
  const int entries = a.entries(), K = a.in_features();
  unsigned char* const ring = smem + kColumnTableBytes;
  uint64_t* const ready = reinterpret_cast<uint64_t*>(ring + kStages * kStage);  // tables
  uint64_t* const read = ready + 2;  // by all warps
  uint64_t* const full = ready + 4;  // codes of a stage
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // Column of this lane: unit q of the step, vector v and half h of the unit (see `dot`).
  const int q = lane >> 4 | (lane >> 2 & 2), v = (lane >> 1 & 2) | (lane & 1), h = lane >> 1 & 1;
  const int code_offset = q * kUnitStride + q / 2 * 64 + v * 16 + h * 8;
  const int first = blockIdx.x * s.cells / s.ctas;
  const int end = (blockIdx.x + 1) * s.cells / s.ctas;
  if ((smem_address(smem) & 0xffff) != kColumnTableAt) __trap();

  if (threadIdx.x < 4 + kStages)
    mbar::init(ready + threadIdx.x, threadIdx.x < 4 ? kWarps * mbar::kWarpArrivals : 1);
  mbar::init_fence();
  __syncthreads();
  grid_dependents_start();

  // By one warp: codes of the CTA's n-th cell. Units past the matrix have no x: nothing is copied.
  auto fetch = [&](int n) {
    const int cell = first + n;
    if (cell >= end) return;
    const int item = cell / s.units, u = (cell - item * s.units) * kColumnStepUnits;
    int group = item, tile = 0, rows = a.rows_of(0);
    for (int part = 0; group << s.group_shift >= rows;) {
      group -= (rows + kGroupRows - 1) / kGroupRows;
      tile += (rows + kBlockRows - 1) / kBlockRows;
      rows = a.rows_of(++part);
    }
    if (lane != 0) return;
    const int stage = n % kStages, units = min(kColumnStepUnits, a.units() - u);
    const int blocks = (rows - group * kGroupRows + kBlockRows - 1) / kBlockRows;
    const uint32_t bytes = min(blocks, kWarps) * kUnitBytes;
    const uint8_t* from = p.packed + (size_t(u) * s.tiles + tile + group * kWarps) * kUnitBytes;
    mbar::expect(full + stage, units * bytes);
#pragma unroll
    for (int i = 0; i < kColumnStepUnits; ++i, from += size_t(s.tiles) * kUnitBytes)
      if (i < units)
        mbar::bulk_copy(ring + stage * kStage + i * kUnitStride + i / 2 * 64, from, bytes,
                        full + stage);
  };
  if (warp < kStages) fetch(warp);

  int begin = first, k = 0, stage = 0, stage_parity = 0, loaded_part = -1;
  uint32_t column = (smem_address(smem) & 0xffff0000) | lane * 4;  // of the table that is read
  uint32_t entry[kTiles * kBooks][2];
  while (begin < end) {
    Piece piece;
    locate(a, s, begin, end, &piece);
    const int count = piece.u1 - piece.u0;
    begin += count;
    const T* books = static_cast<const T*>(p.codebooks) + size_t(piece.part) * kBooks * entries * 8;
    float acc[kBlockRows] = {};  // [row / 8][row % 8]
    uint32_t x[2][kX];  // of steps i and i + 1: copying one to the other would wait for its load

    // x of a step as B fragments: MMA n has columns c = 0..7 = half step n + 4 (c / 4), vector
    // c % 4. `at`: the lane's element of the next step; it may lie past the piece.
    int at = piece.u0 * kXStep + (g / 4 * (16 / kBooks) + g % 4) * 8 + 2 * t;
    auto load_x = [&](uint32_t (&to)[kX]) {
#pragma unroll
      for (int m = 0; m < kX; ++m)
        to[m] = at + m * 32 < K ? load_word(static_cast<const T*>(p.x) + at + m * 32) : 0;
      at += kXStep;
    };
    // Table of the next step. Column (n, c) of its four MMAs is bank
    // (n / 2) * 16 + (c / 2) * 4 + n % 2 * 2 + c % 2, the lane that looks it up. Rows alternate
    // between the halves of the columns, so that a quarter warp fills all banks.
    auto build = [&](int table, uint32_t (&xf)[kX]) {
      const bool odd = g % 2;
      unsigned char* const to = smem + (warp * 16 + g) * kColumnPitch + table * 128 + t * 16;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float c[4][4] = {};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint32_t(&e)[2] = entry[tile * kBooks + n % kBooks];
          mma_1688(c[n], e[0], e[1], xf[n / kBooks], T());
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float4 lo = make_float4(c[0][2 * h], c[0][2 * h + 1], c[1][2 * h], c[1][2 * h + 1]);
          const float4 hi = make_float4(c[2][2 * h], c[2][2 * h + 1], c[3][2 * h], c[3][2 * h + 1]);
          unsigned char* const row = to + (tile * kWarps * 16 + h * 8) * kColumnPitch;
          *reinterpret_cast<float4*>(row + (odd ? 64 : 0)) = odd ? hi : lo;
          *reinterpret_cast<float4*>(row + (odd ? 0 : 64)) = odd ? lo : hi;
        }
      }
      load_x(xf);  // of the step after the next
      mbar::arrive_warp(ready + table);
    };

    if (piece.part != loaded_part) {
      loaded_part = piece.part;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int b = 0; b < kBooks; ++b) {
          const int e = (warp + tile * kWarps) * 16 + g;
          const T* from = books + (b * entries + e) * 8 + 2 * t;
          entry[tile * kBooks + b][0] = e < entries ? load_early(from) : 0;
          entry[tile * kBooks + b][1] = e + 8 < entries ? load_early(from + 64) : 0;
        }
    }
    if (k == 0) grid_dependency_wait();
    load_x(x[0]);
    load_x(x[1]);
    build(k & 1, x[0]);
    // Warps past the part's last row block repeat it; nobody reads their sums.
    const unsigned char* const my_codes =
        ring + code_offset + min(warp, piece.tiles - 1) * kUnitBytes;
    auto step = [&](bool more, uint32_t (&next_x)[kX]) {
      const int table = k & 1;
      mbar::wait(ready + table, k >> 1 & 1);
      mbar::wait(full + stage, stage_parity);
      const unsigned char* const codes = my_codes + stage * kStage;
      auto lookup = [&](int r) {
        const uint2 c = *reinterpret_cast<const uint2*>(codes + r * 64);
#pragma unroll
        for (int j = 0; j < 8; ++j)
          acc[j * 8 + r] +=
              column_entry(__byte_perm(j < 4 ? c.x : c.y, column, 0x7604 | j % 4 << 4));
      };
#pragma unroll
      for (int r = 0; r < 4; ++r) lookup(r);
      if (k > 0) mbar::wait(read + (table ^ 1), (k - 1) >> 1 & 1);
      if (more) build(table ^ 1, next_x);
      if (k > 0 && k % kWarps == warp) fetch(k - 1 + kStages);  // into the last step's stage
#pragma unroll
      for (int r = 4; r < 8; ++r) lookup(r);
      mbar::arrive_warp(read + table);
      column ^= 128;
      ++k;
      if (++stage == kStages) {
        stage = 0;
        stage_parity ^= 1;
      }
    };
#pragma unroll 1
    for (int i = 0; i < count; i += 2) {
      step(i + 1 < count, x[1]);
      if (i + 1 < count) step(i + 2 < count, x[0]);
    }
    // Each exchange halves the rows that a lane holds; lane l ends with rows 2l and 2l + 1.
#pragma unroll
    for (int d = 16, n = 32; d > 0; d /= 2, n /= 2) {
      const bool upper = lane & d;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        if (i >= n) break;
        const float send = upper ? acc[i] : acc[i + n];
        acc[i] = (upper ? acc[i + n] : acc[i]) + __shfl_xor_sync(~0u, send, d);
      }
    }
    float* out = slot_of(p, piece, 0) + warp * kBlockRows + 2 * lane;
    out[0] = acc[0];
    out[1] = acc[1];
  }
#endif
}

}  // namespace aqlm
