// Norms, SwiGLU and a prompt's rotary embedding: what a model runs between its matmuls where every
// kernel is launched by itself. In a graph Triton's bodies are faster (norm and SwiGLU of one token
// 2.5 us, these 3.7), but a launch of Triton's costs the host 25 to 75 us and one of these 10 to 20.
//
// A thread takes 8 neighbours at a time, as 16-byte vectors where rows are aligned, one by one where
// they are not. All kernels are launched dependently: they load what the kernel before them does
// not write, then wait.
#include <algorithm>

#include "enqueue.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "step_rows.h"

namespace aqlm {
namespace {

template <typename T>
__device__ __forceinline__ float rounded(float v) {
  return to_float(from_float<T>(v));
}

// The first `count` of 8 neighbours, the others 0.
template <typename T>
__device__ __forceinline__ void load8(const T* from, int count, bool aligned, float (&v)[8]) {
  if (aligned && count >= 8) {
    if constexpr (sizeof(T) == 4) {
      const uint4 a = load_cached(from), b = load_cached(from + 4);
      const uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(w[i]);
    } else {
      unpack8<T>(load_cached(from), v);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = i < count ? to_float(from[i]) : 0.f;
}

template <typename T>
__device__ __forceinline__ void store8(T* to, int count, bool aligned, const float (&v)[8]) {
  if (aligned && count >= 8) {
    __align__(16) T out[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = from_float<T>(v[i]);
#pragma unroll
    for (int i = 0; i < 8 * static_cast<int>(sizeof(T)) / 16; ++i)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(out)[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) to[i] = from_float<T>(v[i]);
}

// Whether vectors at these addresses, `stride` elements apart, are 16-byte aligned.
template <typename... Pointers>
bool aligned(DType type, std::initializer_list<long long> strides, Pointers... pointers) {
  const int size = type == DType::kFloat32 ? 4 : 2;
  bool ok = ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
  for (const long long stride : strides) ok = ok && stride * size % 16 == 0;
  return ok;
}

constexpr int kMostThreads = 1024;

// One block a token; kVectors of 8 a thread stay in registers between sum and norm. The weight is
// loaded before the wait where there are registers for it (four vectors of both spilled).
template <typename T, int kVectors>
__global__ void __launch_bounds__(kMostThreads)
norm_kernel(const __grid_constant__ NormParams p, bool aligned) {
  __shared__ float squares[kMostThreads / 32];
  const int m = blockIdx.x, tid = threadIdx.x;
  grid_dependents_start();
  constexpr bool kEarly = kVectors < 4;
  float weight[kEarly ? kVectors : 1][8], x[kVectors][8];
#pragma unroll
  for (int j = 0; kEarly && j < kVectors; ++j) {
    const int at = (j * blockDim.x + tid) * 8;
    load8(static_cast<const T*>(p.weight) + at, p.n - at, aligned, weight[j]);
  }
  grid_dependency_wait();
  const long long row = p.numbers ? p.numbers[m * p.numbers_stride] : m;
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int at = (j * blockDim.x + tid) * 8;
    load8(static_cast<const T*>(p.x) + row * p.x_stride + at, p.n - at, aligned, x[j]);
    if (p.delta) {
      float d[8];
      load8(static_cast<const T*>(p.delta) + m * p.delta_stride + at, p.n - at, aligned, d);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[j][i] = rounded<T>(x[j][i] + d[i]);
    }
    store8(static_cast<T*>(p.sum) + size_t(m) * p.n + at, p.n - at, aligned, x[j]);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x[j][i] * x[j][i];
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (tid % 32 == 0) squares[tid / 32] = sum;
  __syncthreads();
  sum = 0.f;
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) sum += squares[w];
  const float scale = rsqrtf(sum / p.n + p.eps);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int at = (j * blockDim.x + tid) * 8, w = kEarly ? j : 0;
    if (!kEarly) load8(static_cast<const T*>(p.weight) + at, p.n - at, aligned, weight[w]);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[j][i] = weight[w][i] * rounded<T>(x[j][i] * scale);
    store8(static_cast<T*>(p.y) + size_t(m) * p.n + at, p.n - at, aligned, x[j]);
  }
}

// One thread for 8 neighbours of a row.
template <typename T>
__global__ void __launch_bounds__(128)
swiglu_kernel(const __grid_constant__ SwigluParams p, int columns, bool aligned) {
  const long long index = blockIdx.x * 128ll + threadIdx.x;
  const long long m = index / columns;
  grid_dependents_start();
  grid_dependency_wait();
  if (m >= p.tokens) return;
  const int at = static_cast<int>(index - m * columns) * 8;
  float gate[8], up[8];
  load8(static_cast<const T*>(p.gate) + m * p.gate_stride + at, p.n - at, aligned, gate);
  load8(static_cast<const T*>(p.up) + m * p.up_stride + at, p.n - at, aligned, up);
#pragma unroll
  for (int i = 0; i < 8; ++i) up[i] *= rounded<T>(gate[i] / (1.f + __expf(-gate[i])));
  store8(static_cast<T*>(p.y) + m * p.n + at, p.n - at, aligned, up);
}

// One block a token. A thread takes 8 of the first half of a head and the 8 that they turn with.
template <typename T>
__global__ void __launch_bounds__(256)
rope_kernel(const __grid_constant__ RopeParams p, bool aligned) {
  const int token = blockIdx.x % p.length, half = p.head_dim / 2, units = (half + 7) / 8;
  const long long b = blockIdx.x / p.length;
  grid_dependents_start();
  const size_t place = size_t(p.ids[b * p.ids_b + token * p.ids_t]) * p.head_dim;
  const T *cos = static_cast<const T*>(p.cos) + place, *sin = static_cast<const T*>(p.sin) + place;
  grid_dependency_wait();
  const int all = (p.q_heads + 2 * p.heads) * units;
  for (int unit = threadIdx.x; unit < all; unit += 256) {
    const int at = unit % units * 8, count = half - at;
    int head = unit / units;
    const T* from;
    T* to;
    const bool turns = head < p.q_heads + p.heads;
    if (head < p.q_heads) {
      from = static_cast<const T*>(p.q) + b * p.q_b + token * p.q_t + head * p.q_h;
      to = static_cast<T*>(p.out) + ((b * p.length + token) * p.q_heads + head) * p.head_dim;
    } else if (turns) {
      head -= p.q_heads;
      from = static_cast<const T*>(p.key) + b * p.key_b + token * p.key_t + head * p.key_h;
      to = static_cast<T*>(p.keys) + b * p.k_b + head * p.k_h + token * p.k_l;
    } else {
      head -= p.q_heads + p.heads;
      from = static_cast<const T*>(p.value) + b * p.value_b + token * p.value_t + head * p.value_h;
      to = static_cast<T*>(p.values) + b * p.v_b + head * p.v_h + token * p.v_l;
    }
    float low[8], high[8];
    load8(from + at, count, aligned, low);
    load8(from + half + at, count, aligned, high);
    if (turns) {
      float c[8], s[8], c2[8], s2[8];
      load8(cos + at, count, aligned, c);
      load8(sin + at, count, aligned, s);
      load8(cos + half + at, count, aligned, c2);
      load8(sin + half + at, count, aligned, s2);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float a = low[i], z = high[i];
        low[i] = rounded<T>(a * c[i]) + rounded<T>(-z * s[i]);
        high[i] = rounded<T>(z * c2[i]) + rounded<T>(a * s2[i]);
      }
    }
    store8(to + at, count, aligned, low);
    store8(to + half + at, count, aligned, high);
  }
}

template <int kVectors>
auto norm_of(DType type) {
  return type == DType::kFloat16    ? norm_kernel<__half, kVectors>
         : type == DType::kBFloat16 ? norm_kernel<__nv_bfloat16, kVectors>
                                    : norm_kernel<float, kVectors>;
}

}  // namespace

cudaError_t launch_norm(const NormParams& p, cudaStream_t stream) {
  cudaGetLastError();
  const int vectors = (p.n + 7) / 8, each = (vectors + kMostThreads - 1) / kMostThreads;
  if (p.n > kMostNorm) return cudaErrorInvalidValue;
  const int threads = ((vectors + each - 1) / each + 31) / 32 * 32;
  const auto kernel = each == 1   ? norm_of<1>(p.type)
                      : each == 2 ? norm_of<2>(p.type)
                                  : norm_of<4>(p.type);
  const bool vectors_of_16 =
      aligned(p.type, {p.x_stride, p.delta_stride, p.n}, p.x, p.delta, p.weight, p.sum, p.y);
  return enqueue(kernel, dim3(p.tokens), threads, 0, stream, p, vectors_of_16);
}

cudaError_t launch_swiglu(const SwigluParams& p, cudaStream_t stream) {
  cudaGetLastError();
  const int columns = (p.n + 7) / 8;
  const auto kernel = p.type == DType::kFloat16    ? swiglu_kernel<__half>
                      : p.type == DType::kBFloat16 ? swiglu_kernel<__nv_bfloat16>
                                                   : swiglu_kernel<float>;
  const bool vectors_of_16 =
      aligned(p.type, {p.gate_stride, p.up_stride, p.n}, p.gate, p.up, p.y);
  const long long blocks = (static_cast<long long>(columns) * p.tokens + 127) / 128;
  return enqueue(kernel, dim3(static_cast<unsigned>(blocks)), 128, 0, stream, p, columns,
                 vectors_of_16);
}

cudaError_t launch_rope(const RopeParams& p, cudaStream_t stream) {
  cudaGetLastError();
  const auto kernel = p.type == DType::kFloat16    ? rope_kernel<__half>
                      : p.type == DType::kBFloat16 ? rope_kernel<__nv_bfloat16>
                                                   : rope_kernel<float>;
  const bool vectors_of_16 = aligned(
      p.type, {p.q_b, p.q_t, p.q_h, p.key_b, p.key_t, p.key_h, p.value_b, p.value_t, p.value_h,
               p.k_b, p.k_h, p.k_l, p.v_b, p.v_h, p.v_l, p.head_dim / 2},
      p.q, p.key, p.value, p.cos, p.sin, p.out, p.keys, p.values);
  return enqueue(kernel, dim3(static_cast<unsigned>(p.batch) * p.length), 256, 0, stream, p,
                 vectors_of_16);
}

}  // namespace aqlm
