// Between two rotated layers of one token: the end of a matmul's output rotation, the sum with the
// residual stream, RMSNorm, and the rotation of the next layer's input, in one launch.
//
// n = 1024 * kRegs, a power of two. The matmul has owned rows and has transformed their low five
// bits. A block makes 512 of the n results and needs nothing from the others: it reads all of z (16
// KB at most, from L2) and finishes the first rotation of the whole vector. Element
//   j * 1024 + lane * 32 + warp * 4 + i     (bits 10 .. | 5 .. 9 | 2 .. 4 | 0, 1)
// is in register 4 j + i of a lane, so that bits 5 .. 11 are butterflies in registers and shuffles;
// the way back needs one exchange between warps, which the norm's sum of squares shares.
// The product is rounded as the matmul alone rounds it, the sum as a sum of x's type; the norm is
// not rounded before its rotation, as in norm_rotate.cu.
#include "enqueue.cuh"
#include "hadamard.cuh"
#include "norm_rotate.h"

namespace aqlm {
namespace {

constexpr int kMixNormThreads = 256;

template <typename T>
__device__ __forceinline__ uint32_t round2(float a, float b) {
  const T pair[2] = {from_float<T>(a), from_float<T>(b)};
  return *reinterpret_cast<const uint32_t*>(pair);
}

// Grid: n / 512 blocks; block r makes results r * 512 .. r * 512 + 511.
template <typename T, int kRegs>
__global__ void __launch_bounds__(kMixNormThreads, 1)
mix_norm_kernel(const __grid_constant__ MixNormParams p) {
  __shared__ __align__(16) float4 sums[kMixNormThreads / 2];  // [warp][lane % 16]
  __shared__ float warp_squares[kMixNormThreads / 32];
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, row = blockIdx.x;
  const int first = lane * 32 + warp * 4;
  grid_dependents_start();
  float4 sv[kRegs], factor[kRegs];
#pragma unroll
  for (int j = 0; j < kRegs; ++j) {
    const int i = j * 1024 + first;
    const float4 s = __ldg(reinterpret_cast<const float4*>(p.sv + i));
    const float4 u = __ldg(reinterpret_cast<const float4*>(p.su + i));
    const uint2 w = __ldg(reinterpret_cast<const uint2*>(static_cast<const T*>(p.weight) + i));
    const float2 w0 = unpack2(w.x, T()), w1 = unpack2(w.y, T());
    const float sign = __popc((2 * j + (lane >> 4)) & row) & 1 ? -1.f : 1.f;
    sv[j] = make_float4(p.gain * s.x, p.gain * s.y, p.gain * s.z, p.gain * s.w);
    factor[j] = make_float4(sign * u.x * w0.x, sign * u.y * w0.y, sign * u.z * w1.x,
                            sign * u.w * w1.y);
  }
  grid_dependency_wait();
  uint4 raw[kRegs];
  uint2 x[kRegs];
#pragma unroll
  for (int j = 0; j < kRegs; ++j) raw[j] = load_cached(p.z + j * 1024 + first);
#pragma unroll
  for (int j = 0; j < kRegs; ++j)
    x[j] = load_cached8(static_cast<const T*>(p.x) + j * 1024 + first);
  float4 z[kRegs];
#pragma unroll
  for (int j = 0; j < kRegs; ++j)
    z[j] = make_float4(__uint_as_float(raw[j].x), __uint_as_float(raw[j].y),
                       __uint_as_float(raw[j].z), __uint_as_float(raw[j].w));
#pragma unroll
  for (int b = 1; b < kRegs; b *= 2)
#pragma unroll
    for (int j = 0; j < kRegs; ++j)
      if ((j & b) == 0) {
        const float4 s = z[j], d = z[j + b];
        z[j] = add4(s, d);
        z[j + b] = sub4(s, d);
      }
  auto across = [&](float4 v, int d) {  // one bit of the lane
    const float sign = lane & d ? -1.f : 1.f;
    return make_float4(fmaf(sign, v.x, __shfl_xor_sync(~0u, v.x, d)),
                       fmaf(sign, v.y, __shfl_xor_sync(~0u, v.y, d)),
                       fmaf(sign, v.z, __shfl_xor_sync(~0u, v.z, d)),
                       fmaf(sign, v.w, __shfl_xor_sync(~0u, v.w, d)));
  };
#pragma unroll
  for (int d = 1; d < 32; d *= 2)
#pragma unroll
    for (int j = 0; j < kRegs; ++j) z[j] = across(z[j], d);

  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  float squares = 0.f;
#pragma unroll
  for (int j = 0; j < kRegs; ++j) {
    const uint32_t low = add2(x[j].x, round2<T>(z[j].x * sv[j].x, z[j].y * sv[j].y), T());
    const uint32_t high = add2(x[j].y, round2<T>(z[j].z * sv[j].z, z[j].w * sv[j].w), T());
    if (2 * j + (lane >> 4) == row)
      *reinterpret_cast<uint2*>(static_cast<T*>(p.sum) + j * 1024 + first) = make_uint2(low, high);
    const float2 a = unpack2(low, T()), b = unpack2(high, T());
    squares += a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y;
    sum = add4(sum, make_float4(a.x * factor[j].x, a.y * factor[j].y, b.x * factor[j].z,
                                b.y * factor[j].w));
  }
  // Bit 9 of the element is summed over, its sign is in `factor`; both halves of a warp go on alike.
  sum = make_float4(sum.x + __shfl_xor_sync(~0u, sum.x, 16), sum.y + __shfl_xor_sync(~0u, sum.y, 16),
                    sum.z + __shfl_xor_sync(~0u, sum.z, 16), sum.w + __shfl_xor_sync(~0u, sum.w, 16));
#pragma unroll
  for (int d = 16; d > 0; d /= 2) squares += __shfl_xor_sync(~0u, squares, d);
  sum = make_float4(sum.x + sum.y, sum.x - sum.y, sum.z + sum.w, sum.z - sum.w);
  sum = make_float4(sum.x + sum.z, sum.y + sum.w, sum.x - sum.z, sum.y - sum.w);
#pragma unroll
  for (int d = 1; d < 16; d *= 2) sum = across(sum, d);
  if (lane < 16) sums[warp * 16 + lane] = sum;
  if (lane == 0) warp_squares[warp] = squares;
  __syncthreads();
  if (tid >= kMixNormThreads / 2) return;
  // Results 4 tid .. 4 tid + 3 of the block: warp tid % 8 of the exchange, lane tid / 8.
  float total = 0.f;
  sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int w = 0; w < 8; ++w) {
    const float4 v = sums[w * 16 + tid / 8];
    sum = __popc(w & tid & 7) & 1 ? sub4(sum, v) : add4(sum, v);
    total += warp_squares[w];
  }
  const float scale = p.gain * rsqrtf(total / p.n + p.eps);
  *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + row * 512 + 4 * tid) =
      make_uint2(round2<T>(sum.x * scale, sum.y * scale), round2<T>(sum.z * scale, sum.w * scale));
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

cudaError_t launch_mix_norm(const MixNormParams& p, cudaStream_t stream) {
  cudaGetLastError();
  return p.type == DType::kFloat16 ? mix_norm<__half>(p, stream)
                                   : mix_norm<__nv_bfloat16>(p, stream);
}

}  // namespace aqlm
