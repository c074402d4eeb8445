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

// The same in two copies (kSecondAt apart) for code i = 0 .. 3 of two words; byte i of `second`
// says which. One PRMT puts the 17 bits together; its top byte repeats the sign of a byte of
// `second`, which is 0.
__device__ __forceinline__ uint32_t copy_offset(uint32_t w, uint32_t second, int i) {
  uint32_t at;
  asm("prmt.b32 %0, %1, %2, %3;"
      : "=r"(at) : "r"(w), "r"(second), "r"((i % 2 ? 0xc032 : 0xc010) | (4 + i) << 8));
  return at * 2;
}
// Which copies the codes of a unit's row half h read, from a word of choices shifted to the unit.
__device__ __forceinline__ uint32_t second_copies(uint32_t choices, int h) {
  return choices >> h & 0x01010101u;
}
// Codes of two vectors as they were before a copy was chosen; i = 0 or 1 of the row half's words.
__device__ __forceinline__ uint32_t plain_codes(uint32_t w, uint32_t second, int i) {
  const uint32_t mask = __byte_perm(second, 0, i ? 0x4342 : 0x4140) * 0x3eu;
  return w ^ (w >> 5 & mask);
}

}  // namespace aqlm
