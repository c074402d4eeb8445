// cuda.additive.wgmma_long: y = x W^T for more than 128 tokens on Hopper, 256 a pass.
//
// nbits <= 8, G = 8, B in {1, 2}. cuda.additive.wgmma decodes a weight for 128 tokens and is bound
// by shared memory, half of which are its lookups; here a weight is decoded for 256 tokens. The
// sums of 256 tokens leave each warp one MMA row tile: a CTA has 128 rows, and x (16 KB for 32
// columns) comes from L2 for each of them.
//
//   x image: x_image_kernel of cuda.additive.wgmma
//   warps 0 .. 7: MMAs of a quarter of a 64-row block each; warp 8: bulk copies
//
// Two codebooks are added in 16 bits (the rounding of a dequantized weight).
// H200, 2026-11-28, 28672 x 8192, 2x8: M = 256 191 us, 512 389 (fp16 189, 341); the tensor cores
// are busy 86 % of the kernel's time.
// Architecture sm_90a only.
#pragma once

#include "wgmma.cuh"

namespace aqlm {

constexpr int kLongTokens = 256;
constexpr int kLongWarps = 8;  // that multiply
constexpr int kLongCodes = kLongWarps / 4 * kUnitBytes;

AQLM_HD constexpr int long_x_bytes(int codebooks) {
  return wg_ksteps(codebooks) * kLongTokens * 64;
}
AQLM_HD constexpr int long_stage_bytes(int codebooks) {
  return long_x_bytes(codebooks) + kLongCodes;
}
AQLM_HD constexpr int long_stages(int codebooks) { return codebooks == 1 ? 5 : 9; }
AQLM_HD constexpr int long_smem(int codebooks) {
  return codebooks * kMmaBookBytes + long_stages(codebooks) * (long_stage_bytes(codebooks) + 16);
}

template <typename T, int B>
__global__ void __launch_bounds__((kLongWarps + 4) * 32, 1)
wgmma_long_kernel(const __grid_constant__ MatmulParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Traits = MmaTraits<T, false>;
  constexpr int kX = long_x_bytes(B), kStage = long_stage_bytes(B), kStages = long_stages(B);
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned char* const stages = smem + B * kMmaBookBytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(stages + kStages * kStage);
  uint64_t* const empty = full + kStages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) mbar::init_ring<kStages>(full, empty, kLongWarps);
  grid_dependents_start();
  __syncthreads();

  if (warp >= kLongWarps) {
    registers_down<24>();
    if (threadIdx.x != kLongWarps * 32) return;
    Ring<kStages> ring;
    int produced = 0;
    const size_t unit_stride = size_t(p.s.tiles) * kUnitBytes;
    grid_dependency_wait();
    for_own_pieces(p.a, p.s, [&](const Piece& piece) {
      const uint8_t* x = p.x_fragments + size_t(piece.u0) * kX +
                         size_t(piece.pass) * p.s.x_steps * kLongTokens * 64;
      const uint8_t* codes = p.packed + piece.u0 * unit_stride + size_t(piece.tile) * kUnitBytes;
      const int bytes = min(piece.tiles * kUnitBytes, kLongCodes);
      for (int u = piece.u0; u < piece.u1; ++u, ++produced, ring.advance()) {
        if (produced >= kStages) mbar::wait(empty + ring.stage, ring.phase ^ 1);
        unsigned char* const stage = stages + ring.stage * kStage;
        mbar::expect(full + ring.stage, kX + bytes);
        mbar::bulk_copy(stage + kX, codes, bytes, full + ring.stage);
        mbar::bulk_copy(stage, x, kX, full + ring.stage);
        x += kX;
        codes += unit_stride;
      }
    });
  } else {
    registers_up<240>();
    const int own = __shfl_sync(~0u, warp, 0);  // known to be uniform: see wgmma.cuh
    const int block = own / 4, quarter = own % 4;
    const uint32_t lane_offset = lane % 8 * 16, zero = uint32_t(p.tokens) >> 31;
    int loaded_part = -1;
    Ring<kStages> ring, ahead;  // of the unit that is multiplied; of the codes that are read
    for_own_pieces(p.a, p.s, [&](const Piece& piece) {
      const int count = piece.u1 - piece.u0;
      if (piece.part != loaded_part) {
        if (loaded_part >= 0) consumers_sync<kLongWarps * 32>();
        fill_books<T, B, false>(p, piece.part, smem, kLongWarps * 32);
        loaded_part = piece.part;
        consumers_sync<kLongWarps * 32>();
      }
      // Warps past the part's last row block repeat it; they write nothing.
      const uint32_t code_offset =
          kX + min(block, piece.tiles - 1) * kUnitBytes + lane * 16 + quarter * 2;
      float acc[kLongTokens / 2] = {};
      // Codes of rows g and g + 8 of the quarter in both halves of a unit (codebooks, or K steps).
      struct Codes {
        uint32_t half[2];
      };
      auto read_codes = [&] {
        mbar::wait(full + ahead.stage, ahead.phase);
        const unsigned char* from = stages + ahead.stage * kStage + code_offset;
        Codes c;
        c.half[0] = *reinterpret_cast<const uint16_t*>(from);
        c.half[1] = *reinterpret_cast<const uint16_t*>(from + 8);
        ahead.advance();
        return c;
      };
      auto lookup = [&](const Codes& c, uint4 (&e)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          e[i] = Traits::lookup(smem + (B == 2 ? i / 2 * kMmaBookBytes : 0) +
                                entry_offset<7>(c.half[i / 2], i % 2, lane_offset));
      };

      // The lookups of two further units are under way while this unit's MMAs are issued.
      uint32_t a[2][8 * wg_ksteps(B)];
      uint4 e[2][4];
      Codes c = read_codes();
      lookup(c, e[0]);
      if (count > 1) c = read_codes();
      lookup(c, e[1]);
      if (count > 2) c = read_codes();
      int released = ring.stage;
      auto step = [&](const int d, int i) {  // d: constant once inlined
        auto registers = [&](int k, uint4 lo, uint4 hi) {
          uint32_t* const r = a[d] + 8 * k;
          r[0] = lo.x, r[1] = hi.x, r[2] = lo.y, r[3] = hi.y;
          r[4] = lo.z, r[5] = hi.z, r[6] = lo.w, r[7] = hi.w;
        };
        if constexpr (B == 2) {
          registers(0, Traits::add(e[d][0], e[d][2]), Traits::add(e[d][1], e[d][3]));
        } else {
          // Plain copies would be moved to before the wait for the MMAs that read these registers
          // (benchmarks/ladder/cuda/mma_hazards.py); zero is not known to the compiler.
          auto computed = [&](uint4 v) {
            return make_uint4(v.x | zero, v.y | zero, v.z | zero, v.w | zero);
          };
          registers(0, computed(e[d][0]), computed(e[d][1]));
          registers(1, computed(e[d][2]), computed(e[d][3]));
        }
        lookup(c, e[d]);  // unit i + 2; past the end: dropped
        const uint64_t x = core_matrices(stages + ring.stage * kStage, kLongTokens * 16, 128);
        mma_fence();
#pragma unroll
        for (int k = 0; k < 2 * wg_ksteps(B); ++k)
          wgmma(acc, a[d] + 4 * k, x + (k * 2 * kLongTokens * 16 >> 4), T());
        mma_group_commit();
        if (i + 3 < count) c = read_codes();
        mma_groups_wait<1>();  // unit i - 1
        if (i > 0 && lane == 0) mbar::arrive(empty + released);
        released = ring.stage;
        ring.advance();
      };
      int i = 0;
      for (; i + 1 < count; i += 2) {
        step(0, i);
        step(1, i + 1);
      }
      if (i < count) step(0, i);
      mma_groups_wait<0>();
      if (lane == 0) mbar::arrive(empty + released);

      if (block >= piece.tiles) return;
      const int row = block * kBlockRows + quarter * 16;
      if (piece.item >= 0)
        put_partials<kLongTokens>(slot_of(p, piece, 0) + row + lane / 4, p.s.group_rows,
                                  min(kLongTokens, p.tokens - piece.pass * kLongTokens), acc);
      else store_rows<T, kLongTokens>(p, piece, row, acc);
    });
  }
#endif
}

}  // namespace aqlm
