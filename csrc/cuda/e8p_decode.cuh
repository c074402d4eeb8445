// E8P codes to int8 MMA operands: two lookups of 4 bytes and two LOP3 for 8 weights.
//
// 16 bytes of a lane, word 2i + 0: high bytes of the codes of row tile i, 2i + 1: low bytes; byte 0
// (row g, columns 8t..), 1 (row g + 8, 8t..), 2 (row g, 32 + 8t..), 3 (row g + 8, 32 + 8t..): the
// order of the A registers of m16n8k32. A second plane is the residual code: alike at 4 bits, 8
// bytes a lane (word i for row tile i) at 3.
//
// Tables in shared memory, an entry 256 bytes: 32 copies of magnitude[i], one bank each, then 32 of
// sign[i]; so the address of byte b is one PRMT. The 3-bit residual table follows likewise.
#pragma once

#include "e8p_tables.h"
#include "ptx.cuh"

namespace aqlm {

constexpr int kE8pTableBytes = 64 << 10;

__device__ const E8pTables kE8pTables = e8p_detail::make_tables();

// A word of shared memory at a lane's offset from the start of dynamic shared memory. That start is
// the 1 KB that sm_80+ reserves, so it is an immediate and the address needs no addition; a kernel
// that uses this declares no static shared memory and calls check_smem_base.
constexpr uint32_t kSmemBase = 1024;
template <int kOffset>
__device__ __forceinline__ uint32_t load_table(uint32_t offset) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1+%2];" : "=r"(v) : "r"(offset), "n"(kSmemBase + kOffset));
  return v;
}
__device__ __forceinline__ void check_smem_base(const void* smem) {
  if (smem_address(smem) != kSmemBase) __trap();
}

// By the first `threads` threads of the block.
template <int kBits>
__device__ __forceinline__ void fill_e8p_tables(unsigned char* smem, int threads) {
  check_smem_base(smem);
  for (int i = threadIdx.x; i < (kBits == 3 ? 768 : 512); i += threads) {
    const int kind = i / 256, row = i % 256;
    const uint32_t w = kind == 0   ? kE8pTables.magnitude[row]
                       : kind == 1 ? kE8pTables.sign[row]
                                   : kE8pTables.residual[row];
    const uint4 v = make_uint4(w, w, w, w);
    uint4* to = reinterpret_cast<uint4*>(smem + row * 256 + kind * 128 +
                                         (kind == 2 ? kE8pTableBytes - 256 : 0));
#pragma unroll
    for (int c = 0; c < 8; ++c) to[(c + row) & 7] = v;
  }
}

// Offset of entry (byte i of w), the lane's own column: lane_offset = 4 * lane.
__device__ __forceinline__ uint32_t e8p_entry(uint32_t w, int i, uint32_t lane_offset) {
  return __byte_perm(w, lane_offset, 0x5504 | i << 4);
}

// Both halves of code i of a row tile: the word is their XOR.
__device__ __forceinline__ uint32_t e8p_magnitude(uint32_t high, int i, uint32_t lane_offset) {
  return load_table<0>(e8p_entry(high, i, lane_offset));
}
__device__ __forceinline__ uint32_t e8p_sign(uint32_t low, int i, uint32_t lane_offset) {
  return load_table<128>(e8p_entry(low, i, lane_offset));
}
__device__ __forceinline__ uint32_t e8p_residual(uint32_t w, int i, uint32_t lane_offset) {
  return load_table<kE8pTableBytes>(e8p_entry(w, i, lane_offset));
}

// (w & 0xF0..) with the bits of `constant`: set where the mask is 0, flipped where it is 1.
__device__ __forceinline__ uint32_t e8p_select(uint32_t w, uint32_t constant) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(d) : "r"(w), "r"(0xF0F0F0F0u), "r"(constant));
  return d;
}

// (a ^ b) & mask
__device__ __forceinline__ uint32_t xor_and(uint32_t a, uint32_t b, uint32_t mask) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0x28;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
  return d;
}

// The four codes of row tile i as nibble words.
template <int kBits>
__device__ __forceinline__ void e8p_words(const uint4& codes, const uint4& residual4,
                                          const uint2& residual3, int plane, int i,
                                          uint32_t lane_offset, uint32_t (&w)[4]) {
  const uint4& c = plane == 0 ? codes : residual4;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    w[j] = kBits == 3 && plane == 1
               ? e8p_residual(i == 0 ? residual3.x : residual3.y, j, lane_offset)
               : e8p_magnitude(i == 0 ? c.x : c.z, j, lane_offset) ^
                     e8p_sign(i == 0 ? c.y : c.w, j, lane_offset);
}

// A operands: 32w, of the first four weights of each code (high nibbles) and the second four.
template <int kBits>
__device__ __forceinline__ void e8p_expand(const uint32_t (&w)[4], int plane, uint32_t (&a)[2][4]) {
  const bool bytes = kBits == 3 && plane == 1;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    a[0][j] = e8p_select(w[j], bytes ? 0u : 0x08080808u);
    a[1][j] = e8p_select(w[j] << 4, bytes ? 0x80808080u : 0x88888888u);
  }
}

// The same for two accumulators, one LOP3 each: a[0] = 32w - 8 (residual byte: 32w), a[1] =
// 2w + 7.5 (2w + 8).
template <int kBits>
__device__ __forceinline__ void e8p_nibbles(const uint4& codes, const uint4& residual4,
                                            const uint2& residual3, int plane, int i,
                                            uint32_t lane_offset, uint32_t (&a)[2][4]) {
  const uint4& c = plane == 0 ? codes : residual4;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t u, v = 0;
    if (kBits == 3 && plane == 1) {
      u = e8p_residual(i == 0 ? residual3.x : residual3.y, j, lane_offset);
    } else {
      u = e8p_magnitude(i == 0 ? c.x : c.z, j, lane_offset);
      v = e8p_sign(i == 0 ? c.y : c.w, j, lane_offset);
    }
    a[0][j] = xor_and(u, v, 0xF0F0F0F0u);
    a[1][j] = xor_and(u, v, 0x0F0F0F0Fu);
  }
}

// The same of words.
__device__ __forceinline__ void e8p_split(const uint32_t (&w)[4], uint32_t (&a)[2][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    a[0][j] = w[j] & 0xF0F0F0F0u;
    a[1][j] = w[j] & 0x0F0F0F0Fu;
  }
}

}  // namespace aqlm
