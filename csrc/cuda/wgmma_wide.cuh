// cuda.additive.wgmma_wide: y = x W^T for 8x8 g32 and 3 .. 128 tokens a pass on Hopper.
//
// Eight codebooks of 256 vectors of 32: a weight vector is the sum of eight entries of 64 bytes, 16
// bytes of shared memory for every weight (3.8 GB at 28672 x 8192, 118 us at the full rate), so
// what counts is that no lookup conflicts. The codebooks are split over two classes of CTAs; four
// of them fit twice:
//
//   entry: | copy 0: chunks 0 .. 3 of 16 bytes | copy 1: chunks 0 .. 3 |         128 bytes
//     Lookup j of lane (g, t) is chunk j ^ t of copy g % 2: a quarter warp reads all 32 banks.
//   K is permuted: a step is 4 vectors, lookup j is 8 columns of each, the A registers of two MMAs.
//
//   x image (x_wide_kernel), a step: [lookup j][pair c = 0..3][token][vector t = 0..3]
//     = elements 2c, 2c + 1 of chunk j ^ t of vector t
//   warps 0 .. 7: MMAs of a 64-row block each (128 tokens: of half); warp 8: copies (see wgmma.cuh)
//
// The four entries of a class are added in 16 bits, the two classes in the common reduction.
// H200, 2026-11-28, 28672 x 8192: M = 8 179 us, 32 185, 64 220 (80 % of the shared-memory rate).
// Architecture sm_90a only.
#pragma once

#include "decode/additive.cuh"
#include "mma.cuh"
#include "wgmma_ptx.cuh"

namespace aqlm {

constexpr int kWideBooks = 4;         // of a class
constexpr int kWideG = 32;
constexpr int kWideWgWarps = 8;       // that multiply
constexpr int kWideUnits = 2;         // of a step and class

// Bytes of a unit's codes for all warps: 128 tokens leave registers for half the rows of a block.
AQLM_HD constexpr int wide_codes(int tokens) {
  return tune::wide_group_rows(tokens) / kBlockRows * kUnitBytes;
}
AQLM_HD constexpr int wide_x_bytes(int tokens) { return tokens * kStepVectors * kWideG * 2; }
AQLM_HD constexpr int wide_stage_bytes(int tokens) {
  return wide_x_bytes(tokens) + kWideUnits * wide_codes(tokens);
}
AQLM_HD constexpr int wide_stages(int tokens) { return tokens > 64 ? 2 : tokens > 32 ? 4 : 6; }
AQLM_HD constexpr int wide_smem(int tokens) {
  return kWideBooks * kMmaBookBytes + wide_stages(tokens) * (wide_stage_bytes(tokens) + 16);
}

// Grid: (steps / 8, padded tokens / 32); one thread writes the words of a token and step, 16 bytes
// (a pair of each of 4 vectors) at a time.
template <typename T>
__global__ void __launch_bounds__(256)
x_wide_kernel(const __grid_constant__ MatmulParams p, int padded_tokens) {
  const int m = blockIdx.y * 32 + threadIdx.x % 32, step = blockIdx.x * 8 + threadIdx.x / 32;
  const int K = p.a.in_features(), columns = kStepVectors * kWideG;
  grid_dependents_start();
  grid_dependency_wait();
  if (step >= p.s.x_steps) return;
  const T* x = static_cast<const T*>(p.x) + m * p.x_stride + step * columns;
  uint4* out = reinterpret_cast<uint4*>(p.x_fragments) + size_t(step) * 16 * padded_tokens + m;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint4 v[4] = {};
#pragma unroll
    for (int t = 0; t < 4; ++t)
      if (m < p.tokens && step * columns + t * kWideG < K)
        v[t] = load_cached(x + t * kWideG + (j ^ t) * 8);
    out[(4 * j + 0) * padded_tokens] = make_uint4(v[0].x, v[1].x, v[2].x, v[3].x);
    out[(4 * j + 1) * padded_tokens] = make_uint4(v[0].y, v[1].y, v[2].y, v[3].y);
    out[(4 * j + 2) * padded_tokens] = make_uint4(v[0].z, v[1].z, v[2].z, v[3].z);
    out[(4 * j + 3) * padded_tokens] = make_uint4(v[0].w, v[1].w, v[2].w, v[3].w);
  }
}

// kTokens: columns of the MMA (32, 64 or 128).
template <typename T, int kTokens>
__global__ void __launch_bounds__((kWideWgWarps + 4) * 32, 1)
wgmma_wide_kernel(const __grid_constant__ MatmulParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Traits = MmaTraits<T, false>;
  constexpr int kX = wide_x_bytes(kTokens), kStage = wide_stage_bytes(kTokens);
  constexpr int kStages = wide_stages(kTokens);
  constexpr int kBlocks = tune::wide_group_rows(kTokens) / kBlockRows;
  constexpr int kPerBlock = kWideWgWarps / kBlocks, kCodes = wide_codes(kTokens);
  constexpr int kTiles = kBlockRows / 16 / kPerBlock, kLookups = 4;
  constexpr int kGroups = kTiles * kLookups * kWideUnits;
  // With two stages the next step's codes can only be read once the last step has been released.
  constexpr bool kLate = kStages == 2;
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned char* const stages = smem + kWideBooks * kMmaBookBytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(stages + kStages * kStage);
  uint64_t* const empty = full + kStages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, cls = own_class(p.s);
  if (threadIdx.x == 0) mbar::init_ring<kStages>(full, empty, kWideWgWarps);
  grid_dependents_start();
  __syncthreads();

  if (warp >= kWideWgWarps) {
    registers_down<24>();
    if (threadIdx.x != kWideWgWarps * 32) return;
    Ring<kStages> ring;
    int produced = 0;
    const size_t unit_stride = size_t(p.s.tiles) * kUnitBytes;
    grid_dependency_wait();
    for_own_pieces(p.a, p.s, [&](const Piece& piece) {
      const int bytes = min(piece.tiles * kUnitBytes, kCodes);
      for (int u = piece.u0; u < piece.u1; ++u, ++produced, ring.advance()) {
        if (produced >= kStages) mbar::wait(empty + ring.stage, ring.phase ^ 1);
        unsigned char* const stage = stages + ring.stage * kStage;
        const size_t unit = size_t(u) * kWideUnits * p.s.classes + cls * kWideUnits;
        const uint8_t* codes = p.packed + unit * unit_stride + size_t(piece.tile) * kUnitBytes;
        mbar::expect(full + ring.stage, kX + kWideUnits * bytes);
#pragma unroll
        for (int i = 0; i < kWideUnits; ++i)
          mbar::bulk_copy(stage + kX + i * kCodes, codes + i * unit_stride, bytes,
                          full + ring.stage);
        mbar::bulk_copy(stage, p.x_fragments + size_t(u) * kX, kX, full + ring.stage);
      }
    });
  } else {
    registers_up<240>();
    const int block = warp / kPerBlock, tile0 = warp % kPerBlock * kTiles;
    const int g = lane / 4, t = lane % 4;
    uint32_t lane_offset[kLookups];
#pragma unroll
    for (int j = 0; j < kLookups; ++j) lane_offset[j] = g % 2 * 64 + (j ^ t) * 16;
    int loaded_part = -1;
    Ring<kStages> ring, ahead;  // of the step that is multiplied; of the codes that are read
    for_own_pieces(p.a, p.s, [&](const Piece& piece) {
      const int count = piece.u1 - piece.u0;
      if (piece.part != loaded_part) {
        if (loaded_part >= 0) consumers_sync<kWideWgWarps * 32>();
        const int entries = p.a.entries();
        for (int i = threadIdx.x; i < kWideBooks * 256 * 4; i += kWideWgWarps * 32) {
          const int e = i / 4 % 256, book = i / 1024;
          const size_t index =
              (size_t(piece.part * p.s.classes + cls) * kWideBooks + book) * entries + e;
          uint4 v = make_uint4(0, 0, 0, 0);
          if (e < entries) v = static_cast<const uint4*>(p.codebooks)[index * 4 + i % 4];
          uint4* const to = reinterpret_cast<uint4*>(smem) + (book * 256 + e) * 8 + i % 4;
          to[0] = v;
          to[4] = v;
        }
        loaded_part = piece.part;
        consumers_sync<kWideWgWarps * 32>();
      }
      // Warps past the part's last row block repeat it; they write nothing.
      const uint32_t code_offset = kX + min(block, piece.tiles - 1) * kUnitBytes + lane * 16;
      float acc[kTiles][kTokens / 2] = {};
      struct Codes {
        uint4 unit[kWideUnits];
      };
      auto read_codes = [&] {
        mbar::wait(full + ahead.stage, ahead.phase);
        const unsigned char* from = stages + ahead.stage * kStage + code_offset;
        Codes c;
#pragma unroll
        for (int i = 0; i < kWideUnits; ++i)
          c.unit[i] = *reinterpret_cast<const uint4*>(from + i * kCodes);
        ahead.advance();
        return c;
      };
      // Group n of a step: MMA row tile n / 8, lookup n / 2 % 4, two of the codebooks.
      auto lookup = [&](int n, const Codes& codes, uint4 (&e)[4]) {
        const int m = n / (kLookups * kWideUnits), j = n / kWideUnits % kLookups;
        const uint4 c = codes.unit[n % kWideUnits];
        const unsigned char* book = smem + n % kWideUnits * 2 * kMmaBookBytes;
        const bool upper = kPerBlock == 1 ? m > 1 : tile0 > 0;
        const uint32_t w[2] = {upper ? c.y : c.x, upper ? c.w : c.z};
#pragma unroll
        for (int i = 0; i < 4; ++i)
          e[i] = Traits::lookup(book + i / 2 * kMmaBookBytes +
                                entry_offset<7>(w[i / 2], m % 2 * 2 + i % 2, lane_offset[j]));
      };

      // The lookups of two further groups are under way while this group's MMAs are issued.
      uint32_t a[2][8];
      uint4 e[2][4];
      Codes c = read_codes(), next = c;
      if (!kLate && count > 1) next = read_codes();
      lookup(0, c, e[0]);
      lookup(1, c, e[1]);
      int released = ring.stage;
      for (int i = 0; i < count; ++i) {
        const uint64_t x = core_matrices(stages + ring.stage * kStage, kTokens * 16, 128);
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
          const int m = n / (kLookups * kWideUnits), j = n / kWideUnits % kLookups;
          const bool first = n % kWideUnits == 0;
          if (first) mma_groups_wait<1>();
          if (n == kWideUnits && i > 0 && lane == 0) mbar::arrive(empty + released);
          uint4 lo = Traits::add(e[n % 2][0], e[n % 2][2]);
          uint4 hi = Traits::add(e[n % 2][1], e[n % 2][3]);
          uint32_t(&r)[8] = a[j % 2];
          if (!first) {
            lo = Traits::add(lo, make_uint4(r[0], r[2], r[4], r[6]));
            hi = Traits::add(hi, make_uint4(r[1], r[3], r[5], r[7]));
          }
          r[0] = lo.x, r[1] = hi.x, r[2] = lo.y, r[3] = hi.y;
          r[4] = lo.z, r[5] = hi.z, r[6] = lo.w, r[7] = hi.w;
          if (kLate && n == kGroups - 3 && i + 1 < count) next = read_codes();
          if (n + 2 < kGroups) lookup(n + 2, c, e[n % 2]);
          else lookup(n + 2 - kGroups, next, e[n % 2]);  // past the end: dropped
          if (first) continue;
          mma_fence();
          const uint64_t at = x + (j * 4 * kTokens * 16 >> 4);
          wgmma(acc[m], r, at, T());
          wgmma(acc[m], r + 4, at + (2 * kTokens * 16 >> 4), T());
          mma_group_commit();
        }
        released = ring.stage;
        ring.advance();
        c = next;
        if (!kLate && i + 2 < count) next = read_codes();
      }
      mma_groups_wait<0>();
      if (lane == 0) mbar::arrive(empty + released);

      if (block >= piece.tiles) return;
      float* out = slot_of(p, piece, 0) + block * kBlockRows + tile0 * 16 + g;
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int token = n * 8 + 2 * t + i % 2;
            if (token < p.tokens)
              out[token * p.s.group_rows + m * 16 + i / 2 * 8] = acc[m][n * 4 + i];
          }
    });
  }
#endif
}

}  // namespace aqlm
