// From packed codes to shared-memory offsets of codebook entries.
#pragma once

#include "../ptx.cuh"

namespace aqlm {

// Byte i of w times the pitch of an entry, plus the lane's own column.
template <int kShift>
__device__ __forceinline__ uint32_t entry_offset(uint32_t w, int i, uint32_t lane_offset) {
  const uint32_t shifted = 8 * i >= kShift ? w >> (8 * i - kShift) : w << (kShift - 8 * i);
  return and_or(shifted, 0xffu << kShift, lane_offset);
}

// Byte offsets of the two 16-bit codes of w in a table of 2-byte entries.
__device__ __forceinline__ uint32_t low_word_offset(uint32_t w) { return (w & 0xffffu) * 2; }
__device__ __forceinline__ uint32_t high_word_offset(uint32_t w) { return (w >> 15) & 0x1fffeu; }

}  // namespace aqlm
