// Second kernel of every matmul: y = scale * (sum of the partial slots, in order) + bias.
//
// Grid: (element chunks, row groups). A block covers kReduceThreads / ways elements of the group's
// [tokens][group_rows] and each of its `ways` thread rows sums every ways-th slot, so that all loads
// of a thread are in flight together. Launched as a dependent of the matmul: its blocks are already
// resident when the last partial is written. (The alternative, one CTA per row group that arrives
// last and reduces alone, cost 8 to 40 us: one SM's worth of loads. H200, 2026-11-22.)
#pragma once

#include "streamk.cuh"

namespace aqlm {

constexpr int kReduceThreads = 256;
constexpr int kReduceInFlight = 8;

template <typename T, int kWays>
__global__ void __launch_bounds__(kReduceThreads)
reduce_kernel(const __grid_constant__ MatmulParams p) {
  constexpr int kElements = kReduceThreads / kWays;
  __shared__ float sums[kWays][kElements];
  const Schedule& s = p.s;
  const int element = threadIdx.x % kElements, way = threadIdx.x / kElements;
  const int i = blockIdx.x * kElements + element;
  const int r = i & (s.group_rows - 1), m = i >> s.group_shift;
  Piece g;
  locate_group(p.a, s, blockIdx.y, &g);
  const bool valid = r < g.rows && m < p.tokens;
  const int n = g.row + r;
  const int cell = g.group * s.units;
  const int ctas = cta_of(s, cell + s.units - 1) - cta_of(s, cell) + 1;
  const int slots = ctas * s.classes * s.lanes;
  const size_t stride = size_t(p.tokens) * s.group_rows;
  const float* from = p.partials + size_t(g.group) * s.max_slots * stride + i;
  const float scale = valid ? to_float(static_cast<const T*>(p.scales)[n]) : 0.f;
  grid_dependents_start();
  grid_dependency_wait();

  float sum = 0.f;
  if (valid)
    for (int k = way; k < slots; k += kWays * kReduceInFlight) {
      float v[kReduceInFlight];
#pragma unroll
      for (int j = 0; j < kReduceInFlight; ++j)
        v[j] = k + j * kWays < slots ? __ldcg(from + (k + j * kWays) * stride) : 0.f;
#pragma unroll
      for (int j = 0; j < kReduceInFlight; ++j) sum += v[j];
    }
  if constexpr (kWays > 1) {
    sums[way][element] = sum;
    __syncthreads();
    if (way > 0) return;
#pragma unroll
    for (int k = 1; k < kWays; ++k) sum += sums[k][element];
  }
  if (!valid) return;
  float v = sum * scale;
  if (p.x_scales != nullptr)
    v *= reinterpret_cast<const float*>(p.aux)[g.part] * p.x_scales[m];
  if (p.bias != nullptr) v += to_float(static_cast<const T*>(p.bias)[n]);
  static_cast<T*>(p.y)[size_t(m) * p.a.out_groups() + n] = from_float<T>(v);
}

}  // namespace aqlm
