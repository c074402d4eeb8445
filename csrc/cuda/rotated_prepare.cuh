// One-time work on a rotated or scalar weight: pack, unpack. Not tuned.
#pragma once

#include "rotated.h"

namespace aqlm {

// Byte of E8P code (row n, vector kv) in plane 0: high byte; the low byte is 4 further on.
AQLM_HD size_t e8p_place(const RotatedWeight& w, int n, int kv) {
  const int r = n % kCellRows, lane = r % 8 * 4 + kv % 4;
  const size_t cell = size_t(n / kCellRows) * w.units() + kv / 8;
  return cell * w.cell_bytes() + lane * 16 + r / 16 * 8 + kv / 4 % 2 * 2 + r / 8 % 2;
}
// Byte of the 3-bit residual code.
AQLM_HD size_t e8p_residual_place(const RotatedWeight& w, int n, int kv) {
  const int r = n % kCellRows, lane = r % 8 * 4 + kv % 4;
  const size_t cell = size_t(n / kCellRows) * w.units() + kv / 8;
  return cell * w.cell_bytes() + 512 + lane * 8 + r / 16 * 4 + kv / 4 % 2 * 2 + r / 8 % 2;
}
// Word of the canonical Qidxs and the code's place i in it; rows hold K * bits / 64 words.
AQLM_HD size_t e8p_word_index(const RotatedWeight& w, int n, int kv, int plane, int* i) {
  const int columns = w.K / 32;
  const size_t flat = ((size_t(n / 16) * (w.K / 64) + kv / 8) * 8 + n % 16 / 2) * 4 + kv % 8 / 2;
  *i = n % 2 + 2 * (kv % 2);
  return flat / columns * (w.K / 64 * w.bits) + size_t(plane) * columns + flat % columns;
}

// One thread per code (pair of codes).
__global__ void e8p_pack_kernel(const __grid_constant__ RotatedWeight w, const uint64_t* codes,
                                uint8_t* packed) {
  const size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int vectors = w.K / 8;
  if (at >= size_t(w.N) * vectors) return;
  const int n = at / vectors, kv = at % vectors;
  for (int plane = 0; plane < (w.bits == 4 ? 2 : 1); ++plane) {
    int i;
    const uint64_t word = codes[e8p_word_index(w, n, kv, plane, &i)];
    uint8_t low = 0;
    for (int j = 0; j < 8; ++j) low |= (word >> (32 + 4 * j + i) & 1) << j;
    uint8_t* to = packed + e8p_place(w, n, kv) + plane * 512;
    to[0] = static_cast<uint8_t>(word >> 8 * i);
    to[4] = low;
  }
  if (w.bits == 3) {
    const uint64_t* words = codes + size_t(n) * (w.K / 64 * 3) + w.K / 32;
    const uint8_t* row = reinterpret_cast<const uint8_t*>(words);
    packed[e8p_residual_place(w, n, kv)] = row[kv];
  }
}

// One thread per canonical word; words of a row: K / 32 of codes, then the residual's.
__global__ void e8p_unpack_kernel(const __grid_constant__ RotatedWeight w, uint64_t* codes) {
  const size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int row_words = w.K / 64 * w.bits, columns = w.K / 32;
  if (at >= size_t(w.N) * row_words) return;
  const int row = at / row_words, column = at % row_words;
  uint64_t word = 0;
  if (w.bits == 3 && column >= columns) {
    for (int b = 0; b < 8; ++b) {
      const int kv = (column - columns) * 8 + b;
      word |= uint64_t(w.packed[e8p_residual_place(w, row, kv)]) << (8 * b);
    }
  } else {
    const int plane = column / columns;
    const size_t flat = size_t(row) * columns + column % columns;
    const int c = flat % 4, r = flat / 4 % 8;
    const int ik = flat / 32 % (w.K / 64), it = flat / 32 / (w.K / 64);
    for (int i = 0; i < 4; ++i) {
      const uint8_t* from =
          w.packed + e8p_place(w, 16 * it + 2 * r + i % 2, 8 * ik + 2 * c + i / 2) + plane * 512;
      word |= uint64_t(from[0]) << (8 * i);
      for (int j = 0; j < 8; ++j) word |= uint64_t(from[4] >> j & 1) << (32 + 4 * j + i);
    }
  }
  codes[at] = word;
}

// Where field f, byte j of a scalar code lies: byte offset in the cell and bit.
struct ScalarPlace {
  size_t byte;
  int bit;
};
AQLM_HD ScalarPlace scalar_place(const RotatedWeight& w, int n, int k) {
  const int r = n % kCellRows, q = k % kCellColumns;
  const int f = q / 16, lane = r % 8 * 4 + q % 16 / 4;
  const size_t cell = (size_t(n / kCellRows) * w.units() + k / kCellColumns) * w.cell_bytes();
  const size_t at = cell + lane * 16 + r / 8 * 4 + q % 4;
  if (w.bits == 8) return {at + f * 512, 0};
  if (w.bits == 4) return {at + f / 2 * 512, f % 2 * 4};
  return {at, 2 * f};
}
// Low bit of a 3-bit code.
AQLM_HD ScalarPlace scalar_low_place(const RotatedWeight& w, int n, int k) {
  const int r = n % kCellRows, q = k % kCellColumns;
  const size_t cell = (size_t(n / kCellRows) * w.units() + k / kCellColumns) * w.cell_bytes();
  const int lane = r % 8 * 4 + q % 16 / 4;
  return {cell + 512 + lane * 8 + r / 16 * 4 + q % 4, q / 16 + r / 8 % 2 * 4};
}
AQLM_HD int scalar_code(const RotatedWeight& w, int n, int k) {
  const ScalarPlace p = scalar_place(w, n, k);
  const int field = w.packed[p.byte] >> p.bit;
  if (w.bits == 3) {
    const ScalarPlace l = scalar_low_place(w, n, k);
    return ((field & 3) * 2 + (w.packed[l.byte] >> l.bit & 1)) ^ 4;
  }
  return (field & ((1 << w.bits) - 1)) ^ (1 << (w.bits - 1));
}

// One thread per lane of a cell, which owns the bytes it writes.
__global__ void scalar_pack_kernel(const __grid_constant__ RotatedWeight w, const uint8_t* codes,
                                   uint8_t* packed) {
  const size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= size_t(w.blocks()) * w.units() * 32) return;
  const int lane = at % 32, unit = at / 32 % w.units(), block = at / 32 / w.units();
  const size_t row_bytes = size_t(w.K) * w.bits / 8;
  for (int i = 0; i < 64; ++i) {
    const int n = block * kCellRows + i / 16 * 8 + lane / 4;
    const int k = unit * kCellColumns + i % 16 / 4 * 16 + lane % 4 * 4 + i % 4;
    if (n >= w.N || k >= w.K) continue;
    int q = 0;
    for (int b = 0; b < w.bits; ++b) {
      const size_t bit = size_t(k) * w.bits + b;
      q |= (codes[n * row_bytes + bit / 8] >> bit % 8 & 1) << b;
    }
    q ^= 1 << (w.bits - 1);
    const ScalarPlace p = scalar_place(w, n, k);
    if (w.bits == 3) {
      const ScalarPlace l = scalar_low_place(w, n, k);
      packed[l.byte] |= (q & 1) << l.bit;
      q >>= 1;
    }
    packed[p.byte] |= q << p.bit;
  }
}

// One thread per canonical byte.
__global__ void scalar_unpack_kernel(const __grid_constant__ RotatedWeight w, uint8_t* codes) {
  const size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const size_t row_bytes = size_t(w.K) * w.bits / 8;
  if (at >= w.N * row_bytes) return;
  const int n = at / row_bytes;
  int byte = 0;
  for (int i = 0; i < 8; ++i) {
    const size_t bit = at % row_bytes * 8 + i;
    byte |= (scalar_code(w, n, bit / w.bits) >> bit % w.bits & 1) << i;
  }
  codes[at] = byte;
}

}  // namespace aqlm
