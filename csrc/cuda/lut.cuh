// cuda.additive.lut: y = x W^T for few tokens from tables of partial dot products.
//
// Any B, nbits <= 8, G in {8, 16, 32}. A step is 32 columns = 8 (4 vectors, codebook) pairs. A CTA
// builds T[entry][column] = <codebook entry, x vector> in float32 with MMAs, and then a weight
// vector of any row costs one 4-byte lookup and one add: a quarter of the shared-memory traffic of
// fetching the 16-byte entry itself.
//
//   T: entry e: | stage 0: columns 0 .. 31 | stage 1: columns 0 .. 31 |     256 bytes, 64 KB in all
//      Lane l of every warp looks up column l only, so each lane has a bank of its own: no
//      conflicts and no replicas. One PRMT makes the address: byte 0 lane and stage, byte 1 code.
//   CTA: kWarps warps of kRuns * 8 rows; a lane holds the sums of all rows of its warp over its
//      columns. The lanes are added once per row group, by shuffles.
//   Codes: bulk copies into a ring of steps, issued by the warps in turn (sm_80: cp.async).
//
// In the middle of step k every warp builds its share of table k + 1, so that neither waiting for
// tables (`ready`) nor for their readers (`read`) keeps a warp unless it is half a step ahead.
// CTAs cut the K range evenly (streamk.cuh); reduce.cuh adds their partial sums.
//
// Bytes per weight vector and codebook: 1 of codes, 4 of shared memory. Architectures sm_80+.
#pragma once

#include "decode/additive.cuh"
#include "lut_shape.h"
#include "mbarrier.cuh"
#include "streamk.cuh"

namespace aqlm {

// kRuns: rows of a warp / 8. kBooks: codebooks of a step, whose entries stay in a warp's registers:
// 1, 2 or 4, with B / kBooks phases that walk all of K one after the other; 0: B is odd, entries
// are loaded for every step. Tokens are passes of one launch.
template <typename T, int kWarps, int kRuns, int kG, int kBooks>
__global__ void __launch_bounds__(kWarps * 32, 1)
lut_kernel(const __grid_constant__ MatmulParams p) {
#if __CUDA_ARCH__ >= 900
  constexpr bool kBulk = true;
#else
  constexpr bool kBulk = false;
#endif
  constexpr int kTiles = 16 / kWarps;  // of 16 entries that a warp computes
  constexpr int kRows = kRuns * 8, kGroupRows = kWarps * kRows;
  constexpr int kStage = lut_stage_bytes(kGroupRows), kUnitStride = kGroupRows * 8;
  constexpr int kX = kBooks ? 4 / kBooks : 1;  // distinct x fragments of a step
  constexpr int kWords = kG / 8;               // of a fragment
  // x is loaded two steps ahead where registers allow, else one.
  constexpr bool kAhead = kG == 8 && kBooks == 2;
  extern __shared__ __align__(1024) unsigned char dynamic[];
  unsigned char* const smem = dynamic + ((kLutTableAt - smem_address(dynamic)) & 0xffff);
  const Additive& a = p.a;
  const Schedule& s = p.s;
  const int B = a.codebooks, entries = a.entries(), stages = s.stages;
  unsigned char* const ring = smem + kLutTableBytes;
  uint64_t* const ready = reinterpret_cast<uint64_t*>(ring + stages * kStage);  // tables
  uint64_t* const read = ready + 2;                                             // by all warps
  uint64_t* const full = ready + 4;                                             // codes of a stage
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int block = warp * kRows / kBlockRows, run0 = warp * kRuns % 8;
  // Column of this lane: unit q of the step, vector v and half h of the unit (see `dot`).
  const int q = lane >> 4 | (lane >> 2 & 2), v = (lane >> 1 & 2) | (lane & 1), h = lane >> 1 & 1;
  const int code_offset = q * kUnitStride + q / 2 * 64 + run0 * 64 + v * 16 + h * 8;
  int begin = blockIdx.x * s.cells / s.ctas;
  const int end = (blockIdx.x + 1) * s.cells / s.ctas;

  if (threadIdx.x < 4) mbar::init(ready + threadIdx.x, kWarps);
  if (kBulk && threadIdx.x < stages) mbar::init(full + threadIdx.x, 1);
#if __CUDA_ARCH__ >= 900
  mbar::init_fence();
#endif
  grid_dependents_start();
  __syncthreads();

  // Codes of the next cell that is not in the ring: step `fetch_step` of phase `fetch_phase`.
  int fetch_cell = begin, fetch_stage = 0, fetch_step = 0, fetch_phase = 0, bytes = 0;
  const uint8_t* codes_of_group = nullptr;
  auto fetch = [&](int turn) {  // by lane 0 of warp `turn`, or by all threads
    if (fetch_cell < end) {
      if (++fetch_step == s.phase_units) {
        fetch_step = 0;
        ++fetch_phase;
      }
      if (fetch_cell == begin || fetch_phase * s.phase_units == s.units) {
        const int item = fetch_cell / s.units, u = fetch_cell - item * s.units;
        Piece group;
        locate_group(a, s, item % s.groups, &group);
        fetch_phase = u / s.phase_units;
        fetch_step = u - fetch_phase * s.phase_units;
        bytes = min(group.tiles * kUnitBytes, kUnitStride);
        codes_of_group = p.packed + size_t(group.tile) * kUnitBytes;
      }
      unsigned char* to = ring + fetch_stage * kStage;
      auto unit = [&](int i) {
        int n = fetch_step * kLutStepUnits + i;
        if constexpr (kBooks > 1) {  // a K step has B / 2 units, of which a phase takes one or two
          constexpr int kPer = kBooks / 2;
          n = min(n / kPer, s.last_kstep) * (B / 2) + fetch_phase * kPer + i % kPer;
        } else {
          n = min(n, s.last_unit);
        }
        return codes_of_group + size_t(n) * s.tiles * kUnitBytes;
      };
#if __CUDA_ARCH__ >= 900
      if (warp == turn && lane == 0) {
        mbar::expect(full + fetch_stage, kLutStepUnits * bytes);
#pragma unroll
        for (int i = 0; i < kLutStepUnits; ++i)
          mbar::bulk_copy(to + i * kUnitStride + i / 2 * 64, unit(i), bytes, full + fetch_stage);
      }
#else
      for (int at = threadIdx.x * 16; at < kLutStepUnits * bytes; at += kWarps * 32 * 16) {
        const int i = at / bytes, rest = at - i * bytes;
        copy_async(to + i * kUnitStride + i / 2 * 64 + rest, unit(i) + rest);
      }
#endif
      ++fetch_cell;
      if (++fetch_stage == stages) fetch_stage = 0;
    }
    if constexpr (!kBulk) copy_commit();
  };
#pragma unroll 1
  for (int i = 0; i < stages; ++i) fetch(i);

  int k = 0, stage = 0, stage_parity = 0, loaded = -1;
  // Entries e and e + 8 of this warp's tile (where it has only one) as A fragments: lane t has
  // dimensions kG / 4 * t .. of entries and x alike.
  uint32_t entry[kBooks ? kBooks : 1][2][kWords];
  auto load_entry = [&](const T* book, int tile, uint32_t (&to)[2][kWords]) {
    const int e = (warp + tile * kWarps) * 16 + g;
    const T* from = book + e * kG + kG / 4 * t;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const T* word = from + h * 8 * kG + w * 2;
        to[h][w] = e + h * 8 >= entries ? 0 : kTiles > 1 ? load_pair(word) : load_early(word);
      }
  };
  while (begin < end) {
    Piece piece;
    locate(a, s, begin, end, &piece);
    const int count = piece.u1 - piece.u0;
    const T* books = static_cast<const T*>(p.codebooks) + size_t(piece.part) * B * entries * kG;
    const T* x = static_cast<const T*>(p.x) + piece.pass * p.x_stride;
    float acc[kRows] = {};  // [row / 8][row % 8 - run0]
    uint32_t xf[kX][kWords] = {}, xn[kAhead ? kX : 1][kWords] = {};
    int phase = kBooks ? piece.u0 / s.phase_units : 0;  // of the next table
    int phase_step = piece.u0 - phase * s.phase_units;

    // x of the next step as B fragments: MMA n has columns c = 0..7 = half step n + 4 (c / 4),
    // vector c % 4.
    int next_step = phase_step, next_vector = 0;
    const T* next_x = nullptr;
    auto first_x = [&] {
      next_vector = (next_step * 8 + g / 4 * 4) / (kBooks ? kBooks : 1) * 4 + g % 4;
      next_x = x + size_t(next_vector) * kG + kG / 4 * t;
    };
    auto load_x = [&](uint32_t (&to)[kX][kWords]) {
      if constexpr (kBooks > 0) {
#pragma unroll
        for (int m = 0; m < kX; ++m) {
          Words<kWords> v = {};
          if (next_vector + m * 4 < a.in_groups) v = load_words<kWords>(next_x + m * 4 * kG);
#pragma unroll
          for (int w = 0; w < kWords; ++w) to[m][w] = v.w[w];
        }
        next_vector += 32 / kBooks;
        next_x += 32 / kBooks * kG;
        if (++next_step == s.phase_units) {
          next_step = 0;
          first_x();
        }
      }
    };
    auto load_entries = [&] {
      if constexpr (kBooks > 0 && kTiles == 1) {
        const int key = piece.part * kMaxBooks + phase;
        if (key == loaded) return;
        loaded = key;
#pragma unroll
        for (int b = 0; b < kBooks; ++b)
          load_entry(books + size_t(phase * kBooks + b) * entries * kG, 0, entry[b]);
      }
    };
    // The four MMAs of 16 entries x 32 columns. Column (n, c) of the MMAs is bank
    // (n / 2) * 16 + (c / 2) * 4 + n % 2 * 2 + c % 2, the lane that looks it up.
    auto dot = [&](int tile, int i, float (&c)[4][4]) {
      if constexpr (kBooks > 0) {
        if constexpr (kTiles > 1)
#pragma unroll
          for (int b = 0; b < kBooks; ++b)
            load_entry(books + size_t(phase * kBooks + b) * entries * kG, tile, entry[b]);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint32_t(&e)[2][kWords] = entry[n % kBooks];
          const uint32_t(&xs)[kWords] = xf[n / kBooks];
          if constexpr (kWords == 1) {
            mma_1688(c[n], e[0][0], e[1][0], xs[0], T());
          } else {
#pragma unroll
            for (int w = 0; w < kWords; w += 2) {
              const uint32_t pair[4] = {e[0][w], e[1][w], e[0][w + 1], e[1][w + 1]};
              mma_16816(c[n], pair, xs[w], xs[w + 1], T());
            }
          }
        }
      } else {
        // The two halves of an MMA's columns have different codebooks: the other half's x is zero.
        const int e = (warp + tile * kWarps) * 16 + g;
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll 1
          for (int h = 0; h < 2; ++h) {  // unrolled, the loads of all n move up and registers spill
            const int step = (piece.u0 + i) * 8 + n + h * 4, vector = step / B * 4 + g % 4;
            const T* from = books + size_t(step % B * entries + e) * kG + kG / 4 * t;
            Words<kG / 8> lo = {}, hi = {}, xs = {};
            if (e < entries) lo = load_words<kG / 8>(from);
            if (e + 8 < entries) hi = load_words<kG / 8>(from + 8 * kG);
            if (g / 4 == h && vector < a.in_groups)
              xs = load_words<kG / 8>(x + size_t(vector) * kG + kG / 4 * t);
#pragma unroll
            for (int d = 0; d < kG / 8; ++d) mma_1688(c[n], lo.w[d], hi.w[d], xs.w[d], T());
          }
      }
    };
    // Table of step i. Rows alternate between the halves of the columns, so that a quarter warp
    // fills all banks.
    auto build = [&](int i, int table) {
      load_entries();
#pragma unroll 1
      for (int tile = 0; tile < kTiles; ++tile) {
        float c[4][4] = {};
        dot(tile, i, c);
        unsigned char* to =
            smem + ((warp + tile * kWarps) * 16 + g) * kLutPitch + table * 128 + t * 16;
        const bool odd = g % 2;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float4 lo = make_float4(c[0][2 * h], c[0][2 * h + 1], c[1][2 * h], c[1][2 * h + 1]);
          const float4 hi = make_float4(c[2][2 * h], c[2][2 * h + 1], c[3][2 * h], c[3][2 * h + 1]);
          unsigned char* row = to + h * 8 * kLutPitch;
          *reinterpret_cast<float4*>(row + (odd ? 64 : 0)) = odd ? hi : lo;
          *reinterpret_cast<float4*>(row + (odd ? 0 : 64)) = odd ? lo : hi;
        }
      }
      if constexpr (kBooks > 0) {
        if constexpr (kAhead) {
#pragma unroll
          for (int m = 0; m < kX; ++m)
#pragma unroll
            for (int w = 0; w < kWords; ++w) xf[m][w] = xn[m][w];
          load_x(xn);
        } else {
          load_x(xf);
        }
        if (++phase_step == s.phase_units) {
          phase_step = 0;
          ++phase;
        }
      }
      if constexpr (!kBulk) {  // this thread's codes of step i have landed
        if (stages > 2) copy_wait<1>();
        else copy_wait<0>();
      }
      __syncwarp();
      if (lane == 0) mbar::arrive(ready + table);
    };

    load_entries();
    first_x();
    if (k == 0) grid_dependency_wait();
    load_x(xf);
    if constexpr (kAhead) load_x(xn);
    build(0, k & 1);
    for (int i = 0; i < count; ++i, ++k) {
      const int table = k & 1;
      mbar::wait(ready + table, k >> 1 & 1);
      if constexpr (kBulk) mbar::wait(full + stage, stage_parity);
      const unsigned char* codes =
          ring + stage * kStage + code_offset + min(block, piece.tiles - 1) * kUnitBytes;
      const uint32_t column = smem_address(smem) - kLutTableAt + lane * 4 + table * 128;
      auto lookup = [&](int r) {
        const uint2 c = *reinterpret_cast<const uint2*>(codes + r * 64);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t at = __byte_perm(j < 4 ? c.x : c.y, column, 0x7604 | j % 4 << 4);
          acc[j * kRuns + r] += load_shared<kLutTableAt>(at);
        }
      };
#pragma unroll
      for (int r = 0; r < kRuns / 2; ++r) lookup(r);
      if (k > 0) mbar::wait(read + (table ^ 1), (k - 1) >> 1 & 1);
      if (k > 0) fetch(k % kWarps);  // into the stage of step k - 1
      if (i + 1 < count) build(i + 1, table ^ 1);
#pragma unroll
      for (int r = kRuns / 2; r < kRuns; ++r) lookup(r);
      __syncwarp();
      if (lane == 0) mbar::arrive(read + table);
      if (++stage == stages) {
        stage = 0;
        stage_parity ^= 1;
      }
    }
    asm volatile("" : "+r"(begin));  // found again, the piece needs no registers during the loop
    locate(a, s, begin, end, &piece);
    begin += count;
    // Each exchange halves the rows that a lane holds.
#pragma unroll
    for (int d = 16, n = kRows / 2; d > 0; d /= 2, n /= 2) {
      const bool upper = lane & d;
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        if (i >= n) break;
        const float send = upper ? acc[i] : acc[i + n];
        acc[i] = (upper ? acc[i + n] : acc[i]) + __shfl_xor_sync(~0u, send, d);
      }
    }
    float* out = slot_of(p, piece, 0) + block * kBlockRows + run0;
#pragma unroll
    for (int i = 0; i < kRows / 32; ++i) {
      const int row = lane * (kRows / 32) + i;
      out[row / kRuns * 8 + row % kRuns] = acc[i];
    }
  }
}

}  // namespace aqlm
