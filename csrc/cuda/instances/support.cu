// Launchers of everything that is not a tensor-core or table body.
#include <algorithm>
#include <type_traits>

#include "../bodies.h"
#include "../dequant_wide.cuh"
#include "../enqueue.cuh"
#include "../fragments.cuh"
#include "../gather.cuh"
#include "../prepare.cuh"
#include "../reduce.cuh"

namespace aqlm {

template <typename T>
cudaError_t launch_gather(const MatmulParams& p, cudaStream_t stream) {
  return enqueue(gather_kernel<T>, ceil_div(p.a.out_features(), kGatherWarps), kGatherWarps * 32, 0,
                 stream, p);
}
template cudaError_t launch_gather<__half>(const MatmulParams&, cudaStream_t);
template cudaError_t launch_gather<__nv_bfloat16>(const MatmulParams&, cudaStream_t);
template cudaError_t launch_gather<float>(const MatmulParams&, cudaStream_t);

template <typename T>
cudaError_t launch_reduce(const MatmulParams& p, cudaStream_t stream) {
  const int elements = p.s.slot_tokens * p.s.group_rows;
  const int slots = p.s.max_slots;
  const bool beside = p.tokens == 1 && p.s.classes > 1;  // 1x16, one token
  auto run = [&](auto kernel, int ways, int each) {
    const dim3 grid(ceil_div(elements, kReduceThreads / ways * each), p.s.cells / p.s.units);
    return enqueue(kernel, grid, kReduceThreads, 0, stream, p);
  };
  if (slots <= kReduceInFlight) return run(reduce_kernel<T, 1, false>, 1, reduce_each(1, false));
  if (slots > 4 * kReduceInFlight) return run(reduce_kernel<T, 8, false>, 8, reduce_each(8, false));
  if (beside) return run(reduce_kernel<T, 4, true>, 4, reduce_each(4, true));
  return run(reduce_kernel<T, 4, false>, 4, reduce_each(4, false));
}
template cudaError_t launch_reduce<__half>(const MatmulParams&, cudaStream_t);
template cudaError_t launch_reduce<__nv_bfloat16>(const MatmulParams&, cudaStream_t);

template <typename T>
cudaError_t launch_fragments(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream) {
  constexpr int kChunks = 4;  // of K, per token: enough blocks for M = 1
  const bool int8 = c.precision == Precision::kInt8;
  const dim3 grid(c.token_tile, kChunks);
  const int tiles = c.token_tile / (int8 ? 4 : 8);
  const bool halves = c.body == Body::kSplitWgmma || c.body == Body::kWgmmaInt8;
  auto run = [&](auto kernel) {
    return enqueue(kernel, grid, kFragmentThreads, 0, stream, p, tiles);
  };
  if (int8) return run(halves ? fragments_kernel<T, true, true> : fragments_kernel<T, true, false>);
  return run(halves ? fragments_kernel<T, false, true> : fragments_kernel<T, false, false>);
}
template cudaError_t launch_fragments<__half>(const LaunchConfig&, const MatmulParams&,
                                              cudaStream_t);
template cudaError_t launch_fragments<__nv_bfloat16>(const LaunchConfig&, const MatmulParams&,
                                                     cudaStream_t);

namespace {

// Row tiles that contain rows [row0, row1), counted over all parts.
void tile_range(const Additive& a, int row0, int row1, int* first, int* count) {
  auto tile_of = [&](int row) {
    const int p = a.part_of(row);
    return a.tile0(p) + (row - a.row0[p]) / a.tile_rows();
  };
  *first = tile_of(row0);
  *count = tile_of(row1 - 1) - *first + 1;
}

template <typename T, int B, bool kRound>
cudaError_t dequant_tables(const DequantParams& p, int tile0, int tiles, cudaStream_t stream) {
  int device = 0;
  DeviceInfo info;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = device_info(device, &info);
  if (e != cudaSuccess) return e;
  static std::atomic<unsigned long long> done{0};
  constexpr int kSmem = B * kMmaBookBytes;
  auto kernel = dequant_tables_kernel<T, B, kRound>;
  e = allow_smem(kernel, &done, device, kSmem);
  if (e != cudaSuccess) return e;
  const int items = tiles * ceil_div(p.col1 - p.col0, 32);
  constexpr int kPerSm = B == 1 ? 4 : B == 2 ? 3 : 1;
  constexpr int kWarps = dequant_tables_warps(B);
  const int ctas = std::min(ceil_div(items, kWarps), info.sms * kPerSm);
  return enqueue(kernel, ctas, kWarps * 32, kSmem, stream, p, tile0, tiles);
}

// Whether one part's codebooks fit in shared memory as they are, and where a launch finds room.
template <typename T, int kG, bool kRound>
cudaError_t dequant_wide(const DequantParams& p, int tile0, int tiles, const DeviceInfo& info,
                         cudaStream_t stream) {
  static std::atomic<unsigned long long> done{0};
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  auto kernel = dequant_wide_kernel<T, kG, kRound>;
  if (e == cudaSuccess) e = allow_smem(kernel, &done, device, info.max_smem);
  if (e != cudaSuccess) return e;
  const int items = tiles * ceil_div(p.col1 - p.col0, kStepVectors * kG);
  const int smem = p.a.codebooks * p.a.entries() * kG * sizeof(T);
  return enqueue(kernel, std::min(ceil_div(items, kWideWarps), info.sms), kWideWarps * 32, smem,
                 stream, p, tile0, tiles);
}

template <typename T>
cudaError_t dequant(const DequantParams& p, cudaStream_t stream) {
  const Additive& a = p.a;
  constexpr int kThreads = kDequantWarps * 32;
  if (a.storage() == Storage::kRows) {
    constexpr int kMaxGridRows = 65535;
    const int vectors = ceil_div(p.col1 - p.col0, a.in_group);
    for (int row = p.row0; row < p.row1; row += kMaxGridRows) {
      DequantParams q = p;
      q.row0 = row;
      q.row1 = row + kMaxGridRows < p.row1 ? row + kMaxGridRows : p.row1;
      q.out = static_cast<T*>(p.out) + (row - p.row0) * p.out_stride;
      const cudaError_t e = enqueue(dequant_rows_kernel<T>,
                                    dim3(ceil_div(vectors, 256), q.row1 - q.row0), 256, 0,
                                    stream, q);
      if (e != cudaSuccess) return e;
    }
    return cudaSuccess;
  }
  int tile0, tiles;
  tile_range(a, p.row0, p.row1, &tile0, &tiles);
  const bool words = a.storage() == Storage::kWordTiles;
  const int span = a.in_group * (words ? kTileVectors : kStepVectors);
  const dim3 grid(ceil_div(ceil_div(p.col1 - p.col0, span), kDequantWarps), tiles);
  if constexpr (!std::is_same_v<T, float>) {
    if (!words && a.in_group == 8 && a.codebooks == 1)
      return dequant_tables<T, 1, false>(p, tile0, tiles, stream);
    if (!words && a.in_group == 8 && a.codebooks == 2)
      return p.rounded_sum ? dequant_tables<T, 2, true>(p, tile0, tiles, stream)
                           : dequant_tables<T, 2, false>(p, tile0, tiles, stream);
    int device = 0;
    DeviceInfo info;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess) e = device_info(device, &info);
    if (e != cudaSuccess) return e;
    if (!words && a.in_group == 8 && a.codebooks == 4 && info.max_smem >= 4 * kMmaBookBytes)
      return p.rounded_sum ? dequant_tables<T, 4, true>(p, tile0, tiles, stream)
                           : dequant_tables<T, 4, false>(p, tile0, tiles, stream);
    const int book_bytes = a.codebooks * a.entries() * a.in_group * int(sizeof(T));
    if (!words && a.in_group == 32 && book_bytes <= info.max_smem)
      return p.rounded_sum ? dequant_wide<T, 32, true>(p, tile0, tiles, info, stream)
                           : dequant_wide<T, 32, false>(p, tile0, tiles, info, stream);
    if (!words && a.in_group == 16 && book_bytes <= info.max_smem)
      return p.rounded_sum ? dequant_wide<T, 16, true>(p, tile0, tiles, info, stream)
                           : dequant_wide<T, 16, false>(p, tile0, tiles, info, stream);
  }
  if (words) return enqueue(dequant_words_kernel<T>, grid, kThreads, 0, stream, p, tile0);
  return enqueue(dequant_bytes_kernel<T>, grid, kThreads, 0, stream, p, tile0);
}

template <typename T>
cudaError_t prepare(const Additive& a, Precision precision, const void* codebooks, uint8_t* aux,
                    cudaStream_t stream) {
  if (precision == Precision::kInt8) {
    prepare_int8_kernel<T><<<a.parts, 1024, 0, stream>>>(a, static_cast<const T*>(codebooks), aux);
  } else {
    const dim3 grid(ceil_div(a.entries() * a.in_group, 256), a.parts);
    prepare_split_kernel<<<grid, 256, 0, stream>>>(a, static_cast<const uint16_t*>(codebooks),
                                                   reinterpret_cast<uint16_t*>(aux + kAuxHeader));
  }
  return cudaGetLastError();
}

int blocks_for_codes(const Additive& a) {
  return static_cast<int>((size_t(a.out_groups()) * a.in_groups * a.codebooks + 255) / 256);
}

}  // namespace

cudaError_t launch_dequant(DType dtype, const DequantParams& p, cudaStream_t stream) {
  if (p.row1 <= p.row0 || p.col1 <= p.col0) return cudaSuccess;
  if (dtype == DType::kFloat16) return dequant<__half>(p, stream);
  if (dtype == DType::kBFloat16) return dequant<__nv_bfloat16>(p, stream);
  return dequant<float>(p, stream);
}

size_t aux_bytes(const Additive& a, Precision precision) {
  const size_t values = size_t(a.parts) * a.codebooks * a.entries() * a.in_group;
  const bool int8 = precision == Precision::kInt8;
  if (a.storage() == Storage::kWordTiles) return kAuxHeader + values * (int8 ? 1 : 2);
  const bool mma = a.in_group == 8 && (a.codebooks <= 2 || a.codebooks == 4);
  return a.storage() == Storage::kByteTiles && int8 && mma ? kAuxHeader + values : 0;
}

cudaError_t launch_prepare(const Additive& a, Precision precision, DType dtype,
                           const void* codebooks, uint8_t* aux, cudaStream_t stream) {
  if (dtype == DType::kFloat16) return prepare<__half>(a, precision, codebooks, aux, stream);
  return prepare<__nv_bfloat16>(a, precision, codebooks, aux, stream);
}

cudaError_t launch_pack(const Additive& a, const void* codes, uint8_t* packed, int code_bytes,
                        cudaStream_t stream) {
  const cudaError_t e = cudaMemsetAsync(packed, 0, a.packed_bytes(), stream);
  if (e != cudaSuccess) return e;
  const int blocks = blocks_for_codes(a);
  if (blocks == 0) return cudaSuccess;
  if (code_bytes == 1)
    pack_kernel<<<blocks, 256, 0, stream>>>(a, static_cast<const int8_t*>(codes), packed);
  else
    pack_kernel<<<blocks, 256, 0, stream>>>(a, static_cast<const int16_t*>(codes), packed);
  if (a.storage() == Storage::kWordTiles) {
    const size_t warps = size_t(ceil_div(a.units(), kChoiceUnits)) * a.tile0(a.parts);
    const int grid = static_cast<int>((warps + kChooseWarps - 1) / kChooseWarps);
    choose_kernel<<<grid, kChooseWarps * 32, 0, stream>>>(a, packed);
  }
  return cudaGetLastError();
}

cudaError_t launch_unpack(const Additive& a, const uint8_t* packed, void* codes, int code_bytes,
                          cudaStream_t stream) {
  const int blocks = blocks_for_codes(a);
  if (blocks == 0) return cudaSuccess;
  if (code_bytes == 1)
    unpack_kernel<<<blocks, 256, 0, stream>>>(a, packed, static_cast<int8_t*>(codes));
  else
    unpack_kernel<<<blocks, 256, 0, stream>>>(a, packed, static_cast<int16_t*>(codes));
  return cudaGetLastError();
}

cudaError_t launch_add_bias(DType dtype, void* y, const void* bias, int tokens, int features,
                            cudaStream_t stream) {
  const dim3 grid(ceil_div(features, 256), tokens);
  if (dtype == DType::kFloat16)
    add_bias_kernel<<<grid, 256, 0, stream>>>(static_cast<__half*>(y),
                                              static_cast<const __half*>(bias), features);
  else if (dtype == DType::kBFloat16)
    add_bias_kernel<<<grid, 256, 0, stream>>>(static_cast<__nv_bfloat16*>(y),
                                              static_cast<const __nv_bfloat16*>(bias), features);
  else
    add_bias_kernel<<<grid, 256, 0, stream>>>(static_cast<float*>(y),
                                              static_cast<const float*>(bias), features);
  return cudaGetLastError();
}

}  // namespace aqlm
