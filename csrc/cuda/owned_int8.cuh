// cuda.additive.owned_int8: y = x W^T in int8 for 1 .. 4 tokens: a block has its rows and all of K,
// which its 16 warps share out. Nothing is left to add, and there is no second kernel.
//
// nbits <= 8, G = 8, B in {1, 2}. A lookup is 8 bytes = 8 weights of a row, two neighbouring A
// registers of mma.sync m16n8k32. These belong to rows g and g + 8 of the MMA, so it takes elements
// 0 .. 3 and 4 .. 7 of a vector for two rows, and x for two columns:
//
//   A of lane (g, t): row g: elements 0 .. 3, row g + 8: elements 4 .. 7 of row g of eight rows (an
//                     octet), of vectors t and (K + 16) 4 + t of 64 columns (a pair of steps)
//   B, column 4 m + 2 p + h: elements 4 h .. 4 h + 3 of token m, high (p = 0) or low bytes
//   C: row g of column h = 0 and row g + 8 of column h = 1 are added, the rest is not used
//
// No register is moved, an MMA has 8 rows and 64 columns of K, and two tokens share it.
//
//   entry e: | 16 copies of 8 bytes of codebook 0 | of codebook 1 |    256 bytes, 64 KB
//     A lane reads its own banks, one PRMT makes the address (see columns.cuh).
//   warp: pieces of 64-row blocks of the layout in turn; of each half its share of K. Codes come
//     straight to registers. The scale of its x is that of its share: max|x| / 32639.
//
// Two forms:
//   short   one token, and all codes of a warp are in flight at once: 64 registers, two blocks an
//           SM; before the wait for the kernel before: tables, codes and the first entries
//   else    a block an SM; it starts when the kernel before ends, and asks for x before its table
// Bytes of shared memory per weight and codebook: 1; LDS.64 takes two wavefronts where columns.cuh
// takes one, so a large matrix is faster there at one token. Architectures sm_90+.
#pragma once

#include <type_traits>

#include "columns.cuh"
#include "fragments.cuh"
#include "tune.h"

namespace aqlm {

// 8 bytes at a 16-bit table offset (see kColumnTableAt) plus a constant.
template <int kOffset>
__device__ __forceinline__ uint2 table_entry(uint32_t at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2 + %3];"
               : "=r"(v.x), "=r"(v.y) : "r"(at), "n"(kOffset + 1024) : "memory");
  return v;
}

// An instruction in its place that waits for v and leaves it as it is.
__device__ __forceinline__ void use(uint32_t& v, uint32_t zero) {
  asm volatile("or.b32 %0, %0, %1;" : "+r"(v) : "r"(zero));
}

// A lane's codes of a pair of steps; Word: uint4 of 64 rows, or uint2 of half of them.
template <typename Word, int B>
struct OwnedCodes {
  Word unit[B];
};

// kTiles: MMA column tiles (two tokens each). kOctets: of rows, that a warp has sums of: 4 or 8.
template <typename T, int B, int kTiles, int kOctets, bool kShort>
__global__ void __launch_bounds__(tune::kOwnedWarps * 32, kShort ? 2 : 1)
owned_int8_kernel(const __grid_constant__ MatmulParams p) {
#if __CUDA_ARCH__ >= 900
  using Codes = OwnedCodes<uint4, B>;
  using Kept = std::conditional_t<kShort, OwnedCodes<uint2, B>, Codes>;
  constexpr int kWarps = tune::kOwnedWarps, kThreads = kWarps * 32;
  constexpr int kRows = kOctets * 8;           // of a piece of the layout, a whole or half block
  constexpr int kDepth = tune::kOwnedDepth;    // pairs whose codes are in registers
  constexpr int kReady = kShort || kOctets == 8 ? 1 : B;  // codebooks of a pair, looked up ahead
  constexpr int kItems = kShort ? 1 : tune::kOwnedColumns / 256 / kWarps;  // vectors of x of a lane
  constexpr int kGroup = kShort ? 1 : 2;       // tokens whose x is loaded at once
  extern __shared__ __align__(1024) unsigned char smem[];
  const Additive& a = p.a;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform: counters cost no registers
  const int tokens = kShort ? 1 : p.tokens, units = p.s.units;
  const int pairs = B == 1 ? units : (units + 1) / 2;
  const int share = warp * pairs / kWarps, count = (warp + 1) * pairs / kWarps - share;
  const int x_pair = tokens * 128;  // bytes
  unsigned char* const x_own = smem + tune::kOwnedTable + share * x_pair;
  const int most_rows = p.s.group_rows;
  float* const exchange = reinterpret_cast<float*>(smem + tune::kOwnedTable + pairs * x_pair);
  float* const row_scales = exchange + tokens * kWarps * most_rows;  // and biases
  uint32_t column = (smem_address(smem) & 0xffff0000) | lane % 16 * 8;
  if ((smem_address(smem) & 0xffff) != kColumnTableAt) __trap();
  if constexpr (!kShort) keep(column);
  grid_dependents_start();

  // Rows of this block: pieces `first` .. of its part. The first `rest` blocks have one more.
  int part = 0, tile = 0, block = blockIdx.x, blocks = gridDim.x;
  if (a.parts > 1) {
    blocks = tune::owned_blocks(a, 0, kRows, p.s.ctas);
#pragma unroll 1
    while (block >= blocks) {
      block -= blocks;
      tile += (a.rows_of(part) + kBlockRows - 1) / kBlockRows;
      blocks = tune::owned_blocks(a, ++part, kRows, p.s.ctas);
    }
  }
  int first = block, pieces = 1;
  if constexpr (!kShort) {
    const int all = tune::owned_pieces(a, part, kRows), each = all / blocks;
    const int rest = all - each * blocks;
    first = block * each + min(block, rest);
    pieces = each + (block < rest);
  }
  const int row = a.row0[part] + first * kRows;
  const int rows = min(pieces * kRows, a.row0[part + 1] - row);
  const int total = pieces * count;

  // The warp's stream of codes. Past the end the last again, and for a step that is not there (its
  // x is zero) the one before it. All addresses first: a register of an earlier load that becomes
  // an address waits for the loads in between.
  const size_t unit_stride = size_t(p.s.tiles) * kUnitBytes;
  const uint8_t* const codes =
      p.packed + share * (B * unit_stride) + size_t(tile) * kUnitBytes + lane * 16;
  const uint8_t* from = codes + first * kOctets / 8 * kUnitBytes;
  int fetched = 0, fetch_pair = 0, fetch_piece = first;
  auto fetch = [&](Codes (&ring)[kDepth], int slot, auto at_once) {
    constexpr int kPairs = decltype(at_once)::value;
    if (fetched >= total) return;
    const uint8_t* at[kPairs][B];
#pragma unroll
    for (int e = 0; e < kPairs; ++e) {
      [[maybe_unused]] const bool odd = 2 * (share + fetch_pair) + 1 == units;
      at[e][0] = from;
      if constexpr (B == 2) at[e][1] = odd ? from : from + unit_stride;
      if (++fetched < total) {
        from += B * unit_stride;
        if (++fetch_pair == count) {
          fetch_pair = 0;
          from = codes + ++fetch_piece * kOctets / 8 * kUnitBytes;
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kPairs; ++e)
#pragma unroll
      for (int i = 0; i < B; ++i) keep(at[e][i]);
#pragma unroll
    for (int e = 0; e < kPairs; ++e)
#pragma unroll
      for (int i = 0; i < B; ++i) ring[(slot + e) % kDepth].unit[i] = load_stream(at[e][i]);
  };
  Codes loaded[kDepth];
  fetch(loaded, 0, std::integral_constant<int, kDepth>());

  uint2 entry = make_uint2(0, 0);  // of the thread
  static_assert(B * 256 <= kThreads);
  const int e = threadIdx.x % 256, book = threadIdx.x / 256;
  if (book < B && e < a.entries())
    entry = load_early8(p.aux + kAuxHeader + ((part * B + book) * a.entries() + e) * 8);
  T own_scale = T(), own_bias = T();
  auto load_scale = [&](int i) {
    if (i >= rows) return;
    own_scale = load_early16(static_cast<const T*>(p.scales) + row + i);
    if (p.bias != nullptr) own_bias = load_early16(static_cast<const T*>(p.bias) + row + i);
  };
  if constexpr (!kShort) load_scale(threadIdx.x);  // else registers are scarcer than time

  uint4 raw[kGroup][kItems];
  const int x_first = (share * 8 + lane) * 8;  // column
  const uint8_t* x_at = reinterpret_cast<const uint8_t*>(static_cast<const T*>(p.x) + x_first);
  keep(x_at);  // before the wait
  auto load_x = [&](int m0) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        raw[j][i] = make_uint4(0, 0, 0, 0);
        if (m0 + j < tokens && lane + 32 * i < count * 8 && x_first + 256 * i < a.in_groups * 8)
          raw[j][i] = load_cached(x_at + 512 * i);
      }
      x_at += 2 * p.x_stride;
    }
  };
  if constexpr (kShort) {
    if (x_first < a.in_groups * 8) prefetch_line(x_at);
  } else {
    grid_dependency_wait();
    load_x(0);
  }

  if (book < B) {
    uint4* const to = reinterpret_cast<uint4*>(smem) + e * 16 + book * 8;
#pragma unroll
    for (int c = 0; c < 8; ++c) to[(c + e) & 7] = make_uint4(entry.x, entry.y, entry.x, entry.y);
  }
  Kept ring[kDepth];
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    if constexpr (kShort) {
#pragma unroll
      for (int i = 0; i < B; ++i) {
        const uint4 c = loaded[d].unit[i];
        ring[d].unit[i] = first % 2 ? make_uint2(c.y, c.w) : make_uint2(c.x, c.z);
        keep(ring[d].unit[i].x);  // here, not where they are used
        keep(ring[d].unit[i].y);
      }
    } else {
      ring[d] = loaded[d];
    }
  }
  const float part_scale = reinterpret_cast<const float*>(p.aux)[part];
#pragma unroll 1
  for (int i = threadIdx.x; i < rows; i += kThreads) {
    if (kShort || i >= kThreads) load_scale(i);
    row_scales[i] = to_float(own_scale) * part_scale;
    row_scales[most_rows + i] = to_float(own_bias);
  }

  // x of the warp's share as integers, in the order of the B registers:
  //   [pair][token][column c of four][t][step], columns of two neighbouring pairs in other banks
  float x_scale[kTiles] = {};  // of token 2 n + t / 2
  auto round_x = [&](int m0) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const int m = m0 + j;
      if (m >= tokens) break;
      uint32_t most = 0;  // the bits of |x| are in its order
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        most = __vmaxu2(__vmaxu2(__vmaxu2(most, raw[j][i].x & 0x7fff7fffu),
                                 __vmaxu2(raw[j][i].y & 0x7fff7fffu, raw[j][i].z & 0x7fff7fffu)),
                        raw[j][i].w & 0x7fff7fffu);
      most = __reduce_max_sync(~0u, max(most & 0xffffu, most >> 16));
      const float peak = unpack2(most, T()).x;
      const float inverse = peak > 0.f ? __fdividef(kActivationMax, peak) : 0.f;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int item = lane + 32 * i, pair = item / 8;
        if (item >= count * 8) break;
        float v[8];
        uint2 bytes[2];
        unpack8<T>(raw[j][i], v);
        split_bytes(v, inverse, bytes, bytes + 1);
        uint32_t* const to = reinterpret_cast<uint32_t*>(x_own + pair * x_pair + m * 128) +
                             item % 4 * 2 + item / 4 % 2;
#pragma unroll
        for (int c = 0; c < 4; ++c)
          to[(c ^ pair % 4) * 8] = c % 2 ? bytes[c / 2].y : bytes[c / 2].x;
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        if (m == 2 * n + t / 2) x_scale[n] = peak * (1.f / kActivationMax);
    }
  };
  if constexpr (!kShort) {
    round_x(0);
    for (int m0 = kGroup; m0 < tokens; m0 += kGroup) {
      load_x(m0);
      round_x(m0);
    }
  }
  __syncthreads();

  int look_pair = 0, look_piece = first;
  auto look_up = [&](const Kept& c, int book, uint32_t (&to)[kOctets][4]) {
    uint2 w[2];  // codes of the vectors t and 4 + t of a pair
    const auto even = c.unit[0], odd = c.unit[B - 1];
    if constexpr (kShort) {
      w[0].x = book == 0 ? even.x : even.y;
      w[1].x = B == 2 && book == 0 ? odd.x : odd.y;
    } else {
      w[0] = book == 0 ? make_uint2(even.x, even.y) : make_uint2(even.z, even.w);
      w[1] = B == 2 && book == 0 ? make_uint2(odd.x, odd.y) : make_uint2(odd.z, odd.w);
      if constexpr (kOctets == 4) {
        const bool upper = look_piece % 2;
        w[0].x = upper ? w[0].y : w[0].x;
        w[1].x = upper ? w[1].y : w[1].x;
        if (book == B - 1 && ++look_pair == count) {
          look_pair = 0;
          ++look_piece;
        }
      }
    }
#pragma unroll
    for (int o = 0; o < kOctets; ++o)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t at = __byte_perm(o < 4 ? w[j].x : w[j].y, column, 0x7604 | o % 4 << 4);
        const uint2 v = book == 0 ? table_entry<0>(at) : table_entry<128>(at);
        to[o][2 * j] = v.x;
        to[o][2 * j + 1] = v.y;
      }
  };
  uint32_t ready[kReady][kOctets][4];
#pragma unroll
  for (int b = 0; b < kReady; ++b)
    if (total > 0) look_up(ring[0], b, ready[b]);
  if constexpr (kShort) {
    grid_dependency_wait();
    load_x(0);
    round_x(0);
  }
  __syncwarp();

  // A half of the ring is waited for in one place, settle(), whatever branch uses it first; then
  // the other half is loaded. All loads in flight share a scoreboard, so that a wait for one is a
  // wait for all, and a wait in a branch would be repeated behind the loads that follow it.
  constexpr int kHalf = kDepth / 2;
  const uint32_t zero = p.s.whole;
  auto settle = [&](int d) {
    if constexpr (!kShort)
      if (d % kHalf == 0) use(ring[d].unit[0].x, zero);
  };
  auto refill = [&](int d) {
    if constexpr (!kShort)
      if (d % kHalf == 0) fetch(ring, d + kHalf, std::integral_constant<int, kHalf>());
  };
  int acc[kOctets][kTiles][4] = {};
  const unsigned char* x_lane[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) x_lane[n] = x_own + min(2 * n + g / 4, tokens - 1) * 128 + t * 8;
  int done_pair = 0, done_piece = 0;
  for (int i = 0; i < total; i += kDepth) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (i + d >= total) break;
      uint2 x[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        x[n] = *reinterpret_cast<const uint2*>(x_lane[n] + done_pair * x_pair +
                                               ((g ^ done_pair) & 3) * 32);
#pragma unroll
      for (int b = 0; b < B; ++b) {
        uint32_t(&r)[kOctets][4] = ready[b % kReady];
#pragma unroll
        for (int o = 0; o < kOctets; ++o)
#pragma unroll
          for (int n = 0; n < kTiles; ++n) mma_16832(acc[o][n], r[o], x[n].x, x[n].y);
        const int next = (b + kReady) / B, book = (b + kReady) % B;  // pairs ahead, and codebook
        if (book == 0) settle((d + next) % kDepth);
        if (i + d + next < total && (!kShort || d + next < kDepth))
          look_up(ring[(d + next) % kDepth], book, r);
        if (book == 0) refill((d + next) % kDepth);
      }
      if (++done_pair < count) continue;
      // The sums of 32 rows are complete: high bytes in lanes t = 0 and 2, low bytes beside them.
#pragma unroll
      for (int o = 0; o < kOctets; ++o)
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const int sum = acc[o][n][0] + acc[o][n][3], m = 2 * n + t / 2;
          float v = t % 2 ? sum : 256.f * sum;
          v = (v + __shfl_xor_sync(~0u, v, 1)) * x_scale[n];
          if (t % 2 == 0 && m < tokens)
            exchange[(m * kWarps + warp) * most_rows + done_piece * kRows + o * 8 + g] = v;
#pragma unroll
          for (int c = 0; c < 4; ++c) acc[o][n][c] = 0;
        }
      done_pair = 0;
      ++done_piece;
    }
    if constexpr (kShort) break;  // else all addresses are made before the loop, and spilled
  }

  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < rows; i += kThreads)
    for (int m = 0; m < tokens; ++m) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w)
        if (pairs >= kWarps || (w + 1) * pairs / kWarps > w * pairs / kWarps)  // it has a share
          sum += exchange[(m * kWarps + w) * most_rows + i];
      static_cast<T*>(p.y)[size_t(m) * a.out_groups() + row + i] =
          from_float<T>(sum * row_scales[i] + row_scales[most_rows + i]);
    }
#endif
}

}  // namespace aqlm
