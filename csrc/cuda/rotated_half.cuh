// Scalar weights with float16 scale groups times 5 .. 64 float16 tokens, on Hopper.
//
// (q - zero) * scale is rounded to float16 in registers, as the dequantized path rounds it, and is
// the A operand of a float16 warpgroup MMA with float32 accumulators: a scale group ends with
// nothing to do. The int8 body (rotated_wgmma.cuh) spends 142 of 340 instructions there.
//
// A warp has 32 rows and walks cells of 64 columns, kCells a step; four warps share B. A lane has
// columns 16 f + 4 t + j of rows g + 8 r, so that its operands are pairs (j = 0, 2) and (1, 3): the
// staged activations have the even columns of 16 before the odd ones.
//
//   codes, scales and zeros   rings of the warp's own (cp.async)
//   x                         bulk copies by thread 0 into a ring that all warps read
//
// Architecture sm_90a only.
#pragma once

#include "rotated_codes.cuh"
#include "rotated_rings.cuh"
#include "rotated_rows.cuh"
#include "rotated_scales.cuh"
#include "rotated_stage.cuh"
#include "rotated_tune.h"
#include "wgmma_ptx.cuh"

namespace aqlm {

// x as the MMAs read it: [cell][8 pairs of f and parity][token][8 columns]. Grid: (cells / 64,
// tokens), a thread for 16 columns.
constexpr int kHalfStageThreads = 256;
template <int kTokens>
__global__ void __launch_bounds__(kHalfStageThreads)
stage_half_kernel(const __grid_constant__ RotatedMatmul p) {
  const int item = blockIdx.x * kHalfStageThreads + threadIdx.x, token = blockIdx.y;
  const int cell = item / 4, f = item % 4;
  grid_dependents_start();
  grid_dependency_wait();
  if (cell >= p.s.units * p.s.cells) return;
  const int k = cell * kCellColumns + f * 16;
  const long long at = token * p.x_stride + k;
  const uint4 a = load_eight_raw(p, at, p.w.K - k), b = load_eight_raw(p, at + 8, p.w.K - k - 8);
  uint4* const to = reinterpret_cast<uint4*>(p.x_cells) + (cell * 8 + 2 * f) * kTokens + token;
  to[0] = make_uint4(__byte_perm(a.x, a.y, 0x5410), __byte_perm(a.z, a.w, 0x5410),
                     __byte_perm(b.x, b.y, 0x5410), __byte_perm(b.z, b.w, 0x5410));
  to[kTokens] = make_uint4(__byte_perm(a.x, a.y, 0x7632), __byte_perm(a.z, a.w, 0x7632),
                           __byte_perm(b.x, b.y, 0x7632), __byte_perm(b.z, b.w, 0x7632));
}

__device__ __forceinline__ uint32_t half_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ uint32_t half_add(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ uint32_t half_mul(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// (a & mask) ^ c
__device__ __forceinline__ uint32_t and_xor(uint32_t a, uint32_t mask, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(d) : "r"(a), "r"(mask), "r"(c));
  return d;
}
// Two of the float16 that 2^n is; of 2^10 + 2^n * q, q in the bits from n on: q.
template <int n>
constexpr uint32_t kPower2 = uint32_t(15 + n) << 10 | uint32_t(15 + n) << 26;
template <int n>
__device__ __forceinline__ uint32_t field_value(uint32_t v) {
  if constexpr (n == 0) return half_add(v, kPower2<10> | 0x80008000u);
  else return half_fma(v, kPower2<-n>, kPower2<10 - n> | 0x80008000u);
}

// q of columns 16 f + 4 t + j and j + 2 (j = 0: bytes 0 and 2; `odd`: 1 and 3) of row g + 8 r.
template <int kBits, int f>
__device__ __forceinline__ uint32_t half_codes(const ScalarCodes<kBits>& c, int r, bool odd) {
  const uint32_t word = word_of(c.a[kBits == 8 ? f : kBits == 4 ? f / 2 : 0], r);
  const uint32_t w = odd ? word >> 8 : word;
  if constexpr (kBits == 8) {
    return field_value<0>(and_xor(w, 0x00ff00ffu, 0x64006400u ^ 0x00800080u));
  } else if constexpr (kBits == 4) {
    constexpr int n = f % 2 * 4;
    return field_value<n>(and_xor(w, 0x000f000fu << n, 0x64006400u ^ 0x00080008u << n));
  } else {
    constexpr int n = 2 * f;
    const uint32_t high = and_xor(w, 0x00030003u << n, 0x64006400u ^ 0x00020002u << n);
    if constexpr (kBits == 2) return field_value<n>(high);
    // 2 * field + low bit; the bit's place depends on r, so it is moved to bit 0.
    const uint32_t low = (r < 2 ? c.b.x : c.b.y) >> (f + 4 * (r % 2) + (odd ? 8 : 0));
    const uint32_t bit = half_add(and_or(low, 0x00010001u, 0x64006400u), kPower2<10> | 0x80008000u);
    return half_fma(field_value<n>(high), kPower2<1>, bit);
  }
}

template <int kBits, int kTiles, int kCells>
__global__ void __launch_bounds__(tune::rotated_half_warps(kTiles) * 32, 1)
rotated_half_kernel(const __grid_constant__ RotatedMatmul p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kWarps = tune::rotated_half_warps(kTiles), kTokens = 4 * kTiles;
  constexpr int kStages = tune::kHalfStages, kDepth = tune::rotated_half_depth(kBits);
  constexpr int kCodes = kCellRows * kCellColumns / 8 * kBits;
  constexpr int kX = kCellColumns * kTokens * 2, kStage = kCells * kX;
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned char* const code_space = smem;
  unsigned char* const cells = code_space + kWarps * kDepth * kCells * kCodes;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, which the compiler cannot see
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const RotatedSchedule& s = p.s;
  const int units = s.units, blocks = p.w.blocks(), tokens = p.tokens;  // units: steps
  const BlockShare share(s);
  const int count = share.count, unit0 = share.unit0;
  StageRing<kStages, kStage, 0> x_ring(cells, unit0);
  if (threadIdx.x == 0) mbar::init_ring<kStages>(x_ring.full, x_ring.empty, kWarps);
  grid_dependents_start();
  __syncthreads();

  CodeRing<kBits, kWarps, kDepth, kCells, true> codes(p, share, code_space, warp, lane);
  const int span = p.w.group / (kCells * kCellColumns);  // steps of a scale group
  const int chunk_units = span * kGroupChunk;
  const GroupScales scales(p.w, reinterpret_cast<unsigned char*>(x_ring.empty + kStages) +
                                    warp * kGroupBytes);
  scales.copy(codes.block, unit0 / chunk_units, 0);
  for (int i = 0; i < kDepth - 1; ++i) codes.fetch(lane);
  grid_dependency_wait();
  for (int i = 0; i < kStages - 1; ++i) x_ring.fill(p, count);

  float acc[2][2 * kTiles] = {};
  uint32_t scale[4] = {}, minus_zero[4] = {};  // of rows g + 8 r, twice
  int buffer = 1, since = kDepth;  // of scales in use; steps since the other one's copy was started
  Ring<kStages> ring;
  const uint32_t no_bits = static_cast<uint32_t>(s.ctas) >> 31;  // 0
  int read = 0, released = -1;  // slot of codes; stage of x whose MMAs are under way
  auto release = [&] {
    mma_groups_wait<0>();
    if (released >= 0 && lane == 0) mbar::arrive(x_ring.empty + released);
    released = -1;
  };
  // The compiler orders uses of `acc` by its values alone, not by the wait.
  auto finished = [&] {
#pragma unroll
    for (int q = 0; q < 4 * kTiles; ++q) asm volatile("" : "+f"((&acc[0][0])[q]) :: "memory");
  };

  int begin = 0, group = share.first / units, unit = unit0;
  for (;;) {  // row groups
    const int end = min(count, begin + units - unit);
    uint32_t scale_group = unit / span;
    int next_chunk = unit, next_group = unit;  // units
    for (int i = begin; i < end; ++i, ++unit) {
      copy_wait<kDepth - 2>();
      if (unit == next_chunk) {  // a chunk of scales begins, the next may come
        if (since < kDepth - 1) copy_wait<0>();
        __syncwarp();
        buffer ^= 1;
        since = 0;
        const int chunk = unit / chunk_units;
        next_chunk = (chunk + 1) * chunk_units;
        if (i + min(next_chunk, units) - unit < count) {
          if (next_chunk >= units) scales.copy((group + 1) * kWarps + warp, 0, buffer ^ 1);
          else scales.copy(group * kWarps + warp, chunk + 1, buffer ^ 1);
        }
      }
      ++since;
      if (unit == next_group) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          scale[r] = scales.pair(scale_group, 0, g + 8 * r, buffer);
          minus_zero[r] = scales.pair(scale_group, 1, g + 8 * r, buffer) ^ 0x80008000u;
        }
        ++scale_group;
        next_group = scale_group * span;
      }
      ScalarCodes<kBits> c[kCells];
      codes.read(read, lane, c);
      if (++read == kDepth) read = 0;
      codes.fetch(lane);
      const uint64_t x = core_matrices(cells + ring.stage * kStage, kTokens * 16, 128);
#pragma unroll
      for (int n = 0; n < kCells; ++n) {
        if (n == 0) {
          release();
          if (i > 0) x_ring.fill(p, count);
          __syncwarp();
          mbar::wait(x_ring.full + ring.stage, ring.phase);
        } else {
          mma_groups_wait<0>();
        }
        // MMAs read their A registers until they are waited for, which the compiler does not know:
        // what writes them must depend on something that comes after the wait.
        after_wait(c[n], no_bits);
        uint32_t a[4][2][4];
        auto operands = [&](auto at) {
          constexpr int f = decltype(at)::value;
#pragma unroll
          for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int j = 0; j < 4; ++j) {  // rows g, g + 8; even pair, odd pair
              const int r = 2 * m + j % 2;
              const uint32_t q = half_codes<kBits, f>(c[n], r, j / 2 == 1);
              a[f][m][j] = half_mul(half_add(q, minus_zero[r]), scale[r]);
            }
        };
        operands(std::integral_constant<int, 0>());
        operands(std::integral_constant<int, 1>());
        operands(std::integral_constant<int, 2>());
        operands(std::integral_constant<int, 3>());
        mma_fence();
#pragma unroll
        for (int f = 0; f < 4; ++f)
#pragma unroll
          for (int m = 0; m < 2; ++m)
            wgmma(acc[m], a[f][m], x + ((n * kX + f * 2 * kTokens * 16) >> 4), __half());
        mma_group_commit();
      }
      released = ring.stage;
      ring.advance();
    }
    release();
    finished();

    if (group * kWarps + warp < blocks) {
      float* const out = partials_of(p, group, begin == 0 ? first_slot(p, group) : 0);
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int m = 8 * n + 2 * t + b;
          float v[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) v[r] = acc[r / 2][n * 4 + r % 2 * 2 + b];
          if (p.local_bits > 0) transform_rows(v, p.local_bits);
          if (m >= tokens) continue;
#pragma unroll
          for (int r = 0; r < 4; ++r)
            out[m * s.group_rows + warp * kCellRows + r * 8 + g] = v[r];
        }
    }
    if (end == count) break;
#pragma unroll
    for (int q = 0; q < 4 * kTiles; ++q) (&acc[0][0])[q] = 0.f;
    finished();
    begin = end;
    unit = 0;
    ++group;
  }
#endif
}

}  // namespace aqlm
