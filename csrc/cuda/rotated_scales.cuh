// Scales and zeros of scale groups along K, on their way through shared memory.
//
// A warp holds those of its 32 rows for kGroupChunk groups at a time, 16 bytes a row and plane: the
// chunk in use and the one on its way. A queue in registers would shift and copy more than this
// reads. Pairs of 16-bit values only (tune::rotated_group_body).
#pragma once

#include "rotated_rows.cuh"
#include "rotated_tune.h"

namespace aqlm {

using tune::kGroupBytes, tune::kGroupChunk;
constexpr int kGroupRow = kGroupChunk * 2, kGroupPlane = kCellRows * kGroupRow;  // bytes

__device__ __forceinline__ void copy_async4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
               :: "r"(smem_address(to)), "l"(from) : "memory");
}

struct GroupScales {
  const RotatedWeight& w;
  unsigned char* own;  // kGroupBytes of the warp
  int groups;
  bool aligned, half;

  __device__ __forceinline__ GroupScales(const RotatedWeight& weight, unsigned char* bytes)
      : w(weight), own(bytes), groups(w.K / w.group), aligned(groups % kGroupChunk == 0),
        half(w.scale_type == DType::kFloat16) {}

  // Starts copying chunk c of a row block into buffer `at`, a row each lane; the caller commits.
  __device__ __forceinline__ void copy(int block, int c, int at) const {
    const int lane = threadIdx.x % 32, j = c * kGroupChunk;
    if (j >= groups) return;
    const size_t row = size_t(min(block * kCellRows + lane, w.N - 1)) * groups;
    unsigned char* const to = own + at * 2 * kGroupPlane + lane * kGroupRow;
    const uint16_t* const scales = static_cast<const uint16_t*>(w.scales) + row;
    const uint16_t* const zeros = static_cast<const uint16_t*>(w.zeros) + row;
    if (aligned) {
      copy_async(to, scales + j);
      copy_async(to + kGroupPlane, zeros + j);
      return;
    }
    for (int i = 0; i < kGroupChunk; i += 2) {
      copy_async4(to + 2 * i, scales + min(j + i, groups - 2));
      copy_async4(to + kGroupPlane + 2 * i, zeros + min(j + i, groups - 2));
    }
  }
  // Group j of `row` in buffer `at`, twice as it is: plane 0 the scale, 1 the zero.
  __device__ __forceinline__ uint32_t pair(uint32_t j, int plane, int row, int at) const {
    const uint32_t raw = *reinterpret_cast<const uint16_t*>(
        own + (at * 2 + plane) * kGroupPlane + row * kGroupRow + j % kGroupChunk * 2);
    return raw | raw << 16;
  }
  // As a number.
  __device__ __forceinline__ float value(uint32_t j, int plane, int row, int at) const {
    const uint16_t raw = *reinterpret_cast<const uint16_t*>(
        own + (at * 2 + plane) * kGroupPlane + row * kGroupRow + j % kGroupChunk * 2);
    return half ? to_float(__ushort_as_half(raw)) : __uint_as_float(uint32_t(raw) << 16);
  }
};

}  // namespace aqlm
