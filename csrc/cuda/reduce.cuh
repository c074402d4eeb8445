// Second kernel of every matmul: y = scale * (sum of the partial slots, in order) + bias.
//
// Grid: (element chunks, items that were cut). A block covers a chunk of the item's
// [slot_tokens][group_rows] and each of its `ways` thread rows sums every ways-th slot, so that all
// loads of a thread are in flight together. Launched as a dependent of the matmul: its blocks are
// already resident when the last partial is written. (The alternative, one CTA per row group that
// arrives last and reduces alone, cost 8 to 40 us: one SM's worth of loads. H200, 2026-11-22.)
#pragma once

#include <type_traits>

#include "streamk.cuh"

namespace aqlm {

constexpr int kReduceThreads = 256;
constexpr int kReduceInFlight = 8;

// Neighbouring rows that a thread sums: four where slots are few. kBeside: two, so that the blocks
// of a matmul's reduction are no more than there are SMs.
AQLM_HD constexpr int reduce_each(int ways, bool beside) { return ways == 1 ? 4 : beside ? 2 : 1; }

// kBeside: 32 registers, which a 1x16 matmul of one token leaves for one block an SM (split.cuh).
// Its reduction is then resident when it ends, and the next matmul starts to fill its tables while
// the sums are added: 4096 x 4096 int8 11.9 us against 14.0 (with shorter prologues: streamk.cuh).
template <typename T, int kWays, bool kBeside>
__global__ void __launch_bounds__(kReduceThreads, kBeside ? 8 : 6)
reduce_kernel(const __grid_constant__ MatmulParams p) {
  constexpr int kThreads = kReduceThreads / kWays, kEach = reduce_each(kWays, kBeside);
  using Sum = std::conditional_t<kEach == 4, float4, std::conditional_t<kEach == 2, float2, float>>;
  __shared__ Sum sums[kWays][kThreads];
  if constexpr (kBeside) grid_dependents_start();
  const Schedule& s = p.s;
  const int element = threadIdx.x % kThreads, way = threadIdx.x / kThreads;
  const int i = (blockIdx.x * kThreads + element) * kEach;
  const int r = i & (s.group_rows - 1), m = i >> s.group_shift;
  Piece g;
  const int item = blockIdx.y;
  locate_group(p.a, s, group_of(s, s.whole + item, &g.pass), &g);
  const int token = g.pass * s.slot_tokens + m;
  const bool valid = r < g.rows && m < s.slot_tokens && token < p.tokens;
  const int n = g.row + r;
  const int cell = item * s.units;
  const int ctas = cta_of(s, cell + s.units - 1) - cta_of(s, cell) + 1;
  const int slots = ctas * s.classes * s.lanes;
  const size_t stride = size_t(s.slot_tokens) * s.group_rows;
  const float* from = p.partials + size_t(item) * s.max_slots * stride + i;
  if constexpr (!kBeside) asm volatile("" : "+l"(from));  // not the addresses of all slots at once
  float scale[kEach] = {};
#pragma unroll
  for (int e = 0; e < kEach; ++e)
    if (valid && r + e < g.rows) scale[e] = to_float(static_cast<const T*>(p.scales)[n + e]);
  if constexpr (!kBeside) grid_dependents_start();
  grid_dependency_wait();

  float sum[kEach] = {};
  if (valid)
    for (int k = way; k < slots; k += kWays * kReduceInFlight) {
      Sum v[kReduceInFlight];
#pragma unroll
      for (int j = 0; j < kReduceInFlight; ++j)
        v[j] = k + j * kWays < slots
                   ? __ldcg(reinterpret_cast<const Sum*>(from + (k + j * kWays) * stride))
                   : Sum();
#pragma unroll
      for (int j = 0; j < kReduceInFlight; ++j)
#pragma unroll
        for (int e = 0; e < kEach; ++e) sum[e] += reinterpret_cast<const float*>(&v[j])[e];
    }
  if constexpr (kWays > 1) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) reinterpret_cast<float*>(&sums[way][element])[e] = sum[e];
    __syncthreads();
    if (way > 0) return;
#pragma unroll
    for (int k = 1; k < kWays; ++k)
#pragma unroll
      for (int e = 0; e < kEach; ++e)
        sum[e] += reinterpret_cast<const float*>(&sums[k][element])[e];
  }
  if (!valid) return;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    if (r + e >= g.rows) return;
    float v = sum[e] * scale[e];
    if (p.x_scales != nullptr)
      v *= reinterpret_cast<const float*>(p.aux)[g.part] * p.x_scales[token];
    if (p.bias != nullptr) v += to_float(static_cast<const T*>(p.bias)[n + e]);
    static_cast<T*>(p.y)[size_t(token) * p.a.out_groups() + n + e] = from_float<T>(v);
  }
}

}  // namespace aqlm
