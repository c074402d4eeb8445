// Between two rotated layers of one token: the end of a matmul's output rotation, the sum with the
// residual stream, RMSNorm, and the rotation of the next layer's input, in one launch.
//
// n = 1024 * kRegs, a power of two. The matmul has owned rows and has transformed their low five
// bits. A block makes 512 of the n results and needs nothing from the others: it reads all of z (16
// KB at most, from L2) and finishes the first rotation of the whole vector. Four neighbours make a
// quad; quad 32 k + lane of the vector is in lane `lane`:
//   of warp k % 8 and register k / 8, at first: loads, bits 5, 6 (lanes) and 10 .. (registers)
//   of warp k / kRegs and register k % kRegs, from the first exchange on: it adds bits 7 .. 9;
//     then everything else of the vector, and the way back up to bit 8 as far as registers hold it
//   warp k % 4 of row k / 4, after the second: rows are added, bits 7, 8 completed, then 0 .. 6
// (Lanes that hold bits 5 .. 9 need no first exchange, but load a sector each: 5.8 us after the
// matmul of 4096 x 4096 instead of 1.8.)
// The product is rounded as the matmul alone rounds it, the sum as a sum of x's type; the norm is
// not rounded before its rotation, as in norm_rotate.cu.
#include "clusters.cuh"
#include "mix_columns.cuh"
#include "norm_rotate.h"

namespace aqlm {
namespace {

constexpr int kMixNormThreads = 256, kMixNormWarps = kMixNormThreads / 32;
// One token: 64 registers, so that a block of the next matmul (96 x 512) has room beside one of
// these and is ready when it ends. Factors of the sum wait in shared memory, each for its thread.
constexpr int kMixNormBlocks = 4;

template <typename T>
__device__ __forceinline__ uint32_t round2(float a, float b) {
  const T pair[2] = {from_float<T>(a), from_float<T>(b)};
  return *reinterpret_cast<const uint32_t*>(pair);
}
__device__ __forceinline__ float4 add_signed(float4 sum, float4 v, int odd) {
  return odd ? sub4(sum, v) : add4(sum, v);
}

// Grid: n / 512 blocks; block r makes results r * 512 .. r * 512 + 511.
template <typename T, int kRegs>
__global__ void __launch_bounds__(kMixNormThreads, kMixNormBlocks)
mix_norm_kernel(const __grid_constant__ MixNormParams p) {
  __shared__ __align__(16) float4 mixed[kMixNormThreads * kRegs];
  __shared__ __align__(16) float4 turned[kMixNormThreads * kRegs];
  __shared__ float warp_squares[kMixNormWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.x;
  auto butterflies = [](float4 (&v)[kRegs]) {
#pragma unroll
    for (int b = 1; b < kRegs; b *= 2)
#pragma unroll
      for (int k = 0; k < kRegs; ++k)
        if ((k & b) == 0) {
          const float4 s = v[k], d = v[k + b];
          v[k] = add4(s, d);
          v[k + b] = sub4(s, d);
        }
  };
  const int first = (warp * kRegs * 32 + lane) * 4;  // element of register 0, the next 128 further
  grid_dependents_start();
  float4 sv[kRegs];
#pragma unroll
  for (int k = 0; k < kRegs; ++k) {
    sv[k] = load_quad(p.sv + first + 128 * k);
    const float4 u = load_quad(p.su + first + 128 * k);
    const uint2 weight = load_cached8(static_cast<const T*>(p.weight) + first + 128 * k);
    const float2 a = unpack2(weight.x, T()), b = unpack2(weight.y, T());
    const float sign = __popc((warp * kRegs + k) >> 2 & row) & 1 ? -1.f : 1.f;
    turned[(warp * kRegs + k) * 32 + lane] =
        make_float4(u.x * a.x * sign, u.y * a.y * sign, u.z * b.x * sign, u.w * b.y * sign);
  }
  grid_dependency_wait();
  float4 v[kRegs];
  uint2 x[kRegs];
#pragma unroll
  for (int k = 0; k < kRegs; ++k) v[k] = load_quad(p.z + ((k * 8 + warp) * 32 + lane) * 4);
#pragma unroll
  for (int k = 0; k < kRegs; ++k)
    x[k] = load_cached8(static_cast<const T*>(p.x) + first + 128 * k);
  butterflies(v);
#pragma unroll
  for (int d = 8; d < 32; d *= 2)
#pragma unroll
    for (int k = 0; k < kRegs; ++k) {
      const float sign = lane & d ? -1.f : 1.f;
      v[k] = make_float4(fmaf(sign, v[k].x, __shfl_xor_sync(~0u, v[k].x, d)),
                         fmaf(sign, v[k].y, __shfl_xor_sync(~0u, v[k].y, d)),
                         fmaf(sign, v[k].z, __shfl_xor_sync(~0u, v[k].z, d)),
                         fmaf(sign, v[k].w, __shfl_xor_sync(~0u, v[k].w, d)));
    }
#pragma unroll
  for (int k = 0; k < kRegs; ++k) mixed[(k * 8 + warp) * 32 + lane] = v[k];
  __syncthreads();

  // Bits 7 .. 9: kOther values of the low bits of the warp, kRegs of the register.
  constexpr int kOther = 8 / kRegs;
#pragma unroll
  for (int k = 0; k < kRegs; ++k) {
    v[k] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int b = 0; b < kOther; ++b)
      v[k] = add_signed(v[k], mixed[(((warp & ~(kOther - 1)) | b) * kRegs + k) * 32 + lane],
                        __popc(b & warp) & 1);
  }
  butterflies(v);
  float squares = 0.f;
#pragma unroll
  for (int k = 0; k < kRegs; ++k) {
    const float4 s = sv[k], u = turned[(warp * kRegs + k) * 32 + lane];
    const uint32_t low =
        add2(x[k].x, round2<T>(v[k].x * (p.gain * s.x), v[k].y * (p.gain * s.y)), T());
    const uint32_t high =
        add2(x[k].y, round2<T>(v[k].z * (p.gain * s.z), v[k].w * (p.gain * s.w)), T());
    const int own_row = (warp * kRegs + k) >> 2;
    if (own_row == row)
      *reinterpret_cast<uint2*>(static_cast<T*>(p.sum) + first + 128 * k) = make_uint2(low, high);
    const float2 a = unpack2(low, T()), b = unpack2(high, T());
    squares += a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y;
    v[k] = make_float4(a.x * u.x, a.y * u.y, b.x * u.z, b.y * u.w);
  }
  butterflies(v);
#pragma unroll
  for (int k = 0; k < kRegs; ++k) turned[(warp * kRegs + k) * 32 + lane] = v[k];
#pragma unroll
  for (int d = 16; d > 0; d /= 2) squares += __shfl_xor_sync(~0u, squares, d);
  if (lane == 0) warp_squares[warp] = squares;
  __syncthreads();
  if (warp >= 4) return;

  float total = 0.f;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  constexpr int kLeft = 4 / kRegs;  // of bits 7 and 8, not yet in `turned`
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int b = i % kLeft;
    sum = add_signed(sum, turned[(i / kLeft * 4 + b * kRegs + warp % kRegs) * 32 + lane],
                     __popc(b & (warp / kRegs)) & 1);
    total += warp_squares[i];
  }
  sum = rotate_lanes(sum, 7);
  const float scale = p.gain * rsqrtf(total / p.n + p.eps);
  *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + row * 512 + (warp * 32 + lane) * 4) =
      make_uint2(round2<T>(sum.x * scale, sum.y * scale), round2<T>(sum.z * scale, sum.w * scale));
}

constexpr int kMostSums = 96 << 10;  // bytes of a block's sums: what matmuls leave

// S_C over values of the rows of one column pair, of which this thread has row `row`.
template <int C>
__device__ __forceinline__ float2 over_rows(const float2* values, int row, int pair) {
  constexpr int kPairs = kRow / 2 / C;
  float2 sum = make_float2(0.f, 0.f);
#pragma unroll
  for (int r = 0; r < C; ++r) {
    const float2 v = values[r * kPairs + pair];
    const float sign = __popc(r & row) & 1 ? -1.f : 1.f;
    sum = make_float2(fmaf(sign, v.x, sum.x), fmaf(sign, v.y, sum.y));
  }
  return sum;
}

// The same after a matmul with row groups of 512 and partial sums of them, for some tokens. The C
// row groups are the rows of a matrix [C, 512], of which a block of a cluster has 512 / C columns:
// it adds their sums, does both rotations over the rows and what is between them, and gives every
// row to the block that does S_512 of it. Sums come by bulk copies, of `most` slots of a row at
// most; 64 registers leave room for a block of the matmul before this, and of the one after it.
// Grid: (C, tokens), clusters of C = n / 512.
template <typename T, int C>
__global__ void __launch_bounds__(kMixNormThreads, kMixNormBlocks)
mix_norm_sums_kernel(const __grid_constant__ MixNormParams p,
                     const __grid_constant__ RotateParams sums, int most) {
#if __CUDA_ARCH__ >= 900
  constexpr int kColumns = kRow / C, kPairs = kColumns / 2;
  extern __shared__ __align__(128) float slots[];  // [C][most][kColumns]
  __shared__ __align__(16) float2 mixed[kMixNormThreads];
  __shared__ __align__(16) float2 weighted[kMixNormThreads];
  __shared__ __align__(16) float2 turned[kMixNormThreads];  // the row that this block finishes
  __shared__ float squares[C * kMixNormWarps];
  __shared__ uint64_t barrier;
  const int tid = threadIdx.x, warp = tid / 32, own = blockIdx.x, m = blockIdx.y;
  const int row = tid / kPairs, pair = tid % kPairs;
  const int column = own * kColumns + 2 * pair, at = row * kRow + column;
  if (tid == 0) {
    mbar::init(&barrier, 1);
    mbar::init_fence();
  }
  grid_dependents_start();
  const float2 sv = load_floats(p.sv + at), u = load_floats(p.su + at);
  const float2 w = unpack2(load_word(static_cast<const T*>(p.weight) + at), T());
  const RotateSource source = rotate_locate(sums, m, row * kRow + own * kColumns);
  if (pair == 0) mixed[row].x = __int_as_float(source.slots);
  cluster_barrier();  // all blocks have begun
  if (tid == 0) {
    int count = 0;
#pragma unroll
    for (int r = 0; r < C; ++r) count += __float_as_int(mixed[r].x);
    mbar::expect(&barrier, count * kColumns * int(sizeof(float)));
  }
  __syncthreads();
  float* const own_slots = slots + row * most * kColumns;
  grid_dependency_wait();
  for (int k = pair; k < source.slots; k += kPairs)
    mbar::bulk_copy(own_slots + k * kColumns, source.from + k * source.stride,
                    kColumns * sizeof(float), &barrier);
  const size_t token = size_t(m) * p.n;
  const uint32_t x = load_word(static_cast<const T*>(p.x) + token + at);
  mbar::wait(&barrier, 0);

  float2 v = make_float2(0.f, 0.f);
#pragma unroll 4
  for (int k = 0; k < source.slots; ++k) {
    const float2 part = reinterpret_cast<const float2*>(own_slots)[k * kPairs + pair];
    v = make_float2(v.x + part.x, v.y + part.y);
  }
  mixed[tid] = v;
  __syncthreads();
  v = over_rows<C>(mixed, row, pair);
  const uint32_t sum = add2(x, round2<T>(v.x * (p.gain * sv.x), v.y * (p.gain * sv.y)), T());
  *reinterpret_cast<uint32_t*>(static_cast<T*>(p.sum) + token + at) = sum;
  const float2 a = unpack2(sum, T());
  weighted[tid] = make_float2(a.x * (u.x * w.x), a.y * (u.y * w.y));
  float square = a.x * a.x + a.y * a.y;
#pragma unroll
  for (int d = 16; d > 0; d /= 2) square += __shfl_xor_sync(~0u, square, d);
  if (tid % 32 < C) store_cluster(squares + own * kMixNormWarps + warp, tid % 32, square);
  __syncthreads();
  store_cluster(turned + own * kPairs + pair, row, over_rows<C>(weighted, row, pair));
  cluster_barrier();

  // S_512: bit 0 in the thread, 1 .. 5 in the lanes, 6 .. 8 are the warp.
  float2 out = turned[tid];
  out = make_float2(out.x + out.y, out.x - out.y);
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const float sign = tid & d ? -1.f : 1.f;
    out = make_float2(fmaf(sign, out.x, __shfl_xor_sync(~0u, out.x, d)),
                      fmaf(sign, out.y, __shfl_xor_sync(~0u, out.y, d)));
  }
  mixed[tid] = out;
  float total = 0.f;
#pragma unroll
  for (int i = tid % 32; i < C * kMixNormWarps; i += 32) total += squares[i];
#pragma unroll
  for (int d = 16; d > 0; d /= 2) total += __shfl_xor_sync(~0u, total, d);
  __syncthreads();
  out = make_float2(0.f, 0.f);
#pragma unroll
  for (int i = 0; i < kMixNormWarps; ++i) {
    const float2 o = mixed[i * 32 + tid % 32];
    const float sign = __popc(i & warp) & 1 ? -1.f : 1.f;
    out = make_float2(fmaf(sign, o.x, out.x), fmaf(sign, o.y, out.y));
  }
  const float scale = p.gain * rsqrtf(total / p.n + p.eps);
  *reinterpret_cast<uint32_t*>(static_cast<T*>(p.y) + token + own * kRow + 2 * tid) =
      round2<T>(out.x * scale, out.y * scale);
#endif
}

template <typename T, int C>
cudaError_t mix_norm_sums(const MixNormParams& p, const RotateParams& sums, cudaStream_t stream) {
  static std::atomic<unsigned long long> done{0};
  auto kernel = mix_norm_sums_kernel<T, C>;
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = allow_smem(kernel, &done, device, kMostSums);
  if (e != cudaSuccess) return e;
  const int most = most_slots(sums.s);
  return enqueue_clusters(C, kernel, dim3(C, sums.tokens), kMixNormThreads,
                          most * kRow * int(sizeof(float)), stream, p, sums, most);
}

template <typename T>
cudaError_t mix_norm(const MixNormParams& p, const RotateParams& sums, cudaStream_t stream) {
  switch (p.n) {
    case 1024: return mix_norm_sums<T, 2>(p, sums, stream);
    case 2048: return mix_norm_sums<T, 4>(p, sums, stream);
    case 4096: return mix_norm_sums<T, 8>(p, sums, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t mix_norm(const MixNormParams& p, cudaStream_t stream) {
  const dim3 grid(p.n / 512);
  switch (p.n) {
    case 1024: return enqueue(mix_norm_kernel<T, 1>, grid, kMixNormThreads, 0, stream, p);
    case 2048: return enqueue(mix_norm_kernel<T, 2>, grid, kMixNormThreads, 0, stream, p);
    case 4096: return enqueue(mix_norm_kernel<T, 4>, grid, kMixNormThreads, 0, stream, p);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

bool takes_mix_norm(const RotatedSchedule& s, int n) {
  return takes_mix_norm(n) && s.group_rows == kRow &&
         most_slots(s) * kRow * int(sizeof(float)) <= kMostSums;
}

cudaError_t launch_mix_norm(const MixNormParams& p, cudaStream_t stream) {
  cudaGetLastError();
  return p.type == DType::kFloat16 ? mix_norm<__half>(p, stream)
                                   : mix_norm<__nv_bfloat16>(p, stream);
}

cudaError_t launch_mix_norm(const MixNormParams& p, const RotateParams& sums, cudaStream_t stream) {
  cudaGetLastError();
  return p.type == DType::kFloat16 ? mix_norm<__half>(p, sums, stream)
                                   : mix_norm<__nv_bfloat16>(p, sums, stream);
}

}  // namespace aqlm
