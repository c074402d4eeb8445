// Rotation of many tokens of 16-bit values: one pass over memory, as near its rate as may be.
//
// Index of a vector: r * P + c with c < P = 64 * kWarps and r < F * Q <= 32, Q the top bits of the
// Sylvester index, so that U = (H_F x S_Q) x S_P. kWarps warps have a token, 64 columns each:
//   tensor cores     the matrix of +-1 over r; B from 16-byte loads, n tile j = columns 8 g + j
//   registers        bits 0 .. 3 of c (j, and the pair of the accumulator)
//   shuffles         bits 4, 5 (lanes t)
//   shared memory    the bits of the warp, once there and back; coalesced stores
// Accumulators are float32. With a `pre` the product is split into two bfloat16 parts (16 bits of
// significand); without, the values are operands as they are. `pre` or `post` stay in shared memory
// for all tokens of a block, 24 bits each, in the order in which a thread needs them.
// Architectures sm_80+.
#include <algorithm>
#include <type_traits>

#include "enqueue.cuh"
#include "hadamard.cuh"
#include "hadamard_many.h"

namespace aqlm {
namespace {

constexpr int kManyThreads = 512;
constexpr int kManyRows = 32, kManyColumns = 64;  // padded rows; columns of a warp
constexpr int kKeptChunks = 8;                    // of eight values a thread: pre or post
constexpr int kMatrixBytes = 4 * 32 * 16;         // four 16 x 16 operands

// Bytes of shared memory: `groups` tokens at a time, kWarps warps each.
int many_smem(int rows, int warps, int groups) {
  return kKeptChunks * warps * 32 * (16 + 8) + kMatrixBytes +
         groups * rows * warps * kManyColumns * 4;
}

// 1, -1 or 0 (padding) of the matrix over rows, as two 16-bit operands.
template <typename Operand>
__device__ uint32_t matrix_pair(const Rotation& r, int log_q, int row, int k) {
  const int F = r.factor, rows = F << log_q;
  Operand pair[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float v = 0.f;
    if (row < rows && k + i < rows) {
      const int a = row >> log_q, b = (k + i) >> log_q;
      const bool minus = F > 1 && __ldg(r.h + (r.transpose ? b * F + a : a * F + b)) < 0;
      v = (__popc(row & (k + i) & ((1 << log_q) - 1)) & 1) != minus ? -1.f : 1.f;
    }
    pair[i] = from_float<Operand>(v);
  }
  return *reinterpret_cast<const uint32_t*>(pair);
}

// 24 bits of a float: 16 in a half of `high`, 8 in a byte of `low`, which fills the last byte too.
__device__ __forceinline__ float kept_value(uint32_t high, uint32_t low, int half, int byte) {
  return __uint_as_float(
      __byte_perm(high, low, (half ? 0x3200 : 0x1000) | (4 + byte) << 4 | (4 + byte)));
}

// Elements 4 i .. 4 i + 3 of chunk `chunk` of what the thread `owner` of a group keeps: where in the
// vector they are; past it: n.
template <int kWarps, bool kPre>
__device__ __forceinline__ int kept_place(int rows, int chunk, int owner, int i) {
  constexpr int P = kManyColumns * kWarps;
  if constexpr (kPre) {  // pairs of columns of rows q = 2 i, 2 i + 1
    const int lane = owner % 32, kt = chunk / 4;
    const int row = 16 * kt + lane % 4 * 2 + 8 * i;
    const int column = owner / 32 * kManyColumns + lane / 4 * 8 + chunk % 4 * 2;
    return row * P + column;  // and the next row
  } else {
    const int f = 2 * chunk + i, id = f / kWarps * kWarps * 32 + owner, r = f % kWarps;
    const int row = id >> 4;
    return row < rows ? row * P + 64 * r + (id & 15) * 4 : rows * P;
  }
}

template <int kWarps>
__device__ __forceinline__ void group_barrier(int group) {
  if constexpr (kWarps == 1) __syncwarp();
  else if constexpr (kWarps * 32 == kManyThreads) __syncthreads();
  else asm volatile("bar.sync %0, %1;" :: "r"(group + 1), "n"(kWarps * 32) : "memory");
}

template <typename T>
__device__ __forceinline__ uint32_t pack2(float a, float b) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 v = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
}

// Whether the next token is loaded while this one is finished: ptxas spills for sm_80.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kLoadsAhead = true;
#else
constexpr bool kLoadsAhead = false;
#endif

// Blocks of up to kManyThreads threads walk over the tokens, a group of kWarps warps each.
template <typename T, int kWarps, bool kPre>
__global__ void __launch_bounds__(kManyThreads, 1)
rotate_many_kernel(const __grid_constant__ RotateParams p, int log_q) {
  using Operand = std::conditional_t<kPre, __nv_bfloat16, T>;
  constexpr int kGroup = kWarps * 32, P = kManyColumns * kWarps;
  extern __shared__ __align__(16) unsigned char many_smem_bytes[];
  uint4* const kept_high = reinterpret_cast<uint4*>(many_smem_bytes);
  uint2* const kept_low = reinterpret_cast<uint2*>(kept_high + kKeptChunks * kGroup);
  uint4* const matrix = reinterpret_cast<uint4*>(kept_low + kKeptChunks * kGroup);
  const int group = threadIdx.x / kGroup, groups = blockDim.x / kGroup;
  const int tid = threadIdx.x % kGroup, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int rows = p.r.factor << log_q;
  float* const z = reinterpret_cast<float*>(matrix + kMatrixBytes / 16) + group * rows * P;
  grid_dependents_start();

  // What all tokens need.
  const void* const vector = kPre ? p.pre : p.post;
  const DType vector_type = kPre ? p.pre_type : p.post_type;
  const bool posts = !kPre && vector != nullptr;
  for (int i = threadIdx.x; vector != nullptr && i < kKeptChunks * kGroup; i += blockDim.x) {
    const int chunk = i / kGroup, owner = i % kGroup;
    float v[8];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = kept_place<kWarps, kPre>(rows, chunk, owner, h);
      if constexpr (kPre) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int place = at + j / 2 * P + j % 2;
          v[4 * h + j] = place < rows * P ? load_one(vector, vector_type, place) : 0.f;
        }
      } else {
        const float4 w = load_four(vector, vector_type, 0, at, rows * P);
        v[4 * h] = w.x, v[4 * h + 1] = w.y, v[4 * h + 2] = w.z, v[4 * h + 3] = w.w;
      }
    }
    uint32_t high[4], low[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t bits = __float_as_uint(v[j] * p.gain);
      high[j / 2] = j % 2 ? high[j / 2] | (bits & 0xffff0000u) : bits >> 16;
      low[j / 4] |= (bits >> 8 & 255u) << (j % 4 * 8);
    }
    kept_high[i] = make_uint4(high[0], high[1], high[2], high[3]);
    kept_low[i] = make_uint2(low[0], low[1]);
  }
  for (int i = threadIdx.x; i < 128; i += blockDim.x) {  // operand (mt, kt) = (i / 64, i / 32 % 2)
    const int row = i / 64 * 16 + i % 32 / 4, k = i / 32 % 2 * 16 + i % 4 * 2;
    matrix[i] = make_uint4(matrix_pair<Operand>(p.r, log_q, row, k),
                           matrix_pair<Operand>(p.r, log_q, row + 8, k),
                           matrix_pair<Operand>(p.r, log_q, row, k + 8),
                           matrix_pair<Operand>(p.r, log_q, row + 8, k + 8));
  }
  __syncthreads();
  grid_dependency_wait();

  // Rows 16 kt + 2 t + (q & 1) + 8 (q >> 1), eight columns each. Padding repeats the last row: the
  // matrix has zeros there.
  uint4 raw[2][4];
  auto load = [&](int m) {
    const T* const x = static_cast<const T*>(p.x) + m * p.x_stride + warp * kManyColumns + g * 8;
#pragma unroll
    for (int kt = 0; kt < 2; ++kt)
#pragma unroll
      for (int q = 0; q < 4; ++q)
        raw[kt][q] = load_cached(x + min(16 * kt + 2 * t + (q & 1) + 8 * (q >> 1), rows - 1) * P);
  };
  const int step = gridDim.x * groups;
  int m = group * gridDim.x + blockIdx.x;
  if (kLoadsAhead && m < p.tokens) load(m);
  for (; m < p.tokens; m += step) {
    if (!kLoadsAhead) load(m);
    float acc[2][8][4] = {};
#pragma unroll
    for (int kt = 0; kt < 2; ++kt) {
      uint32_t a[2][4];
#pragma unroll
      for (int mt = 0; mt < 2; ++mt) {
        const uint4 w = matrix[(2 * mt + kt) * 32 + lane];
        a[mt][0] = w.x, a[mt][1] = w.y, a[mt][2] = w.z, a[mt][3] = w.w;
      }
#pragma unroll
      for (int jj = 0; jj < 4; ++jj) {
        uint32_t x[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const uint4& w = raw[kt][q];
          x[q] = jj == 0 ? w.x : jj == 1 ? w.y : jj == 2 ? w.z : w.w;
        }
        if constexpr (kPre) {
          const uint4 high = kept_high[(4 * kt + jj) * kGroup + tid];
          const uint2 low = kept_low[(4 * kt + jj) * kGroup + tid];
          const uint32_t highs[4] = {high.x, high.y, high.z, high.w};
          float2 v[4];
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            v[q] = unpack2(x[q], T());
            v[q].x *= kept_value(highs[q], q < 2 ? low.x : low.y, 0, q % 2 * 2);
            v[q].y *= kept_value(highs[q], q < 2 ? low.x : low.y, 1, q % 2 * 2 + 1);
          }
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            float s[4], rest[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
              s[q] = b ? v[q].y : v[q].x;
              rest[q] = s[q] - __uint_as_float(__float_as_uint(s[q]) & 0xffff0000u);
            }
            const uint32_t h0 = __byte_perm(__float_as_uint(s[0]), __float_as_uint(s[1]), 0x7632);
            const uint32_t h1 = __byte_perm(__float_as_uint(s[2]), __float_as_uint(s[3]), 0x7632);
            const uint32_t l0 = pack2<__nv_bfloat16>(rest[0], rest[1]);
            const uint32_t l1 = pack2<__nv_bfloat16>(rest[2], rest[3]);
#pragma unroll
            for (int mt = 0; mt < 2; ++mt) {
              mma_16816(acc[mt][2 * jj + b], a[mt], h0, h1, Operand());
              mma_16816(acc[mt][2 * jj + b], a[mt], l0, l1, Operand());
            }
          }
        } else {
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const uint32_t b0 = __byte_perm(x[0], x[1], b ? 0x7632 : 0x5410);
            const uint32_t b1 = __byte_perm(x[2], x[3], b ? 0x7632 : 0x5410);
#pragma unroll
            for (int mt = 0; mt < 2; ++mt)
              mma_16816(acc[mt][2 * jj + b], a[mt], b0, b1, Operand());
          }
        }
      }
    }
    if (kLoadsAhead && m + step < p.tokens) load(m + step);

    // Bits 0 .. 3 of the column 16 t + 8 i + j in registers, 4 and 5 by shuffles.
    const float sign[2] = {t & 1 ? -1.f : 1.f, t & 2 ? -1.f : 1.f};
#pragma unroll
    for (int mt = 0; mt < 2; ++mt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* const v = &acc[mt][0][2 * h];  // [8 j][4], i the pair
#pragma unroll
        for (int b = 1; b < 8; b *= 2)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            if ((j & b) == 0)
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                const float s = v[4 * j + i], d = v[4 * (j + b) + i];
                v[4 * j + i] = s + d;
                v[4 * (j + b) + i] = s - d;
              }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float s = v[4 * j], d = v[4 * j + 1];
          v[4 * j] = s + d;
          v[4 * j + 1] = s - d;
        }
#pragma unroll
        for (int b = 0; b < 2; ++b)
#pragma unroll
          for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              v[4 * j + i] = fmaf(sign[b], v[4 * j + i],
                                  __shfl_xor_sync(~0u, v[4 * j + i], 1 << b));
      }

    // Chunks of four columns; XORed so that eight lanes store to all banks.
    group_barrier<kWarps>(group);  // the token before has been read
#pragma unroll
    for (int mt = 0; mt < 2; ++mt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = 16 * mt + 8 * h + g, turn = (t >> 1) ^ (g & 1) << 1;
        if (row >= rows) continue;
        float* const to = z + row * P + warp * kManyColumns;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            *reinterpret_cast<float4*>(to + ((4 * t + 2 * i + c) ^ turn) * 4) =
                make_float4(acc[mt][4 * c][2 * h + i], acc[mt][4 * c + 1][2 * h + i],
                            acc[mt][4 * c + 2][2 * h + i], acc[mt][4 * c + 3][2 * h + i]);
      }
    group_barrier<kWarps>(group);

#pragma unroll
    for (int k = 0; k < 16 / kWarps; ++k) {
      const int id = k * kGroup + tid, row = id >> 4, chunk = id & 15;
      if (row >= rows) continue;
      const float* const from = z + row * P + (chunk ^ chunk >> 3 ^ (row & 1) << 1) * 4;
      float4 v[kWarps];
#pragma unroll
      for (int r = 0; r < kWarps; ++r)
        v[r] = *reinterpret_cast<const float4*>(from + r * kManyColumns);
#pragma unroll
      for (int b = 1; b < kWarps; b *= 2)
#pragma unroll
        for (int r = 0; r < kWarps; ++r)
          if ((r & b) == 0) {
            const float4 s = v[r], d = v[r + b];
            v[r] = add4(s, d);
            v[r + b] = sub4(s, d);
          }
      const int place = row * P + 4 * chunk;
      T* const y = static_cast<T*>(p.y) + size_t(m) * p.r.n + place;
#pragma unroll
      for (int r = 0; r < kWarps; ++r) {
        if (posts) {
          const int f = k * kWarps + r;
          const uint2 high = reinterpret_cast<const uint2*>(kept_high + f / 2 * kGroup + tid)[f % 2];
          const uint32_t low =
              reinterpret_cast<const uint32_t*>(kept_low + f / 2 * kGroup + tid)[f % 2];
          v[r].x *= kept_value(high.x, low, 0, 0);
          v[r].y *= kept_value(high.x, low, 1, 1);
          v[r].z *= kept_value(high.y, low, 0, 2);
          v[r].w *= kept_value(high.y, low, 1, 3);
        } else if (!kPre) {
          v[r].x *= p.gain, v[r].y *= p.gain, v[r].z *= p.gain, v[r].w *= p.gain;
        }
        if (p.bias != nullptr)
          v[r] = add4(v[r], load_four(p.bias, p.y_type, 0, place + r * kManyColumns, p.r.n));
        *reinterpret_cast<uint2*>(y + r * kManyColumns) =
            make_uint2(pack2<T>(v[r].x, v[r].y), pack2<T>(v[r].z, v[r].w));
      }
    }
  }
}

template <typename T, int kWarps, bool kPre>
cudaError_t rotate_many(const RotateParams& p, int log_q, const DeviceInfo& info,
                        cudaStream_t stream) {
  const int rows = p.r.factor << log_q;
  int groups = kManyThreads / (kWarps * 32);
  while (many_smem(rows, kWarps, groups) > info.max_smem) --groups;
  const auto kernel = rotate_many_kernel<T, kWarps, kPre>;
  static std::atomic<unsigned long long> done{0};
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = allow_smem(kernel, &done, device, info.max_smem);
  if (e != cudaSuccess) return e;
  return enqueue(kernel, dim3(std::min(p.tokens, info.sms)), groups * kWarps * 32,
                 many_smem(rows, kWarps, groups), stream, p, log_q);
}

template <typename T, int kWarps>
cudaError_t rotate_many(const RotateParams& p, int log_q, const DeviceInfo& info,
                        cudaStream_t stream) {
  return p.pre != nullptr ? rotate_many<T, kWarps, true>(p, log_q, info, stream)
                          : rotate_many<T, kWarps, false>(p, log_q, info, stream);
}

template <typename T>
cudaError_t rotate_many(const RotateParams& p, int log_q, int warps, const DeviceInfo& info,
                        cudaStream_t stream) {
  switch (warps) {
    case 1: return rotate_many<T, 1>(p, log_q, info, stream);
    case 2: return rotate_many<T, 2>(p, log_q, info, stream);
    case 4: return rotate_many<T, 4>(p, log_q, info, stream);
    case 8: return rotate_many<T, 8>(p, log_q, info, stream);
    default: return rotate_many<T, 16>(p, log_q, info, stream);
  }
}

// Top Sylvester bits that go with H_F; the rest are the columns.
int many_log_q(const Rotation& r) {
  int q = 0;
  while (r.factor << (q + 1) <= kManyRows && r.n / (r.factor << (q + 1)) >= kManyColumns) ++q;
  return q;
}

}  // namespace

bool takes_many(const RotateParams& p, const DeviceInfo& info) {
  if (p.partials != nullptr || p.x_type == DType::kFloat32 || p.y_type != p.x_type) return false;
  if (p.pre != nullptr && p.post != nullptr) return false;
  if (p.r.factor < 1 || p.r.factor > kManyRows || p.r.block != 0) return false;
  const int rows = p.r.factor << many_log_q(p.r), columns = p.r.n / rows;
  const int warps = columns / kManyColumns;
  if (warps < 1 || warps > 16 || many_smem(rows, warps, 1) > info.max_smem) return false;
  return reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_stride % 8 == 0 &&
         reinterpret_cast<uintptr_t>(p.y) % 8 == 0;
}

cudaError_t launch_rotate_many(const RotateParams& p, const DeviceInfo& info,
                               cudaStream_t stream) {
  const int log_q = many_log_q(p.r), warps = p.r.n / (p.r.factor << log_q) / kManyColumns;
  return p.x_type == DType::kFloat16
             ? rotate_many<__half>(p, log_q, warps, info, stream)
             : rotate_many<__nv_bfloat16>(p, log_q, warps, info, stream);
}

}  // namespace aqlm
