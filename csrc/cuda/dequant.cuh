// cuda.additive.dequant: a block of rows and columns of the dense weight.
//
// W[row, v * G + c] = scale * sum_b codebook[b][code][c]: float32 sum in codebook order, one
// rounding. (A product of two 16-bit values is exact in float32: with one codebook, 16-bit
// multiplication rounds the same once.) DequantParams::rounded_sum lets the sum of two codebooks be
// rounded to 16 bits before the scale, a third of the instructions. Used for prefill and for the
// input gradient in slices, and by the
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

// Eight values to be scaled by one number and stored, as loaded: 16-bit values stay packed.
template <typename T>
struct Eight {
  uint4 v;
  __device__ __forceinline__ void load(const T* from) {
    v = __ldg(reinterpret_cast<const uint4*>(from));
  }
};
template <>
struct Eight<float> {
  float v[8];
  __device__ __forceinline__ void load(const float* from) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __ldg(from + i);
  }
};

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

// A number twice in one register, as the stored type.
template <typename T>
__device__ __forceinline__ uint32_t twice(float v) {
  const T h = from_float<T>(v);
  return *reinterpret_cast<const uint16_t*>(&h) * 0x10001u;
}

template <typename T>
__device__ __forceinline__ void store_scaled(T* to, uint4 v, float scale) {
  const uint32_t s = twice<T>(scale);
  store_vector(to, mul2(v.x, s, T()), mul2(v.y, s, T()), mul2(v.z, s, T()), mul2(v.w, s, T()));
}
__device__ __forceinline__ void store_scaled(float* to, const float (&v)[8], float scale) {
  store8(to, v, scale);
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

// Any B and G of byte storage: eight gathers (one for each row of the lane) are in flight.
template <typename T>
__global__ void __launch_bounds__(kDequantWarps * 32)
dequant_bytes_kernel(const __grid_constant__ DequantParams p, int tile0) {
  const Additive& a = p.a;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int G = a.in_group, B = a.codebooks;
  const int kstep = p.col0 / (kStepVectors * G) + blockIdx.x * kDequantWarps + threadIdx.x / 32;
  const int k = (kstep * kStepVectors + t) * G;
  grid_dependents_start();
  grid_dependency_wait();
  if (k < p.col0 || k >= p.col1) return;
  int part, row;
  const int tile = tile0 + blockIdx.y;
  locate_tile(a, tile, &part, &row);
  const int rows_end = min(p.row1, a.row0[part + 1]);
  const T* books = static_cast<const T*>(p.codebooks) + size_t(part) * B * a.entries() * G;
  for (int c = 0; c < G; c += 8) {
    float sum[8][8] = {};
    for (int b = 0; b < B; ++b) {
      const int step = kstep * B + b;
      const uint2 words = __ldg(reinterpret_cast<const uint2*>(
          p.packed + a.unit_offset(tile, step / 2) + lane * 16 + step % 2 * 8));
      const T* book = books + size_t(b) * a.entries() * G + c;
#pragma unroll
      for (int r = 0; r < 8; ++r)
        add8(book + ((r < 4 ? words.x : words.y) >> (r % 4 * 8) & 255) * G, sum[r]);
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const int n = row + r * 8 + g;
      if (n < p.row0 || n >= rows_end) continue;
      T* out = static_cast<T*>(p.out) + (n - p.row0) * p.out_stride + (k - p.col0) + c;
      store8(out, sum[r], to_float(static_cast<const T*>(p.scales)[n]));
    }
  }
}

// Persistent CTAs with the tables of one part after the other; tiles [tile0, tile0 + tiles).
// kRound: codebooks are added in 16 bits (see above).
AQLM_HD constexpr int dequant_tables_warps(int codebooks) { return codebooks == 4 ? 16 : 8; }
template <typename T, int B, bool kRound>
__global__ void __launch_bounds__(dequant_tables_warps(B) * 32)
dequant_tables_kernel(const __grid_constant__ DequantParams p, int tile0, int tiles) {
  constexpr int kWarps = dequant_tables_warps(B);
  extern __shared__ __align__(1024) unsigned char smem[];
  const Additive& a = p.a;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t lane_offset = lane % 8 * 16;
  const int kstep0 = p.col0 / 32, ksteps = ceil_div(p.col1, 32) - kstep0;
  const int warps = gridDim.x * kWarps, all_tiles = a.tile0(a.parts);
  grid_dependents_start();
  grid_dependency_wait();
  for (int part = 0; part < a.parts; ++part) {
    const int first = max(a.tile0(part), tile0), end = min(a.tile0(part + 1), tile0 + tiles);
    if (first >= end) continue;
    __syncthreads();
    fill_books<T, B, false>(p, part, smem);
    __syncthreads();
    const int row_end = min(p.row1, a.row0[part + 1]), items = (end - first) * ksteps;
    uint2 next[B];
    auto fetch = [&](int i) {  // the codes of 64 rows x 4 vectors
      if (i >= items) return;
#pragma unroll
      for (int b = 0; b < B; ++b) {
        const int step = (kstep0 + i % ksteps) * B + b;
        next[b] = __ldg(reinterpret_cast<const uint2*>(
            p.packed + (size_t(step / 2) * all_tiles + first + i / ksteps) * kUnitBytes +
            lane * 16 + step % 2 * 8));
      }
    };
    int i = blockIdx.x * kWarps + threadIdx.x / 32;
    fetch(i);
    for (; i < items; i += warps) {
      const int tile = first + i / ksteps, kstep = kstep0 + i % ksteps;
      const int row = a.row0[part] + (tile - a.tile0(part)) * kBlockRows + g;
      const int k = kstep * 32 + t * 8;
      uint2 words[B];
#pragma unroll
      for (int b = 0; b < B; ++b) words[b] = next[b];
      fetch(i + warps);
      float scale[8];
#pragma unroll
      for (int r = 0; r < 8; ++r)
        scale[r] = to_float(__ldg(static_cast<const T*>(p.scales) + min(row + r * 8, row_end - 1)));
      if (k < p.col0 || k >= p.col1) continue;
      T* out = static_cast<T*>(p.out) + (k - p.col0);
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        uint4 v[B];
#pragma unroll
        for (int b = 0; b < B; ++b)
          v[b] = *reinterpret_cast<const uint4*>(
              smem + b * kMmaBookBytes +
              entry_offset<7>(r < 4 ? words[b].x : words[b].y, r % 4, lane_offset));
        const int n = row + r * 8;
        if (n < p.row0 || n >= row_end) continue;
        T* to = out + (n - p.row0) * p.out_stride;
        if constexpr (B == 1) {
          store_scaled(to, v[0], scale[r]);
        } else if constexpr (kRound) {
          uint4 sum = MmaTraits<T, false>::add(v[0], v[1]);
          if constexpr (B == 4)
            sum = MmaTraits<T, false>::add(sum, MmaTraits<T, false>::add(v[2], v[3]));
          store_scaled(to, sum, scale[r]);
        } else {
          float sum[8], other[8];
          unpack8<T>(v[0], sum);
#pragma unroll
          for (int b = 1; b < B; ++b) {
            unpack8<T>(v[b], other);
#pragma unroll
            for (int c = 0; c < 8; ++c) sum[c] += other[c];
          }
          store8(to, sum, scale[r]);
        }
      }
    }
  }
}

// Codes of 4 lanes x 4 vectors (2 words of 2 codes each), transposed: lane t gets the t-th code of
// every lane, so that the four lanes gather, and then store, four consecutive vectors.
__device__ __forceinline__ void transpose_codes(uint32_t& w0, uint32_t& w1, int t) {
  const uint32_t far = __shfl_xor_sync(~0u, t < 2 ? w1 : w0, 2);
  (t < 2 ? w1 : w0) = far;
  const bool odd = t % 2;
  const uint32_t near = __shfl_xor_sync(~0u, __byte_perm(w0, w1, odd ? 0x5410 : 0x7632), 1);
  w0 = odd ? __byte_perm(w0, near, 0x3254) : __byte_perm(w0, near, 0x5410);
  w1 = odd ? __byte_perm(w1, near, 0x3276) : __byte_perm(w1, near, 0x7610);
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
  const uint32_t choices = __ldg(reinterpret_cast<const uint32_t*>(
                               p.packed + a.choice_offset(tile, unit)) + lane) >>
                           unit % kChoiceUnits * 2;
  const uint32_t upper = second_copies(choices, 0), lower = second_copies(choices, 1);
  uint32_t words[4] = {plain_codes(c.x, upper, 0), plain_codes(c.y, upper, 1),
                       plain_codes(c.z, lower, 0), plain_codes(c.w, lower, 1)};
  transpose_codes(words[0], words[1], t);
  transpose_codes(words[2], words[3], t);
  const int G = a.in_group;
  float scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int n = min(row + h * 8 + g, rows_end - 1);
    scale[h] = to_float(__ldg(static_cast<const T*>(p.scales) + n));
  }
  for (int chunk = 0; chunk < G; chunk += 8) {
    Eight<T> v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      v[i].load(books + size_t(words[i / 2] >> (i % 2 * 16) & 0xffff) * G + chunk);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int n = row + i / 4 * 8 + g, k = (unit * kTileVectors + i % 4 * 4 + t) * G;
      if (n >= rows_end || n < p.row0 || n >= p.row1 || k < p.col0 || k >= p.col1) continue;
      store_scaled(static_cast<T*>(p.out) + (n - p.row0) * p.out_stride + (k - p.col0) + chunk,
                   v[i].v, scale[i / 4]);
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
