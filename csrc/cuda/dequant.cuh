// cuda.additive.dequant: a block of rows and columns of the dense weight.
//
// W[row, v * G + c] = scale * sum_b codebook[b][code][c]: float32 sum in codebook order, one
// rounding. Used for prefill and for the input gradient in slices that stay in L2, and by the
// dequantize op. One warp per (64 rows x 4 vectors) of byte storage or unit of word storage, so the
// codes are read as they lie; row storage has one thread per vector. Byte storage with G = 8 reads
// entries from the replicated shared-memory tables of cuda.additive.mma, the rest gathers them
// through L1 and L2, 16 bytes at a time. Architectures sm_80+.
#pragma once

#include "gather.cuh"
#include "mma.cuh"

namespace aqlm {

constexpr int kDequantWarps = 8;

// Adds eight consecutive values.
template <typename T>
__device__ __forceinline__ void add8(const T* from, float (&sum)[8]) {
  float v[8];
  unpack8<T>(__ldg(reinterpret_cast<const uint4*>(from)), v);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] += v[i];
}
template <>
__device__ __forceinline__ void add8<float>(const float* from, float (&sum)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] += __ldg(from + i);
}

// One 16-byte store.
__device__ __forceinline__ void store_vector(void* to, uint32_t a, uint32_t b, uint32_t c,
                                             uint32_t d) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};"
               :: "l"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ uint32_t pack2(float a, float b, __half) {
  const __half2 h = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}
__device__ __forceinline__ uint32_t pack2(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}

// Stores eight scaled values; `to` is 16-byte aligned. Through uint4 the compiler emits four 4-byte
// stores here, four times the L2 requests, hence store_vector.
template <typename T>
__device__ __forceinline__ void store8(T* to, const float (&v)[8], float s) {
  store_vector(to, pack2(v[0] * s, v[1] * s, T()), pack2(v[2] * s, v[3] * s, T()),
               pack2(v[4] * s, v[5] * s, T()), pack2(v[6] * s, v[7] * s, T()));
}
template <>
__device__ __forceinline__ void store8<float>(float* to, const float (&v)[8], float s) {
  float4* out = reinterpret_cast<float4*>(to);
  out[0] = make_float4(v[0] * s, v[1] * s, v[2] * s, v[3] * s);
  out[1] = make_float4(v[4] * s, v[5] * s, v[6] * s, v[7] * s);
}

// One vector of byte or word storage (out group 1), all codebooks.
template <typename T>
__device__ __forceinline__ void dequant_vector(const DequantParams& p, const T* books, int row,
                                               int vector, const int* codes) {
  const int G = p.a.in_group, k = vector * G;
  if (row < p.row0 || row >= p.row1 || k < p.col0 || k >= p.col1) return;
  const float scale = to_float(static_cast<const T*>(p.scales)[row]);
  T* out = static_cast<T*>(p.out) + (row - p.row0) * p.out_stride + (k - p.col0);
  for (int c = 0; c < G; c += 8) {
    float sum[8] = {};
    for (int b = 0; b < p.a.codebooks; ++b)
      add8(books + (size_t(b) * p.a.entries() + codes[b]) * G + c, sum);
    store8(out + c, sum, scale);
  }
}

// Which part a row tile belongs to, and the first row of the tile.
__device__ __forceinline__ void locate_tile(const Additive& a, int tile, int* part, int* row) {
  int p = 0;
  for (; p + 1 < a.parts; ++p) {
    const int tiles = ceil_div(a.rows_of(p), a.tile_rows());
    if (tile < tiles) break;
    tile -= tiles;
  }
  *part = p;
  *row = a.row0[p] + tile * a.tile_rows();
}

// kBooks: codebooks when fixed at compile time, else 0 (then at most kMaxBooks).
template <typename T, int kBooks>
__global__ void __launch_bounds__(kDequantWarps * 32)
dequant_bytes_kernel(const __grid_constant__ DequantParams p, int tile0) {
  const Additive& a = p.a;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int kstep = p.col0 / (kStepVectors * a.in_group) +
                    blockIdx.x * kDequantWarps + threadIdx.x / 32;
  const int vector = kstep * kStepVectors + t;
  grid_dependents_start();
  grid_dependency_wait();
  if (vector * a.in_group >= p.col1) return;
  int part, row;
  const int tile = tile0 + blockIdx.y, B = kBooks ? kBooks : a.codebooks;
  locate_tile(a, tile, &part, &row);
  const int rows_end = a.row0[part + 1];
  const T* books = static_cast<const T*>(p.codebooks) + size_t(part) * B * a.entries() * a.in_group;
  uint2 words[kBooks ? kBooks : kMaxBooks];
#pragma unroll
  for (int b = 0; b < (kBooks ? kBooks : kMaxBooks); ++b)
    if (b < B) {
      const int step = kstep * B + b;
      words[b] = *reinterpret_cast<const uint2*>(
          p.packed + a.unit_offset(tile, step / 2) + lane * 16 + step % 2 * 8);
    }
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    int codes[kBooks ? kBooks : kMaxBooks];
#pragma unroll
    for (int b = 0; b < (kBooks ? kBooks : kMaxBooks); ++b)
      if (b < B) codes[b] = (r < 4 ? words[b].x : words[b].y) >> (r % 4 * 8) & 255;
    if (row + r * 8 + g < rows_end) dequant_vector(p, books, row + r * 8 + g, vector, codes);
  }
}

// Persistent CTAs with the tables of one part after the other; tiles [tile0, tile0 + tiles).
template <typename T, int B>
__global__ void __launch_bounds__(kDequantWarps * 32)
dequant_tables_kernel(const __grid_constant__ DequantParams p, int tile0, int tiles) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const Additive& a = p.a;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t lane_offset = lane % 8 * 16;
  const int kstep0 = p.col0 / 32, ksteps = ceil_div(p.col1, 32) - kstep0;
  const int warps = gridDim.x * kDequantWarps, all_tiles = a.tile0(a.parts);
  grid_dependents_start();
  grid_dependency_wait();
  for (int part = 0; part < a.parts; ++part) {
    const int first = max(a.tile0(part), tile0), end = min(a.tile0(part + 1), tile0 + tiles);
    if (first >= end) continue;
    __syncthreads();
    fill_books<T, B, false>(p, part, smem);
    __syncthreads();
    const int row_end = min(p.row1, a.row0[part + 1]);
    for (int i = blockIdx.x * kDequantWarps + threadIdx.x / 32; i < (end - first) * ksteps;
         i += warps) {
      const int tile = first + i / ksteps, kstep = kstep0 + i % ksteps;
      const int row = a.row0[part] + (tile - a.tile0(part)) * kBlockRows + g, k = kstep * 32 + t * 8;
      uint2 words[B];
#pragma unroll
      for (int b = 0; b < B; ++b) {
        const int step = kstep * B + b;
        words[b] = __ldg(reinterpret_cast<const uint2*>(
            p.packed + (size_t(step / 2) * all_tiles + tile) * kUnitBytes + lane * 16 +
            step % 2 * 8));
      }
      float scale[8];
#pragma unroll
      for (int r = 0; r < 8; ++r)
        scale[r] = to_float(__ldg(static_cast<const T*>(p.scales) + min(row + r * 8, row_end - 1)));
      if (k < p.col0 || k >= p.col1) continue;
      T* out = static_cast<T*>(p.out) + (k - p.col0);
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const int n = row + r * 8;
        if (n < p.row0 || n >= row_end) continue;
        float sum[8] = {};
#pragma unroll
        for (int b = 0; b < B; ++b) {
          float v[8];
          const uint32_t w = r < 4 ? words[b].x : words[b].y;
          unpack8<T>(*reinterpret_cast<const uint4*>(smem + b * kMmaBookBytes +
                                                     entry_offset<7>(w, r % 4, lane_offset)), v);
#pragma unroll
          for (int c = 0; c < 8; ++c) sum[c] += v[c];
        }
        store8(out + (n - p.row0) * p.out_stride, sum, scale[r]);
      }
    }
  }
}

// G = 8 or 16, one codebook: eight gathers are in flight before the first store.
template <typename T>
__global__ void __launch_bounds__(kDequantWarps * 32)
dequant_words_kernel(const __grid_constant__ DequantParams p, int tile0) {
  const Additive& a = p.a;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int unit = p.col0 / (kTileVectors * a.in_group) +
                   blockIdx.x * kDequantWarps + threadIdx.x / 32;
  grid_dependents_start();
  grid_dependency_wait();
  if (unit >= a.units() || unit * kTileVectors * a.in_group >= p.col1) return;
  int part, row;
  const int tile = tile0 + blockIdx.y;
  locate_tile(a, tile, &part, &row);
  const int rows_end = a.row0[part + 1];
  const T* books = static_cast<const T*>(p.codebooks) + size_t(part) * a.entries() * a.in_group;
  const uint4 c = load_stream(p.packed + a.unit_offset(tile, unit) + lane * 16);
  const uint32_t words[4] = {c.x, c.y, c.z, c.w};
  const int G = a.in_group;
  float scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int n = min(row + h * 8 + g, rows_end - 1);
    scale[h] = to_float(__ldg(static_cast<const T*>(p.scales) + n));
  }
  for (int chunk = 0; chunk < G; chunk += 8) {
    float v[8][8] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      add8(books + size_t(words[i / 2] >> (i % 2 * 16) & 0xffff) * G + chunk, v[i]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int n = row + i / 4 * 8 + g, k = (unit * kTileVectors + t * 4 + i % 4) * G;
      if (n >= rows_end || n < p.row0 || n >= p.row1 || k < p.col0 || k >= p.col1) continue;
      store8(static_cast<T*>(p.out) + (n - p.row0) * p.out_stride + (k - p.col0) + chunk, v[i],
             scale[i / 4]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(256)
dequant_rows_kernel(const __grid_constant__ DequantParams p) {
  const Additive& a = p.a;
  const int G = a.in_group, O = a.out_group, B = a.codebooks;
  const int vector = p.col0 / G + blockIdx.x * blockDim.x + threadIdx.x;
  const int n = p.row0 + blockIdx.y;
  grid_dependents_start();
  grid_dependency_wait();
  if (vector * G >= p.col1) return;
  const int row = n / O, inner = n % O;
  const T* books = static_cast<const T*>(p.codebooks) +
                   size_t(a.part_of(row)) * B * a.entries() * O * G;
  const float scale = to_float(static_cast<const T*>(p.scales)[row]);
  T* out = static_cast<T*>(p.out) + (n - p.row0) * p.out_stride + vector * G - p.col0;
  for (int c = 0; c < G; ++c) {
    float sum = 0.f;
    for (int b = 0; b < B; ++b) {
      const int code = row_code(a, p.packed, (size_t(row) * a.in_groups + vector) * B + b);
      sum += to_float(books[((size_t(b) * a.entries() + code) * O + inner) * G + c]);
    }
    out[c] = from_float<T>(sum * scale);
  }
}

}  // namespace aqlm
