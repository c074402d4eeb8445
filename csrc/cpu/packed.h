// The packed layout of additive codes on CPU: one layout for every instruction set.
//
// T = in_groups * B lookups a row, lookup t = i * B + k (input group i, codebook k).
//
//   nbits <= 8: one byte a code; rows in blocks of 256 (the last block: a multiple of 64)
//
//     block 0                                   block 1
//     t=0   [row 0 | row 1 | ... | row 255]     t=0   [row 256 | ... ]      ...
//     t=1   [row 0 | row 1 | ... | row 255]     t=1   [row 256 | ... ]
//     ...
//     t=T-1 [ ... ]
//
//   nbits 9..16: two bytes a code; rows in blocks of 8, each block padded to 64 bytes
//
//     block 0                                   block 1
//     t=0   [row 0 | ... | row 7]               t=0   [row 8 | ... | row 15] ...
//     ...
//
// Codes are unsigned; rows past the end are zero. A row here is an output group: with
// out_group_size > 1 one row of codes feeds out_group_size outputs.
#pragma once

#include <cstdint>

namespace aqlm::cpu {

constexpr int64_t kUnitRows = 64;    // byte codes: rows are padded to, and shared out in, units
constexpr int64_t kBlockRows = 256;  // byte codes: rows stored side by side
constexpr int64_t kWideRows = 8;     // 16-bit codes: rows stored side by side

struct PackedShape {
  int64_t out_groups;
  int64_t in_groups;
  int num_codebooks;
  int nbits;

  bool wide() const { return nbits > 8; }
  int64_t lookups() const { return in_groups * num_codebooks; }
  int64_t units() const { return (out_groups + kUnitRows - 1) / kUnitRows; }
  int64_t wide_blocks() const { return (out_groups + kWideRows - 1) / kWideRows; }

  // Width of the byte-code block that holds this unit, its first byte, and the unit's column.
  int64_t block_width(int64_t unit) const {
    const int64_t first = unit / (kBlockRows / kUnitRows) * kBlockRows;
    const int64_t left = units() * kUnitRows - first;
    return left < kBlockRows ? left : kBlockRows;
  }
  int64_t unit_offset(int64_t unit) const {
    const int64_t in_block = unit % (kBlockRows / kUnitRows);
    return (unit - in_block) * kUnitRows * lookups() + in_block * kUnitRows;
  }
  int64_t wide_block_bytes() const { return (lookups() * kWideRows * 2 + 63) / 64 * 64; }

  int64_t nbytes() const {
    return wide() ? wide_blocks() * wide_block_bytes() : units() * kUnitRows * lookups();
  }
};

}  // namespace aqlm::cpu
