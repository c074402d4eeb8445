// Launchers of sum_joined.cuh.
#include "sum_joined.cuh"

#include <algorithm>
#include <atomic>

#include "enqueue.cuh"

namespace aqlm {
namespace {

// Most slots that `count` neighbouring groups, `apart` groups apart, have together.
int most_slots(const MatmulParams& p, int count, int apart) {
  const int groups = p.a.out_groups() / kGroup;
  int most = 0;
  for (int g = 0; g + (count - 1) * apart < groups; ++g) {
    int slots = 0;
    for (int i = 0; i < count; ++i) slots += slots_between(p.s, g + i * apart);
    most = std::max(most, slots);
  }
  return most;
}

// Tokens of a block: about four blocks an SM, as far as shared memory goes (a step of 2x8, B = 16:
// 2624 us, with two 2634, with one 2681).
int tokens_each(const MatmulParams& p, int groups, int slots, int sms) {
  const int wanted = ceil_div(groups * p.tokens, 4 * sms);
  return std::max(1, std::min({wanted, kMostBytes / (slots * kGroupBytes), p.tokens}));
}

// Groups that a block of sum_norm_kernel has.
int norm_each(const MatmulParams& p) {
  return p.a.out_groups() / kGroup > kMostCluster ? kMostEach : 1;
}

template <typename Kernel, typename... Args>
cudaError_t launch(Kernel kernel, std::atomic<unsigned long long>* done,
                   const MatmulParams& product, int cluster, dim3 grid, int smem,
                   cudaStream_t stream, Args... args) {
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = allow_smem(kernel, done, device, kMostBytes);
  if (e != cudaSuccess) return e;
  const Placement place = {cluster, carveout_beside(product.a, product.x_scales != nullptr)};
  return enqueue_placed(place, kernel, grid, kSumThreads, smem, stream, args...);
}

cudaError_t sms_of(int* sms) {
  int device = 0;
  DeviceInfo info;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = device_info(device, &info);
  *sms = info.sms;
  return e;
}

template <typename T, int kEach, bool kInt8>
cudaError_t sum_norm(const SumNormParams& p, cudaStream_t stream) {
  static std::atomic<unsigned long long> done{0};
  const int blocks = p.product.a.out_groups() / (kGroup * kEach);
  const int slots = most_slots(p.product, kEach, 1);
  return launch(sum_norm_kernel<T, kEach, kInt8>, &done, p.product, blocks,
                dim3(blocks, p.product.tokens), slots * kGroupBytes, stream, p);
}

template <typename T>
cudaError_t sum_norm(const SumNormParams& p, cudaStream_t stream) {
  const bool int8 = p.to.scales != nullptr;
  if (norm_each(p.product) == 1)
    return int8 ? sum_norm<T, 1, true>(p, stream) : sum_norm<T, 1, false>(p, stream);
  return int8 ? sum_norm<T, 2, true>(p, stream) : sum_norm<T, 2, false>(p, stream);
}

// Blocks that share a token of SwiGLU's int8 image: the most of which each has as many groups.
int int8_cluster(const MatmulParams& p) {
  const int groups = p.a.rows_of(0) / kGroup;
  int blocks = std::min(groups, kMostCluster);
  while (groups % blocks != 0) --blocks;
  return blocks;
}
int int8_slots(const MatmulParams& p) {
  const int groups = p.a.rows_of(0) / kGroup;
  return groups / int8_cluster(p) * (most_slots(p, 2, groups) + 1);  // and its factors
}

template <typename T>
cudaError_t sum_swiglu_int8(const SumSwigluParams& p, cudaStream_t stream) {
  static std::atomic<unsigned long long> done{0};
  const int blocks = int8_cluster(p.product);
  return launch(sum_swiglu_int8_kernel<T>, &done, p.product, blocks,
                dim3(blocks, p.product.tokens), int8_slots(p.product) * kGroupBytes, stream, p,
                p.product.a.rows_of(0) / kGroup / blocks);
}

template <typename T>
cudaError_t sum_swiglu(const SumSwigluParams& p, cudaStream_t stream) {
  if (p.to.scales != nullptr) return sum_swiglu_int8<T>(p, stream);
  static std::atomic<unsigned long long> done{0};
  int sms = 0;
  const cudaError_t e = sms_of(&sms);
  if (e != cudaSuccess) return e;
  const int groups = p.product.a.rows_of(0) / kGroup;
  const int slots = most_slots(p.product, 2, groups);
  const int each = tokens_each(p.product, groups, slots, sms);
  return launch(sum_swiglu_kernel<T>, &done, p.product, 1,
                dim3(groups, ceil_div(p.product.tokens, each)), slots * each * kGroupBytes, stream,
                p, each);
}

template <typename T>
cudaError_t sum_rows(const MatmulParams& p, cudaStream_t stream) {
  static std::atomic<unsigned long long> done{0};
  int sms = 0;
  const cudaError_t e = sms_of(&sms);
  if (e != cudaSuccess) return e;
  const int groups = p.a.out_groups() / kGroup, slots = most_slots(p, 1, 1);
  const int each = tokens_each(p, groups, slots, sms);
  return launch(sum_rows_kernel<T>, &done, p, 1, dim3(groups, ceil_div(p.tokens, each)),
                slots * each * kGroupBytes, stream, p, each);
}

}  // namespace

bool takes_sums(const LaunchConfig& c, const MatmulParams& p, const DeviceInfo& device) {
  if (c.token_tile == 0 || c.body == Body::kGather || c.dtype == DType::kFloat32 ||
      device.arch < 90 || p.a.out_group != 1)
    return false;
  const Schedule& s = p.s;
  if (s.passes != 1 || s.whole != 0 || s.group_rows != kGroup || p.tokens > c.token_tile)
    return false;
  for (int i = 0; i < p.a.parts; ++i)
    if (p.a.rows_of(i) % kGroup != 0) return false;
  return most_slots(p, 1, 1) * kGroupBytes <= kMostBytes;
}

bool takes_sum_norm(const MatmulParams& p) {
  const int groups = p.a.out_groups() / kGroup, each = norm_each(p);
  return p.a.parts == 1 && groups <= kMostCluster * kMostEach && groups % each == 0 &&
         most_slots(p, each, 1) * kGroupBytes <= kMostBytes;
}

bool takes_sum_swiglu(const MatmulParams& p) {
  return p.a.parts == 2 && p.a.rows_of(0) == p.a.rows_of(1) &&
         most_slots(p, 2, p.a.rows_of(0) / kGroup) * kGroupBytes <= kMostBytes;
}

bool takes_int8_image(const MatmulParams& p) { return int8_slots(p) * kGroupBytes <= kMostBytes; }

cudaError_t launch_sum_norm(DType type, const SumNormParams& p, cudaStream_t stream) {
  cudaGetLastError();
  return type == DType::kFloat16 ? sum_norm<__half>(p, stream) : sum_norm<__nv_bfloat16>(p, stream);
}

cudaError_t launch_sum_swiglu(DType type, const SumSwigluParams& p, cudaStream_t stream) {
  cudaGetLastError();
  return type == DType::kFloat16 ? sum_swiglu<__half>(p, stream)
                                 : sum_swiglu<__nv_bfloat16>(p, stream);
}

cudaError_t launch_sum_rows(DType type, const MatmulParams& p, cudaStream_t stream) {
  cudaGetLastError();
  return type == DType::kFloat16 ? sum_rows<__half>(p, stream) : sum_rows<__nv_bfloat16>(p, stream);
}

}  // namespace aqlm
