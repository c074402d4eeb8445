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
#include "enqueue.cuh"
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

// The same after a matmul with row groups of 512 and partial sums of them, for some tokens, by a
// cluster of C = n / 512 blocks. Block r adds the slots of row r. Above bit 8 both rotations leave
// columns independent, and a norm wants only a sum of squares: so the blocks exchange rows for
// columns (512 / C of them, of all rows), and these for rows again, 2 KB a block each time.
//   slots of row r | to columns | S_C, sum, squares | S_C, S_64 | to rows | S_8
// Grid: (C, tokens). Two neighbouring columns a thread: first of row r, then of row
// tid / kPairs of the block's own columns, then of row r again.
template <typename T, int C>
__global__ void __launch_bounds__(kMixNormThreads, 2)
mix_norm_sums_kernel(const __grid_constant__ MixNormParams p,
                     const __grid_constant__ RotateParams sums,
                     const __grid_constant__ RowSlots slots) {
  constexpr int kSlots = 18;  // in flight: all those of 4096 rows, on 132 SMs
  constexpr int kPairs = kRow / C / 2, kSquares = C * kMixNormWarps;
  __shared__ __align__(16) float2 columns[kMixNormThreads];  // [C][kPairs]
  __shared__ __align__(16) float2 turned[kMixNormThreads];
  __shared__ __align__(16) float2 row[kMixNormThreads];
  __shared__ float squares[kSquares];
  __shared__ uint64_t columns_here, row_here;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, own = blockIdx.x, m = blockIdx.y;
  const int r = tid / kPairs, pair = tid % kPairs;
  if (tid == 0) {
    expect_from_cluster(&columns_here, kRow * 4);
    expect_from_cluster(&row_here, (kRow + kSquares) * 4);
  }
  cluster_arrive();
  grid_dependents_start();
  const int at = r * kRow + 2 * (own * kPairs + pair);
  const float2 sv = load_floats(p.sv + at), su = load_floats(p.su + at);
  const uint32_t weight = load_word(static_cast<const T*>(p.weight) + at);
  const RotateSource source = row_source(sums, slots, own, m, 2 * tid);
  cluster_wait();  // all blocks have begun
  grid_dependency_wait();

  const size_t first = size_t(m) * p.n;
  const uint32_t x = load_word(static_cast<const T*>(p.x) + first + at);
  float2 sum = make_float2(0.f, 0.f);
  add_slots2<kSlots>(source, sum.x, sum.y);
  send_cluster(columns + own * kPairs + pair, r, sum, &columns_here);
  // Row r of U over the rows of what lies there.
  auto over_rows = [&](const float2* from) {
    float2 v = make_float2(0.f, 0.f);
#pragma unroll
    for (int k = 0; k < C; ++k) {
      const float2 o = from[k * kPairs + pair];
      const float sign = __popc(k & r) & 1 ? -1.f : 1.f;
      v = make_float2(fmaf(sign, o.x, v.x), fmaf(sign, o.y, v.y));
    }
    return v;
  };
  wait_for_cluster(&columns_here);
  float2 v = over_rows(columns);
  const uint32_t total =
      add2(x, round2<T>(v.x * (p.gain * sv.x), v.y * (p.gain * sv.y)), T());
  *reinterpret_cast<uint32_t*>(static_cast<T*>(p.sum) + first + at) = total;
  const float2 t = unpack2(total, T()), w = unpack2(weight, T());
  turned[tid] = make_float2(t.x * (su.x * w.x), t.y * (su.y * w.y));
  float square = t.x * t.x + t.y * t.y;
#pragma unroll
  for (int d = 16; d > 0; d /= 2) square += __shfl_xor_sync(~0u, square, d);
  if (lane < C) send_cluster(squares + own * kMixNormWarps + warp, lane, square, &row_here);
  __syncthreads();

  v = over_rows(turned);
  // S_512 of a row: bit 0 in the thread, 1 .. 5 in the lanes; 6 .. 8 are the warp of the last part.
  v = make_float2(v.x + v.y, v.x - v.y);
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const float sign = tid & d ? -1.f : 1.f;
    v = make_float2(fmaf(sign, v.x, __shfl_xor_sync(~0u, v.x, d)),
                    fmaf(sign, v.y, __shfl_xor_sync(~0u, v.y, d)));
  }
  send_cluster(row + own * kPairs + pair, r, v, &row_here);
  wait_for_cluster(&row_here);
  float all = 0.f;
#pragma unroll
  for (int k = 0; k < kSquares; k += 32)
    all += kSquares % 32 == 0 || lane < kSquares % 32 ? squares[k + lane] : 0.f;
#pragma unroll
  for (int d = 16; d > 0; d /= 2) all += __shfl_xor_sync(~0u, all, d);
  float2 out = make_float2(0.f, 0.f);
#pragma unroll
  for (int k = 0; k < kMixNormWarps; ++k) {
    const float2 o = row[k * 32 + lane];
    const float sign = __popc(k & warp) & 1 ? -1.f : 1.f;
    out = make_float2(fmaf(sign, o.x, out.x), fmaf(sign, o.y, out.y));
  }
  const float scale = p.gain * rsqrtf(all * (1.f / (C * kRow)) + p.eps);
  *reinterpret_cast<uint32_t*>(static_cast<T*>(p.y) + first + own * kRow + 2 * tid) =
      round2<T>(out.x * scale, out.y * scale);
}

template <typename T, int C>
cudaError_t mix_norm_sums(const MixNormParams& p, const RotateParams& sums, cudaStream_t stream) {
  RowSlots slots;
  const cudaError_t e = row_slots(sums.s, &slots);
  if (e != cudaSuccess) return e;
  return enqueue_clusters(C, mix_norm_sums_kernel<T, C>, dim3(C, sums.tokens), kMixNormThreads, 0,
                          stream, p, sums, slots);
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
