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
//   CTA: kWarps warps of 64 rows; a lane holds the sums of all rows of its warp over its columns.
//      The lanes are added once per row group, by shuffles.
//   Codes: bulk copies into a ring of steps.
//
// In the middle of step k every warp builds its share of table k + 1, so that neither waiting for
// tables (`ready`) nor for their readers (`read`) keeps a warp unless it is half a step ahead.
// CTAs cut the K range evenly (streamk.cuh); reduce.cuh adds their partial sums.
//
// Bytes per weight vector and codebook: 1 of codes, 4 of shared memory. Architectures sm_90+.
// H200, 2026-11-22, 2x8 g8: 4096 x 4096 5.1 us, 14336 x 4096 10.4 (lut: 6.6, 13.1).
#pragma once

#include "decode/additive.cuh"
#include "mbarrier.cuh"
#include "streamk.cuh"

namespace aqlm {

constexpr int kColumnPitch = 2 * 32 * 4;  // bytes of an entry
constexpr int kColumnTableBytes = 256 * kColumnPitch;
constexpr int kColumnStepUnits = 4;  // packed units of one step
constexpr int kColumnStages = 3;     // steps of codes in flight

// Two of the four units of a step lie 64 bytes further, in other banks.
AQLM_HD constexpr int columns_stage_bytes(int rows) { return kColumnStepUnits * rows * 8 + 64; }
AQLM_HD constexpr int columns_smem(int rows) {
  return kColumnTableBytes + kColumnStages * columns_stage_bytes(rows) + (kColumnStages + 4) * 8;
}

// kBooks: B; a warp's codebook entries stay in registers.
template <typename T, int kWarps, int kBooks>
__global__ void __launch_bounds__(kWarps * 32, 1)
columns_kernel(const __grid_constant__ MatmulParams p) {
#if __CUDA_ARCH__ >= 900
  constexpr int kTiles = 16 / kWarps;  // of 16 entries that a warp computes
  constexpr int kGroupRows = kWarps * kBlockRows;
  constexpr int kStage = columns_stage_bytes(kGroupRows), kUnitStride = kGroupRows * 8;
  constexpr int kX = 4 / kBooks;  // distinct x fragments of a step
  constexpr bool kAhead = kBooks < 4;  // x is loaded two steps ahead, else one: registers
  extern __shared__ __align__(1024) unsigned char smem[];
  const Additive& a = p.a;
  const Schedule& s = p.s;
  const int entries = a.entries(), last_unit = a.units() - 1;
  unsigned char* const ring = smem + kColumnTableBytes;
  uint64_t* const ready = reinterpret_cast<uint64_t*>(ring + kColumnStages * kStage);  // tables
  uint64_t* const read = ready + 2;  // by all warps
  uint64_t* const full = ready + 4;  // codes of a stage
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // Column of this lane: unit q of the step, vector v and half h of the unit (see `dot`).
  const int q = lane >> 4 | (lane >> 2 & 2), v = (lane >> 1 & 2) | (lane & 1), h = lane >> 1 & 1;
  const int code_offset = q * kUnitStride + q / 2 * 64 + v * 16 + h * 8;
  int begin = blockIdx.x * s.cells / s.ctas;
  const int end = (blockIdx.x + 1) * s.cells / s.ctas;

  if (threadIdx.x < 4 + kColumnStages)
    mbar::init(ready + threadIdx.x, threadIdx.x < 4 ? kWarps : 1);
  mbar::init_fence();
  __syncthreads();
  grid_dependents_start();

  // By thread 0: codes of the next cell that is not in the ring; its step is u.
  int fetch_cell = begin, fetch_stage = 0, u = 0, bytes = 0;
  const uint8_t* codes_of_group = nullptr;
  auto fetch = [&] {
    if (fetch_cell == end) return;
    if (codes_of_group == nullptr || ++u == s.units) {
      const int item = fetch_cell / s.units;
      Piece group;
      locate_group(a, s, item, &group);
      u = fetch_cell - item * s.units;
      bytes = min(group.tiles * kUnitBytes, kUnitStride);
      codes_of_group = p.packed + size_t(group.tile) * kUnitBytes;
    }
    unsigned char* to = ring + fetch_stage * kStage;
    mbar::expect(full + fetch_stage, kColumnStepUnits * bytes);
#pragma unroll
    for (int i = 0; i < kColumnStepUnits; ++i) {
      const size_t unit = min(u * kColumnStepUnits + i, last_unit);
      mbar::bulk_copy(to + i * kUnitStride + i / 2 * 64,
                      codes_of_group + unit * s.tiles * kUnitBytes, bytes, full + fetch_stage);
    }
    ++fetch_cell;
    if (++fetch_stage == kColumnStages) fetch_stage = 0;
  };
  if (threadIdx.x == 0)
#pragma unroll 1
    for (int i = 0; i < kColumnStages; ++i) fetch();

  int k = 0, stage = 0, stage_parity = 0, loaded_part = -1;
  uint32_t entry[kTiles * kBooks][2];
  while (begin < end) {
    Piece piece;
    locate(a, s, begin, end, &piece);
    const int count = piece.u1 - piece.u0;
    begin += count;
    const T* books = static_cast<const T*>(p.codebooks) + size_t(piece.part) * kBooks * entries * 8;
    float acc[kBlockRows] = {};  // [row / 8][row % 8]
    uint32_t xf[kX] = {}, xn[kX] = {};

    // x of step i as B fragments: MMA n has columns c = 0..7 = half step n + 4 (c / 4),
    // vector c % 4.
    auto load_x = [&](int i, uint32_t (&to)[kX]) {
#pragma unroll
      for (int m = 0; m < kX; ++m) {
        const int step = (piece.u0 + i) * 8 + m * kBooks + g / 4 * 4;
        const int vector = step / kBooks * 4 + g % 4;
        to[m] = 0;
        if (i < count && vector < a.in_groups)
          to[m] = load_word(static_cast<const T*>(p.x) + vector * 8 + 2 * t);
      }
    };
    // Table of step i. Column (n, c) of its four MMAs is bank
    // (n / 2) * 16 + (c / 2) * 4 + n % 2 * 2 + c % 2, the lane that looks it up. Rows alternate
    // between the halves of the columns, so that a quarter warp fills all banks.
    auto build = [&](int i, int table) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float c[4][4] = {};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint32_t(&e)[2] = entry[tile * kBooks + n % kBooks];
          mma_1688(c[n], e[0], e[1], xf[n / kBooks], T());
        }
        unsigned char* to =
            smem + ((warp + tile * kWarps) * 16 + g) * kColumnPitch + table * 128 + t * 16;
        const bool odd = g % 2;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float4 lo = make_float4(c[0][2 * h], c[0][2 * h + 1], c[1][2 * h], c[1][2 * h + 1]);
          const float4 hi = make_float4(c[2][2 * h], c[2][2 * h + 1], c[3][2 * h], c[3][2 * h + 1]);
          unsigned char* row = to + h * 8 * kColumnPitch;
          *reinterpret_cast<float4*>(row + (odd ? 64 : 0)) = odd ? hi : lo;
          *reinterpret_cast<float4*>(row + (odd ? 0 : 64)) = odd ? lo : hi;
        }
      }
      if constexpr (kAhead) {
#pragma unroll
        for (int m = 0; m < kX; ++m) xf[m] = xn[m];
        load_x(i + 2, xn);
      } else {
        load_x(i + 1, xf);
      }
      __syncwarp();
      if (lane == 0) mbar::arrive(ready + table);
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
    load_x(0, xf);
    if constexpr (kAhead) load_x(1, xn);
    build(0, k & 1);
    for (int i = 0; i < count; ++i, ++k) {
      const int table = k & 1;
      mbar::wait(ready + table, k >> 1 & 1);
      mbar::wait(full + stage, stage_parity);
      // Warps past the part's last row block repeat it; nobody reads their sums.
      const unsigned char* codes =
          ring + stage * kStage + code_offset + min(warp, piece.tiles - 1) * kUnitBytes;
      const uint32_t column = lane * 4 + table * 128;
      auto lookup = [&](int r) {
        const uint2 c = *reinterpret_cast<const uint2*>(codes + r * 64);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t at = __byte_perm(j < 4 ? c.x : c.y, column, 0x5504 | j % 4 << 4);
          acc[j * 8 + r] += *reinterpret_cast<const float*>(smem + at);
        }
      };
#pragma unroll
      for (int r = 0; r < 4; ++r) lookup(r);
      if (k > 0) mbar::wait(read + (table ^ 1), (k - 1) >> 1 & 1);
      if (i + 1 < count) build(i + 1, table ^ 1);
      if (k > 0 && threadIdx.x == 0) fetch();  // into the stage of step k - 1
#pragma unroll
      for (int r = 4; r < 8; ++r) lookup(r);
      __syncwarp();
      if (lane == 0) mbar::arrive(read + table);
      if (++stage == kColumnStages) {
        stage = 0;
        stage_parity ^= 1;
      }
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
