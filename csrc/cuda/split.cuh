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
// Random lookups conflict: 3.5 wavefronts each. The rest of shared memory holds most entries a
// second time in other banks, and the packed codes say which copy to read (additive_layout.h).
//
// Activations: of one token, every CTA rounds what its class needs to shared memory; of more, they
// come in fragment order from fragments.cuh. The lookups dominate, so up to 8 * kTiles columns cost
// little more than one. Architectures sm_80+ with 164 KB shared memory (two copies: 227 KB).
#pragma once

#include "decode/additive.cuh"
#include "fragments.cuh"
#include "streamk.cuh"
#include "tune.h"

namespace aqlm {

constexpr int kSplitWarps = tune::kSplitRows / kTileRows;

// The table of a class comes in rounds of kThreads x 16 bytes (eight entries), kSplitAhead of them
// in flight: what a block asks for at once delays the sums of the matmul before, which share its
// way to L2 (H200, 4096 x 4096: 128 KB take 5.7 k cycles, after which these sums were read).
constexpr int kSplitAhead = 3;
template <int kThreads>
__device__ __forceinline__ void split_ask(unsigned char* smem, const uint8_t* from, int entries,
                                          int round) {
  const int e = (round * kThreads + threadIdx.x) * 8;
  if (e < entries) copy_async(smem + e * 2, from + e * 2);
  copy_commit();
}
template <int kThreads>
__device__ __forceinline__ void split_ask_first(unsigned char* smem, const uint8_t* from,
                                                int entries) {
#pragma unroll 1
  for (int round = 0; round < kSplitAhead; ++round)
    split_ask<kThreads>(smem, from, entries, round);
}
// The rest, and second copies of what this thread copied: the one of eight entries lies within the
// same 64 (second_copy moves whole words: bits 1 and 2 of an entry are the word of the 16 bytes).
template <int kThreads>
__device__ __forceinline__ void split_fill(unsigned char* smem, const uint8_t* from, int entries,
                                           bool two) {
#pragma unroll 1
  for (int round = 0; round * kThreads * 8 < entries; ++round) {
    copy_wait<kSplitAhead - 1>();
    split_ask<kThreads>(smem, from, entries, round + kSplitAhead);
    const int e = (round * kThreads + threadIdx.x) * 8;
    if (!two || e >= min(entries, kSecondEntries)) continue;
    const uint4 v = *reinterpret_cast<const uint4*>(smem + e * 2);
    const int moved = second_copy(e);
    const bool swap1 = moved & 2, swap2 = moved & 4;
    uint4 w = swap1 ? make_uint4(v.y, v.x, v.w, v.z) : v;
    w = swap2 ? make_uint4(w.z, w.w, w.x, w.y) : w;
    *reinterpret_cast<uint4*>(smem + kSecondAt + (moved & ~7) * 2) = w;
  }
}

// An entry of 2 bytes at an address of shared memory.
__device__ __forceinline__ uint32_t load_entry(uint32_t at) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at) : "memory");
  return v;
}

// x of one token for class `dims`, in the order of the MMA's B registers:
//   int8:  [unit][high, low byte][vector] of 2 bytes    exact: [unit][vector] of 2 bytes
template <typename T, bool kInt8>
__device__ __forceinline__ void split_own_x(const MatmulParams& p, unsigned char* to, int dims) {
  constexpr int kUnit = tune::split_x_unit(kInt8), kDims = kInt8 ? 2 : 1;
  __shared__ uint32_t warp_max[kSplitWarps];
  const int shift = p.a.in_group / 16, chunks = p.s.units * kTileVectors << shift;
  const int K = p.a.in_features(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* x = static_cast<const T*>(p.x);
  auto eight = [&](int i) { return i * 8 < K ? load_cached(x + i * 8) : make_uint4(0, 0, 0, 0); };
  const int self = threadIdx.x;
  const uint4 own = eight(self);
  float inverse = 0.f;
  if constexpr (kInt8) {
    float peak = 0.f;
    for (int i = self; i < chunks; i += kSplitWarps * 32) {
      float w[8];
      unpack8<T>(i == self ? own : eight(i), w);
#pragma unroll
      for (int j = 0; j < 8; ++j) peak = fmaxf(peak, fabsf(w[j]));
    }
    // Floats of one sign are ordered as integers.
    const uint32_t most = __reduce_max_sync(~0u, __float_as_uint(peak));
    if (lane == 0) warp_max[warp] = most;
    __syncthreads();
    peak = __uint_as_float(__reduce_max_sync(~0u, warp_max[lane]));
    inverse = peak > 0.f ? kActivationMax / peak : 0.f;
    if (blockIdx.x + threadIdx.x == 0) p.x_scales[0] = peak / kActivationMax;
  }
  const int first = dims * kDims;  // dimension of the vector
  for (int i = self; i < chunks; i += kSplitWarps * 32) {
    const int vector = i >> shift;
    if ((i & shift) != first / 8) continue;
    const uint4 v = i == self ? own : eight(i);
    const int w = first % 8 / 2;
    const uint32_t word = w < 2 ? (w == 0 ? v.x : v.y) : (w == 2 ? v.z : v.w);
    unsigned char* const at = to + vector / kTileVectors * kUnit + vector % kTileVectors * 2;
    if constexpr (kInt8) {
      const float2 f = unpack2(word, T());
      const int q0 = __float2int_rn(f.x * inverse), q1 = __float2int_rn(f.y * inverse);
      const int h0 = (q0 + 128) >> 8, h1 = (q1 + 128) >> 8, l0 = q0 - h0 * 256, l1 = q1 - h1 * 256;
      *reinterpret_cast<uint16_t*>(at) = (h0 & 255) | (h1 & 255) << 8;
      *reinterpret_cast<uint16_t*>(at + 32) = (l0 & 255) | (l1 & 255) << 8;
    } else {
      *reinterpret_cast<uint16_t*>(at) = first % 2 ? word >> 16 : word & 0xffff;
    }
  }
}

// Threads more in the bounds of kOwn than there are, so that registers are left for a block of
// reduce.cuh (56 instead of 64; without dependent launch there is no use for them).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kSplitSpare = 0;
#else
constexpr int kSplitSpare = 128;
#endif

// kTiles: MMA column tiles (8 tokens exact, 4 tokens int8). kOwn: one token, see above.
template <typename T, int kTiles, bool kInt8, bool kOwn>
__global__ void __launch_bounds__(kSplitWarps * 32 + (kOwn ? kSplitSpare : 0), 1)
split_kernel(const __grid_constant__ MatmulParams p) {
#if __CUDA_ARCH__
  constexpr int kArch = __CUDA_ARCH__ / 10;
#else
  constexpr int kArch = 0;
#endif
  constexpr bool kTwo = tune::split_two_copies(kArch);
  extern __shared__ __align__(1024) unsigned char smem[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int units = p.s.units, dims = own_class(p.s);
  const uint8_t* fragments =
      p.x_fragments + (size_t(dims) * units * kTiles * 32 + lane) * 8;
  const int table_bytes = tune::split_table_bytes(kArch, p.a.entries());
  const int columns = p.tokens * (kInt8 ? 2 : 1);
  const uint32_t unit_stride = p.s.tiles * kUnitBytes;
  // Lanes of columns past the token's read those of another: nobody reads these sums.
  uint32_t table = smem_address(smem), own_x = table + table_bytes + (kInt8 ? lane % 8 : t) * 8;
  keep(table);
  keep(own_x);
  // Of one part it is known at once which table is needed.
  auto table_of = [&](int part) {
    return p.aux + kAuxHeader + size_t(part * p.s.classes + dims) * p.a.entries() * 2;
  };
  const bool early = p.a.parts == 1;
  if (early) split_ask_first<kSplitWarps * 32>(smem, table_of(0), p.a.entries());
  int loaded_part = -1;
  grid_dependents_start();

  for_each_piece(p.a, p.s, [&](const Piece& piece) {
    // Warps past the part's last row tile repeat it; they write nothing.
    const int tile = piece.tile + min(warp, piece.tiles - 1), u0 = piece.u0, u1 = piece.u1;
    const uint8_t* codes = p.packed + size_t(tile) * kUnitBytes + lane * 16;
    const uint8_t* choices =
        p.packed + (size_t(units) * p.s.tiles * 4 + tile) * (kUnitBytes / 4) + lane * 4;
    keep(codes);
    keep(choices);
    float accf[kInt8 ? 1 : kTiles][4] = {};
    int acci[kInt8 ? kTiles : 1][4] = {};

    uint4 ring[kChoiceUnits] = {};  // codes of kChoiceUnits units from `first` on; their choices
    uint32_t chosen;
    int first = u0 / kChoiceUnits * kChoiceUnits;
    auto fetch = [&](int j, int u) {  // nothing past the end: such loads would keep the block
      load_stream_if(u < u1, codes + size_t(uint32_t(min(u, u1 - 1))) * unit_stride, &ring[j]);
    };
    auto fetch_choices = [&](int u) {
      return load_stream_word(choices + size_t(uint32_t(u / kChoiceUnits)) * (unit_stride / 4));
    };
    // Unit u = first + j: its lookups, and in between the load of the unit kChoiceUnits later.
    auto multiply = [&](const int j, int u) {
      const uint32_t top = second_copies(chosen >> 2 * j, 0);
      const uint32_t bottom = second_copies(chosen >> 2 * j, 1);
      const uint32_t w[4] = {ring[j].x, ring[j].z, ring[j].y, ring[j].w};
      uint32_t at[8], a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t second = i % 2 ? bottom : top;
        if constexpr (kTwo) {
          at[2 * i] = copy_offset(w[i], second, i / 2 * 2);
          at[2 * i + 1] = copy_offset(w[i], second, i / 2 * 2 + 1);
        } else {
          const uint32_t plain = plain_codes(w[i], second, i / 2);
          at[2 * i] = low_word_offset(plain);
          at[2 * i + 1] = high_word_offset(plain);
        }
      }
      fetch(j, u + kChoiceUnits);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = load_entry(table + at[2 * i]) | load_entry(table + at[2 * i + 1]) << 16;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        uint2 x = make_uint2(0, 0);
        if constexpr (kOwn) {
          asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];"
                       : "=r"(x.x), "=r"(x.y)
                       : "r"(own_x + u * tune::split_x_unit(kInt8)) : "memory");
        } else {  // columns past M need no load
          if (n * 8 + g < columns) x = load_cached8(fragments + (size_t(u) * kTiles + n) * 256);
        }
        if constexpr (kInt8) mma_16832(acci[n], a, x.x, x.y);
        else mma_16816(accf[n], a, x.x, x.y, T());
      }
    };
    auto write = [&] {
      float* out = slot_of(p, piece, 0) + warp * kTileRows + g;
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
    for (int j = 0; j < kChoiceUnits; ++j)  // units before the piece are skipped
      fetch(j, first + j < u0 ? first + j + kChoiceUnits : first + j);
    chosen = fetch_choices(first);
    if (piece.part != loaded_part) {
      const uint8_t* const from = table_of(piece.part);
      if (!early) split_ask_first<kSplitWarps * 32>(smem, from, p.a.entries());
      split_fill<kSplitWarps * 32>(smem, from, p.a.entries(), kTwo);
      if (loaded_part < 0) {
        grid_dependency_wait();
        if constexpr (kOwn) split_own_x<T, kInt8>(p, smem + table_bytes, dims);
      }
      loaded_part = piece.part;
      __syncthreads();
    }
#pragma unroll 1
    for (; first < u1; first += kChoiceUnits) {
      const int next = first + kChoiceUnits;
      const uint32_t chosen_next = next < u1 ? fetch_choices(next) : 0;
#pragma unroll
      for (int j = 0; j < kChoiceUnits; ++j)
        if (first + j >= u0 && first + j < u1) multiply(j, first + j);
      chosen = chosen_next;
    }
    if (warp < piece.tiles) write();
  });
}

}  // namespace aqlm
