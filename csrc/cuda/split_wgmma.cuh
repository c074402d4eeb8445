// cuda.additive.split_wgmma: cuda.additive.split for 9 .. 64 tokens a pass on Hopper.
//
// The same classes, tables and lookups (split.cuh); the activations are the B operand of a
// warpgroup MMA in shared memory, where 16 warps share them, instead of registers that every warp
// loads: the cost of a token is that of the MMA alone. 64 tokens in int8 are 128 columns (high and
// low bytes).
//
//   image of one class and unit (fragments.cuh): [half c][column][t = 0..3] words of 4 bytes
//     = vectors 4t + 2c and 4t + 2c + 1, the dimensions of the class
//
// Both copies of the table leave 18 KB for activations: a 17th warp (of a warpgroup that gives its
// registers away) copies them into a ring of stages; codes go to registers, four units ahead. A
// cell of the schedule is kChoiceUnits units.
// Architecture sm_90a only.
#pragma once

#include <type_traits>

#include "decode/additive.cuh"
#include "split.cuh"
#include "streamk.cuh"
#include "tune.h"
#include "wgmma_ptx.cuh"

namespace aqlm {

constexpr int kSplitWgWarps = tune::kSplitWgmmaRows / kTileRows;  // that multiply

// Stages of x: what shared memory has room for.
AQLM_HD constexpr int split_wg_stages(int columns) {
  return columns > 64 ? 4 : columns > 32 ? 8 : 12;
}
AQLM_HD constexpr int split_wg_smem(int nbits, int columns) {
  return tune::split_table_bytes(90, 1 << nbits) + split_wg_stages(columns) * (columns * 32 + 16);
}

template <typename T, int kTokens, bool kInt8>
__global__ void __launch_bounds__((kSplitWgWarps + 4) * 32, 1)
split_wgmma_kernel(const __grid_constant__ MatmulParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kColumns = kInt8 ? 2 * kTokens : kTokens, kX = kColumns * 32;
  constexpr int kStages = split_wg_stages(kColumns);
  constexpr int kRing = 4;  // units of codes in flight, in registers
  // Units whose lookups are under way, and whose MMAs; 128 columns leave few registers.
  constexpr int kLookups = kColumns <= 64 ? 2 : 1;
  constexpr bool kAhead = kLookups == 2;
  using Acc = std::conditional_t<kInt8, int, float>;
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned char* const stages = smem + tune::split_table_bytes(90, p.a.entries());
  uint64_t* const full = reinterpret_cast<uint64_t*>(stages + kStages * kX);
  uint64_t* const empty = full + kStages;
  const int lane = threadIdx.x % 32, dims = own_class(p.s);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) mbar::init_ring<kStages>(full, empty, kSplitWgWarps);
  grid_dependents_start();
  __syncthreads();

  if (warp >= kSplitWgWarps) {
    registers_down<24>();
    if (threadIdx.x != kSplitWgWarps * 32) return;
    const uint8_t* image = p.x_fragments + size_t(dims) * p.s.x_steps * kX;
    Ring<kStages> ring;
    int produced = 0;
    grid_dependency_wait();
    for_own_pieces(p.a, p.s, [&](const Piece& piece) {
      const int end = min(piece.u1 * kChoiceUnits, p.a.units());
      for (int u = piece.u0 * kChoiceUnits; u < end; ++u, ++produced, ring.advance()) {
        if (produced >= kStages) mbar::wait(empty + ring.stage, ring.phase ^ 1);
        mbar::expect(full + ring.stage, kX);
        mbar::bulk_copy(stages + ring.stage * kX, image + size_t(u) * kX, kX, full + ring.stage);
      }
    });
  } else {
    registers_up<112>();
    const int g = lane / 4, t = lane % 4;
    const uint32_t unit_stride = p.s.tiles * kUnitBytes;
    uint32_t table = smem_address(smem);
    keep(table);
    int loaded_part = -1;
    Ring<kStages> ring;
    for_own_pieces(p.a, p.s, [&](const Piece& piece) {
      // Warps past the part's last row tile repeat it; they write nothing.
      const int tile = piece.tile + min(warp, piece.tiles - 1), last = p.a.units() - 1;
      const int begin = piece.u0 * kChoiceUnits, end = min(piece.u1 * kChoiceUnits, last + 1);
      const uint8_t* codes = p.packed + size_t(tile) * kUnitBytes + lane * 16;
      const uint8_t* choices = p.packed + p.a.choice_offset(tile, 0) + lane * 4;
      keep(codes);
      keep(choices);
      uint4 c[kRing];  // codes of the next units
      auto fetch = [&](int r, int u) {  // past the end any codes
        c[r % kRing] = load_stream(codes + size_t(uint32_t(min(u, last))) * unit_stride);
      };
      auto fetch_choices = [&](int cell) {
        return load_stream_word(choices +
                                size_t(uint32_t(min(cell, piece.u1 - 1))) * (unit_stride / 4));
      };
#pragma unroll
      for (int r = 0; r < kRing; ++r) fetch(r, begin + r);
      uint32_t chosen = fetch_choices(piece.u0), chosen_next = fetch_choices(piece.u0 + 1);
      if (piece.part != loaded_part) {
        if (loaded_part >= 0) consumers_sync<kSplitWgWarps * 32>();
        const int bytes = p.a.entries() * 2;
        split_fill<kSplitWgWarps * 32>(
            smem, p.aux + kAuxHeader + size_t(piece.part * p.s.classes + dims) * bytes,
            p.a.entries(), true);
        loaded_part = piece.part;
        consumers_sync<kSplitWgWarps * 32>();
      }
      Acc acc[kColumns / 2] = {};
      uint32_t a[kLookups][4], e[kLookups][8];
      // Lookups of unit u, the next one (r = u % kChoiceUnits); its place takes another's codes.
      auto lookup = [&](uint32_t (&e)[8], const int r, int u) {
        const uint32_t top = second_copies(chosen >> 2 * r, 0);
        const uint32_t bottom = second_copies(chosen >> 2 * r, 1);
        const uint4 codes_now = c[r % kRing];
        const uint32_t w[4] = {codes_now.x, codes_now.z, codes_now.y, codes_now.w};
        uint32_t at[8];
#pragma unroll
        for (int j = 0; j < 8; ++j)
          at[j] = copy_offset(w[j / 2], j / 2 % 2 ? bottom : top, j / 4 * 2 + j % 2);
        fetch(r, u + kRing);
#pragma unroll
        for (int j = 0; j < 8; ++j) e[j] = load_entry(table + at[j]);
      };
      auto before = [&](int n) {  // stage of the unit n steps ago
        return ring.stage >= n ? ring.stage - n : ring.stage - n + kStages;
      };

      // The lookups of kLookups further units are under way while this unit's MMA is issued.
      lookup(e[0], 0, begin);
      if (kAhead && begin + 1 < end) lookup(e[kLookups - 1], 1, begin + 1);
      auto step = [&](const int r, int u) {  // r: u % kChoiceUnits, constant once inlined
        const int d = r % kLookups;
        if (kAhead) mma_groups_wait<1>();  // unit u - 2
        if (kAhead && u >= begin + 2 && lane == 0) mbar::arrive(empty + before(2));
#pragma unroll
        for (int j = 0; j < 4; ++j) a[d][j] = e[d][2 * j] | e[d][2 * j + 1] << 16;
        if (r == kChoiceUnits - kLookups) {  // the lookups are of the next cell from here on
          chosen = chosen_next;
          chosen_next = fetch_choices(u / kChoiceUnits + 2);
        }
        if (u + kLookups < end) lookup(e[d], (r + kLookups) % kChoiceUnits, u + kLookups);
        mbar::wait(full + ring.stage, ring.phase);
        const uint64_t x = core_matrices(stages + ring.stage * kX, kColumns * 16, 128);
        mma_fence();
        if constexpr (kInt8) wgmma(acc, a[d], x);
        else wgmma(acc, a[d], x, T());
        mma_group_commit();
        if (!kAhead) mma_groups_wait<0>();
        if (!kAhead && lane == 0) mbar::arrive(empty + ring.stage);
        ring.advance();
      };
      // Only the last cell may end early. (ptxas serializes MMAs unless one is in a branch.)
      int u = begin;
#pragma unroll 1
      for (; u + kChoiceUnits <= end; u += kChoiceUnits)
#pragma unroll
        for (int r = 0; r < kChoiceUnits; ++r) step(r, u + r);
#pragma unroll
      for (int r = 0; r < kChoiceUnits - 1; ++r)
        if (u + r < end) step(r, u + r);
      if (kAhead) mma_groups_wait<0>();
      if (kAhead && end - begin >= 2 && lane == 0) mbar::arrive(empty + before(2));
      if (kAhead && lane == 0) mbar::arrive(empty + before(1));

      if (warp >= piece.tiles) return;
      float* out = slot_of(p, piece, 0) + warp * kTileRows + g;
      auto put = [&](int token, int row, float v) {
        if (token < p.tokens) out[token * p.s.group_rows + row] = v;
      };
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto lo = acc[n * 4 + 2 * h], hi = acc[n * 4 + 2 * h + 1];
          if constexpr (kInt8) {
            put(n * 4 + t, h * 8, 256.f * lo + hi);
          } else {
            put(n * 8 + 2 * t, h * 8, lo);
            put(n * 8 + 2 * t + 1, h * 8, hi);
          }
        }
    });
  }
#endif
}

}  // namespace aqlm
