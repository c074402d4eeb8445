// Scalar codes to int8 MMA operands: centred on 0, at most a shift and two LOP3 for 4 weights.
//
// Lane (g, t) holds columns 16f + 4t + j of rows g + 8r; stored is q with its top bit flipped:
//   2 bit: word r: bits 8j + 2f          4 bit: plane f / 2, word r: bits 8j + 4 (f % 2)
//   8 bit: plane f, word r: byte j       3 bit: top two bits as at 2 bit; low bit in the 8-byte
//                                        plane: word r / 2, bit 8j + f + 4 (r % 2)
// Operand: kScalarStep * (q - kScalarCentre).
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace aqlm {

__host__ __device__ constexpr float scalar_step(int bits) {
  return bits == 2 ? 64.f : bits == 3 ? 32.f : bits == 4 ? 16.f : 1.f;
}
__host__ __device__ constexpr float scalar_centre(int bits) {
  return bits == 2 ? 1.5f : bits == 3 ? 3.5f : bits == 4 ? 7.5f : 128.f;
}

template <int kBits>
struct ScalarCodes {
  uint4 a[kBits == 8 ? 4 : kBits == 4 ? 2 : 1];
  uint2 b;
};

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Word f of row g + 8r: four operands, columns 16f + 4t + 0..3.
template <int kBits>
__device__ __forceinline__ uint32_t scalar_operand(const ScalarCodes<kBits>& c, int r, int f) {
  if constexpr (kBits == 8) {
    return word_of(c.a[f], r);
  } else if constexpr (kBits == 4) {
    const uint32_t w = word_of(c.a[f / 2], r);
    return and_or(f % 2 ? w : w << 4, 0xF0F0F0F0u, 0x08080808u);
  } else {
    const uint32_t w = word_of(c.a[0], r) << (6 - 2 * f);
    if constexpr (kBits == 2) return and_or(w, 0xC0C0C0C0u, 0x20202020u);
    const int shift = 5 - (f + 4 * (r % 2));
    const uint32_t low = r < 2 ? c.b.x : c.b.y;
    const uint32_t bit = shift >= 0 ? low << shift : low >> -shift;
    return and_or(bit, 0x20202020u, and_or(w, 0xC0C0C0C0u, 0x10101010u));
  }
}

// A operands of row tile i: a[s] columns 32s .. 32s + 31 of the cell.
template <int kBits>
__device__ __forceinline__ void scalar_operands(const ScalarCodes<kBits>& c, int i,
                                                uint32_t (&a)[2][4]) {
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      a[s][j] = scalar_operand<kBits>(c, 2 * i + j % 2, 2 * s + j / 2);
}

}  // namespace aqlm
