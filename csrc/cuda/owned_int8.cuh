// cuda.additive.owned_int8: y = x W^T in int8 for 1 .. 4 tokens: a block has its rows and all of K,
// which its warps share out. Nothing is left to add, and there is no second kernel.
//
// nbits <= 8, G = 8, B in {1, 2}. A lookup is 8 bytes = 8 weights of a row, two neighbouring A
// registers of mma.sync m16n8k32. Those registers belong to rows g and g + 8 of the MMA, so it takes
// elements 0 .. 3 and 4 .. 7 of a vector for two rows, and x for two columns:
//
//   A of lane (g, t):  row g: elements 0 .. 3, row g + 8: elements 4 .. 7 of row g of an octet of
//                      rows, vector t and (k + 16) vector 4 + t of a pair of steps
//   B, column 4 m + 2 p + h: part p (high, low bytes) of elements 4 h .. 4 h + 3, token m
//   C: row g of column h = 0 and row g + 8 of column h = 1 are added, the rest is not used
//
// No register is moved, an MMA has 8 rows and 64 columns of K, and two tokens share it.
//
//   entry e: | 16 copies of 8 bytes of codebook 0 | of codebook 1 |    256 bytes, 64 KB
//     A lane reads its own banks, one PRMT makes the address (see columns.cuh).
//   warp: walks row spans (a 64-row block of the layout, or half of one); of each, its share of K.
//     Codes come straight to registers, kDepth pairs of steps ahead; entries are looked up kReady
//     codebooks ahead. What a warp has of K decides the scale of its x: max|x| / 32639.
//
// Before the wait for the kernel before: tables, the first codes and their entries. After it: x.
// Bytes of shared memory per weight and codebook: 1. Architectures sm_80+.
#pragma once

#include <type_traits>

#include "clusters.cuh"
#include "columns.cuh"
#include "fragments.cuh"
#include "tune.h"

namespace aqlm {

constexpr int kOwnedTableBytes = 256 * 256;

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

// Of a half span.
template <int B>
struct HalfCodes {
  uint2 unit[B];
};

template <typename T, int B, int kTiles, int kVariant>
__global__ void __launch_bounds__(tune::owned(kVariant).warps * 32, tune::owned(kVariant).blocks)
owned_int8_kernel(const __grid_constant__ MatmulParams p) {
  constexpr tune::Owned kShape = tune::owned(kVariant);
  constexpr int kWarps = kShape.warps, kThreads = kWarps * 32,  kDepth = kShape.depth;
  constexpr bool kShort = kShape.shorter;  // and one token
  constexpr int kOctets = kShape.octets;  // of rows, of a span
  constexpr int kTens = kOctets / 2;      // blocks of 16 rows of a span
  constexpr int kReady = kTiles > 1 && kOctets * kWarps > 32 ? 0 : kShape.ready < B ? kShape.ready : B;
  // Vectors of x of a lane.
  constexpr int kItems = kShort ? kDepth / 4 : (tune::kOwnedColumns / 64 + 4 * kWarps - 1) / (4 * kWarps);
  extern __shared__ __align__(1024) unsigned char smem[];
  const Additive& a = p.a;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform: counters cost no registers
  const int tokens = kShort ? 1 : p.tokens, K = a.in_groups * 8, units = p.s.units;
  const int pairs = B == 1 ? units : (units + 1) / 2;
  // A cluster of blocks shares out K and, at the end, the rows.
  constexpr int kCluster = kShape.cluster, kShares = kWarps * kCluster;
  const int rank = kCluster > 1 ? blockIdx.x % kCluster : 0, base = rank * pairs / kCluster;
  const int slot = rank * kWarps + warp, share = slot * pairs / kShares;
  const int count = (slot + 1) * pairs / kShares - share;
  const int x_pair = tokens * 128;  // bytes
  unsigned char* const x_own = smem + kOwnedTableBytes + (share - base) * x_pair;
  float* const exchange = reinterpret_cast<float*>(smem + kOwnedTableBytes + ceil_div(pairs, kCluster) * x_pair);
  float* const row_scales = exchange + tokens * kWarps * p.s.group_rows;
  uint32_t column = (smem_address(smem) & 0xffff0000) | lane % 16 * 8;
  keep(column);
  if ((smem_address(smem) & 0xffff) != kColumnTableAt) __trap();
  const int final_rows = p.s.group_rows / kCluster;  // a rank's
  float* const received = row_scales + 2 * p.s.group_rows;  // [rank][token][final_rows]
  uint64_t* const arrived = reinterpret_cast<uint64_t*>(received + tokens * p.s.group_rows);
  if constexpr (kCluster > 1) {
    if (threadIdx.x == 0) mbar::init(arrived, 1);
    mbar::init_fence();
  }
  grid_dependents_start();

  // Rows of this block: an even share of its part, in blocks of 16 (half spans: 32).
  constexpr int kUnit = kShape.unit;  // blocks of 16
  int part = 0, tile = 0, block = blockIdx.x / kCluster, blocks = gridDim.x / kCluster;
  if (a.parts > 1) {
    blocks = tune::owned_blocks(a, 0, kUnit, p.s.ctas);
#pragma unroll 1
    while (block >= blocks) {
      block -= blocks;
      tile += (a.rows_of(part) + kBlockRows - 1) / kBlockRows;
      blocks = tune::owned_blocks(a, ++part, kUnit, p.s.ctas);
    }
  }
  int ten0 = block, own_units = 1;
  if constexpr (!kShort) {  // the first `rest` blocks have one more
    const int shares = tune::owned_units(a, part, kUnit), each = shares / blocks;
    const int rest = shares - each * blocks;
    ten0 = block * each + min(block, rest);
    own_units = each + (block < rest);
  }
  ten0 *= kUnit;
  const int ten1 = ten0 + own_units * kUnit;
  const int row = ten0 * 16, rows = min(ten1 * 16, a.rows_of(part)) - row;  // of the part
  const int most_rows = p.s.group_rows;
  const int first = ten0 / kTens, spans = (ten1 + kTens - 1) / kTens - first;
  const int total = spans * count;

  // The warp's stream of codes: spans, and pairs of steps of each.
  const size_t unit_stride = size_t(p.s.tiles) * kUnitBytes;
  const uint8_t* const codes =
      p.packed + share * (B * unit_stride) + size_t(tile) * kUnitBytes + lane * 16;
  struct Codes {
    uint4 unit[B];
  };
  int fetched = 0, fetch_pair = 0;
  int fetch_span = first;
  const uint8_t* from = codes + first * kOctets / 8 * kUnitBytes;
  // The next pairs; past the end the last again, and for a step that is not there (its x is zero)
  // the one before it. All addresses first: a register of an earlier load that becomes an address
  // waits for the loads in between.
  auto fetch = [&](auto& ring, int slot, auto pairs_at_once) {
    constexpr int kPairs = decltype(pairs_at_once)::value;
    if (fetched >= total) return;
    const uint8_t* at[kPairs][B];
#pragma unroll
    for (int e = 0; e < kPairs; ++e) {
      const bool odd = B == 2 && 2 * (share + fetch_pair) + 1 == units;
      at[e][0] = from;
      if constexpr (B == 2) at[e][1] = odd ? from : from + unit_stride;
      if (++fetched < total) {
        from += B * unit_stride;
        if (++fetch_pair == count) {
          fetch_pair = 0;
          ++fetch_span;
          from = codes + fetch_span * kOctets / 8 * kUnitBytes;
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
  using Kept = std::conditional_t<kShort, HalfCodes<B>, Codes>;
  Codes loaded[kDepth];
  fetch(loaded, 0, std::integral_constant<int, kDepth>());
#pragma unroll 1
  for (int span = first, left = p.s.max_units; span < first + spans && left > 0; ++span) {
    const int begin = span == first ? kDepth * B : 0;
    const int end = min(min(count * B, units - share * B), begin + left);
    const uint8_t* const at = codes + span * kOctets / 8 * kUnitBytes - lane * 16 + lane % 4 * 128;
#pragma unroll 1
    for (int u = begin + lane / 4; u < end; u += 8) prefetch_line(at + u * unit_stride);
    left -= max(end - begin, 0);
  }

  // Everything else that the block loads, x apart, is asked for before any of it is waited for.
  constexpr int kEntries = (B * 256 + kThreads - 1) / kThreads;  // of a thread
  uint2 entry[kEntries];
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const int i = threadIdx.x + j * kThreads, e = i % 256;
    entry[j] = make_uint2(0, 0);
    if (i < B * 256 && e < a.entries())
      entry[j] = load_early8(p.aux + kAuxHeader + ((part * B + i / 256) * a.entries() + e) * 8);
  }
  const int part_row = a.row0[part] + row;
  T own_scale = T(), own_bias = T();
  auto load_scale = [&](int i) {
    if (i >= rows) return;
    own_scale = load_early16(static_cast<const T*>(p.scales) + part_row + i);
    if (p.bias != nullptr) own_bias = load_early16(static_cast<const T*>(p.bias) + part_row + i);
  };
  // Alone on its SM a block starts when the kernel before ends: then nothing is gained by waiting
  // for x last. Else registers are scarcer than time.
  constexpr bool kAlone = kShape.blocks == 1;
  if constexpr (kAlone) load_scale(threadIdx.x);

  // x of kGroup tokens at a time: the lane's vectors of the warp's share.
  constexpr int kGroup = kAlone && kItems <= 4 ? 2 : 1;
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
        if (m0 + j < tokens && lane + 32 * i < count * 8 && x_first + 256 * i < K)
          raw[j][i] = load_cached(x_at + 512 * i);
      }
      x_at += 2 * p.x_stride;
    }
  };
  if constexpr (kAlone) {
    grid_dependency_wait();
    load_x(0);
  } else if (x_first < K) {
    prefetch_line(x_at);
  }

#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const int i = threadIdx.x + j * kThreads, e = i % 256;
    uint4* const to = reinterpret_cast<uint4*>(smem) + e * 16 + i / 256 * 8;
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (i < B * 256)
        to[(c + e) & 7] = make_uint4(entry[j].x, entry[j].y, entry[j].x, entry[j].y);
  }
  Kept ring[kDepth];
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    if constexpr (kShort) {
      const bool upper = first % 2;
#pragma unroll
      for (int i = 0; i < B; ++i) {
        const uint4 c = loaded[d].unit[i];
        ring[d].unit[i] = make_uint2(upper ? c.y : c.x, upper ? c.w : c.z);
        keep(ring[d].unit[i].x);  // here, not where they are used
        keep(ring[d].unit[i].y);
      }
    } else {
      ring[d] = loaded[d];
    }
  }

  // Scale and bias of each row wait in shared memory.
  const float part_scale = reinterpret_cast<const float*>(p.aux)[part];
#pragma unroll 1
  for (int i = threadIdx.x; i < rows; i += kThreads) {
    if (!kAlone || i >= kThreads) load_scale(i);
    row_scales[i] = to_float(own_scale) * part_scale;
    row_scales[most_rows + i] = to_float(own_bias);
  }
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
        for (int c = 0; c < 4; ++c)  // two neighbouring pairs of an instruction in other banks
          to[(c ^ pair % 4) * 8] = c % 2 ? bytes[c / 2].y : bytes[c / 2].x;
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        if (m == 2 * n + t / 2) x_scale[n] = peak * (1.f / kActivationMax);
    }
  };
  auto all_x = [&] {
    for (int m0 = 0; m0 < tokens; m0 += kGroup) {
      if (!kAlone || m0 > 0) load_x(m0);
      round_x(m0);
    }
  };
  if constexpr (kAlone) all_x();
  if constexpr (kCluster > 1)
    if (threadIdx.x == 0)
      mbar::expect(arrived, (kCluster - 1) * tokens * 4 *
                                min(max(rows - final_rows * rank, 0), final_rows));
  __syncthreads();
  if constexpr (kCluster > 1) cluster_arrive();

  // A bit for each block of 16 rows of a span that is this block's. Of whole spans a block has all.
  auto own = [&](int span) {
    const int lo = max(ten0 - span * kTens, 0), hi = min(ten1 - span * kTens, kTens);
    return hi > lo ? (1 << hi) - (1 << lo) : 0;
  };
  auto has = [&](int mask, int ten) { return kUnit == kTens || (mask >> ten & 1); };
  auto entries = [&](const Kept& c, int book, int span, int o, uint32_t (&to)[4]) {
    // Codes of the vectors t and 4 + t of a pair, of octets 0 .. 3 and 4 .. 7.
    uint2 w[2];
    const auto even = c.unit[0], odd = c.unit[B - 1];
    if constexpr (kShort) {
      w[0].x = book == 0 ? even.x : even.y;
      w[1].x = B == 2 && book == 0 ? odd.x : odd.y;
    } else {
      w[0] = book == 0 ? make_uint2(even.x, even.y) : make_uint2(even.z, even.w);
      w[1] = B == 2 && book == 0 ? make_uint2(odd.x, odd.y) : make_uint2(odd.z, odd.w);
      if (kOctets == 4 && span % 2) {
        w[0].x = w[0].y;
        w[1].x = w[1].y;
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t at = __byte_perm(o < 4 ? w[j].x : w[j].y, column, 0x7604 | o % 4 << 4);
      const uint2 v = book == 0 ? table_entry<0>(at) : table_entry<128>(at);
      to[2 * j] = v.x;
      to[2 * j + 1] = v.y;
    }
  };
  int look_pair = 0, look_span = first, look_own = own(first);
  auto look_up = [&](const Kept& c, int book, uint32_t (&to)[kOctets][4]) {
#pragma unroll
    for (int ten = 0; ten < kTens; ++ten) {
      if (!has(look_own, ten)) continue;
#pragma unroll
      for (int o = 2 * ten; o < 2 * ten + 2; ++o) entries(c, book, look_span, o, to[o]);
    }
    if (book == B - 1 && ++look_pair == count) {
      look_pair = 0;
      look_own = own(++look_span);
    }
  };
  constexpr int kReady1 = kReady > 0 ? kReady : 1;
  uint32_t ready[kReady1][kOctets][4];
#pragma unroll
  for (int b = 0; b < kReady; ++b)
    if (total > 0) look_up(ring[0], b, ready[b]);
  if constexpr (!kAlone) {
    grid_dependency_wait();
    all_x();
  }
  __syncwarp();

  int acc[kOctets][kTiles][4] = {};
  const unsigned char* x_lane[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) x_lane[n] = x_own + min(2 * n + g / 4, tokens - 1) * 128 + t * 8;
  // The other half of the ring, once the first codes of a half have been used: all loads in flight
  // share a scoreboard, and a wait for one is a wait for all.
  // settle() is where a half is waited for, whatever branch uses it first: a wait in a branch would
  // be repeated behind the next half's loads, and wait for those.
  constexpr int kHalf = kShort ? kDepth : kDepth / 2;
  const uint32_t zero = p.s.passes;
  auto settle = [&](int d) {
    if constexpr (!kShort)
      if (d % kHalf == 0) use(ring[d].unit[0].x, zero);
  };
  auto refill = [&](int d) {
    if constexpr (!kShort) {
      if (d % kHalf == 0) fetch(ring, d + kHalf, std::integral_constant<int, kHalf>());
    }
  };
  int done_pair = 0, done_span = first, done_own = own(first);
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
        if constexpr (kReady == 0) {
          if (b == 0) settle(d);
#pragma unroll
          for (int o = 0; o < kOctets; ++o) {
            if (!has(done_own, o / 2)) continue;
            uint32_t r[4];
            entries(ring[d], b, done_span, o, r);
#pragma unroll
            for (int n = 0; n < kTiles; ++n) mma_16832(acc[o][n], r, x[n].x, x[n].y);
          }
          if (b == 0 && (d > 0 || i > 0)) refill(d);
        } else {
          uint32_t(&r)[kOctets][4] = ready[b % kReady1];
#pragma unroll
          for (int o = 0; o < kOctets; ++o) {
            if (!has(done_own, o / 2)) continue;
#pragma unroll
            for (int n = 0; n < kTiles; ++n) mma_16832(acc[o][n], r[o], x[n].x, x[n].y);
          }
          // Later on a short block looks one codebook ahead: sums have taken the registers.
          constexpr int kAhead = kShort ? 1 : kReady;
          const int next = (b + kAhead) / B, book = (b + kAhead) % B;
          if (book == 0) settle((d + next) % kDepth);
          const bool looked_up = kShort && d * B + b + kAhead < kReady;
          if (i + d + next < total && !looked_up && (!kShort || d + next < kDepth))
            look_up(ring[(d + next) % kDepth], book, ready[book % kReady1]);
          if (book == 0) refill((d + next) % kDepth);
        }
      }
      if (++done_pair < count) continue;
      // The sums of a span are complete: high bytes in lanes t = 0 and 2, low bytes beside them.
#pragma unroll
      for (int o = 0; o < kOctets; ++o)
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const int sum = acc[o][n][0] + acc[o][n][3];
          float v = t % 2 ? sum : 256.f * sum;
          v = (v + __shfl_xor_sync(~0u, v, 1)) * x_scale[n];
          const int m = 2 * n + t / 2;
          const int r = (done_span * kTens + o / 2 - ten0) * 16 + o % 2 * 8 + g;
          if (t % 2 == 0 && m < tokens && has(done_own, o / 2))
            exchange[(m * kWarps + warp) * most_rows + r] = v;
#pragma unroll
          for (int c = 0; c < 4; ++c) acc[o][n][c] = 0;
        }
      done_pair = 0;
      done_own = own(++done_span);
    }
    if constexpr (kShort) break;  // else all addresses are made before the loop, and spilled
  }
  __syncthreads();
  auto sum_of = [&](int m, int i) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int other = rank * kWarps + w;
      if (pairs >= kShares || (other + 1) * pairs / kShares > other * pairs / kShares)
        sum += exchange[(m * kWarps + w) * most_rows + i];
    }
    return sum;
  };
  auto store = [&](int m, int i, float sum) {
    static_cast<T*>(p.y)[size_t(m) * a.out_groups() + part_row + i] =
        from_float<T>(sum * row_scales[i] + row_scales[most_rows + i]);
  };
  if constexpr (kCluster > 1) {
    cluster_wait();  // for the others' start, long ago
    for (int i = threadIdx.x; i < rows; i += kThreads)
      for (int m = 0; m < tokens; ++m) {
        const float sum = sum_of(m, i);
        const int owner = i / final_rows;
        float* const to = received + (rank * tokens + m) * final_rows + i - owner * final_rows;
        if (owner == rank) *to = sum;
        else mbar::store_remote(to, arrived, owner, sum);
      }
    __syncthreads();
    const int own_rows = min(rows - rank * final_rows, final_rows);
    if (own_rows > 0) mbar::wait(arrived, 0);
    for (int i = threadIdx.x; i < own_rows; i += kThreads)
      for (int m = 0; m < tokens; ++m) {
        float sum = 0.f;
#pragma unroll
        for (int r = 0; r < kCluster; ++r) sum += received[(r * tokens + m) * final_rows + i];
        store(m, rank * final_rows + i, sum);
      }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < rows; i += kThreads)
      for (int m = 0; m < tokens; ++m) store(m, i, sum_of(m, i));
  }
}

}  // namespace aqlm
