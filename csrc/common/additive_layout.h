// Storage of additive codes for the CUDA kernels: which layout a format uses, and where a code is.
//
// kByteTiles (nbits <= 8, B <= 16, one row per vector, G in {8, 16, 32}): the fragment order of an
// MMA whose A operand is 64 rows x 4 vectors. A *step* is 4 neighbouring vectors of one codebook
// (step = (vector / 4) * B + codebook); two steps make a 512-byte unit, 16 bytes per lane:
//
//   unit | row block of 64 (all parts) | lane = (row % 8) * 4 + vector % 4 | step % 2 | row / 8 % 8
//
// kWordTiles (B = 1, nbits 9..16, one row per vector, G in {8, 16}): a 512-byte unit is 16 rows x
// 16 vectors, 8 codes of 2 bytes per lane:
//
//   unit | row tile of 16 (all parts) | lane = (row % 8) * 4 + vector / 4 % 4 | row / 8 % 2 |
//   vector % 4
//
//   behind all units a bit for each code, a word for each lane and 4 units:
//   unit / 4 | row tile | lane | vector % 4 | unit % 4 | row / 8 % 2
//
// cuda.additive.split looks entries up in shared memory, of which entries below kSecondEntries have
// a second copy there, at second_copy(code), in another bank. Which copy a code reads is chosen when
// it is packed, so that the 32 lookups of an instruction meet fewest bank conflicts (2.3 wavefronts
// for random codes instead of 3.5): the bit is set and second_copy(code) stored for the second.
//
// Units of K come first because a CTA reads one unit of many neighbouring row tiles at a time:
// whole kilobytes of DRAM pages instead of 512 bytes of each (measured: docs/notes/cuda.md).
//
// kRows (everything else): out group, in group, codebook; 1 byte per code up to 8 bits, else 2.
//
// Parts are the fused matrices of one tensor (q/k/v): each starts a row block of its own, because
// each has its own codebooks. Padding holds code 0.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define AQLM_HD __host__ __device__ __forceinline__
#else
#define AQLM_HD inline
#endif

namespace aqlm {

constexpr int kMaxParts = 8;
constexpr int kMaxBooks = 16;     // codebooks of one part in kByteTiles
constexpr int kUnitBytes = 512;   // one unit: 32 lanes x 16 bytes
constexpr int kBlockRows = 64;    // rows of a kByteTiles unit
constexpr int kTileRows = 16;     // rows of a kWordTiles unit
constexpr int kStepVectors = 4;   // vectors of a kByteTiles step
constexpr int kTileVectors = 16;  // vectors of a kWordTiles unit
constexpr int kChoiceUnits = 4;   // kWordTiles units that share a word of choices
constexpr int kSecondAt = 2 << 16;  // bytes from the first copy of a table to the second
constexpr int kSecondEntries = 40960;  // 80 KB: 128 KB, these and activations fill shared memory

enum class Storage : int { kByteTiles = 0, kWordTiles = 1, kRows = 2 };

AQLM_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Where the second copy of an entry lies, counted in entries: another order of each 64, so another
// bank (two entries of 2 bytes share one). Its own inverse.
AQLM_HD int second_copy(int code) { return code ^ (code >> 5 & 0x3e); }

// The shape of one packed tensor: P fused parts of `rows[p]` out groups each.
struct Additive {
  int codebooks;   // B, per part
  int nbits;       // bits per code
  int out_group;   // rows per vector
  int in_group;    // G, columns per vector
  int in_groups;   // vectors per row
  int parts;
  int row0[kMaxParts + 1];  // first out group of each part; [parts] is their sum

  AQLM_HD Storage storage() const {
    const bool g_tiles = in_group == 8 || in_group == 16;
    if (out_group == 1 && nbits <= 8 && codebooks <= kMaxBooks && (g_tiles || in_group == 32))
      return Storage::kByteTiles;
    if (out_group == 1 && codebooks == 1 && nbits > 8 && g_tiles) return Storage::kWordTiles;
    return Storage::kRows;
  }
  AQLM_HD int entries() const { return 1 << nbits; }
  AQLM_HD int out_groups() const { return row0[parts]; }
  AQLM_HD int in_features() const { return in_groups * in_group; }
  AQLM_HD int out_features() const { return out_groups() * out_group; }
  AQLM_HD int code_bytes() const { return nbits <= 8 ? 1 : 2; }
  AQLM_HD int rows_of(int part) const { return row0[part + 1] - row0[part]; }
  AQLM_HD int part_of(int row) const {
    int p = 0;
    while (p + 1 < parts && row >= row0[p + 1]) ++p;
    return p;
  }
  // Steps are rounded up to a whole unit.
  AQLM_HD int units() const {
    return storage() == Storage::kWordTiles
               ? ceil_div(in_groups, kTileVectors)
               : ceil_div(ceil_div(in_groups, kStepVectors) * codebooks, 2);
  }
  AQLM_HD int tile_rows() const {
    return storage() == Storage::kWordTiles ? kTileRows : kBlockRows;
  }
  // Row tiles of all parts before `part`.
  AQLM_HD int tile0(int part) const {
    int n = 0;
    for (int p = 0; p < part; ++p) n += ceil_div(rows_of(p), tile_rows());
    return n;
  }
  // Byte offset of a unit in kByteTiles and kWordTiles; `tile` counts over all parts.
  AQLM_HD size_t unit_offset(int tile, int unit) const {
    return (size_t(unit) * tile0(parts) + tile) * kUnitBytes;
  }
  AQLM_HD size_t packed_bytes() const {
    if (storage() == Storage::kRows)
      return size_t(out_groups()) * in_groups * codebooks * code_bytes();
    if (storage() == Storage::kWordTiles) return choice_offset(0, units() + kChoiceUnits - 1);
    return unit_offset(0, units());
  }
  // Byte offset of the choices of a kWordTiles unit: 32 words, one for each lane.
  AQLM_HD size_t choice_offset(int tile, int unit) const {
    return unit_offset(0, units()) +
           (size_t(unit / kChoiceUnits) * tile0(parts) + tile) * 32 * sizeof(uint32_t);
  }
  // Bit of one code in its lane's word.
  AQLM_HD static int choice_bit(int row, int vector) {
    return vector % 4 * 8 + vector / kTileVectors % kChoiceUnits * 2 + row / 8 % 2;
  }
  // Byte offset of one code in the packed tensor; `row` counts from the start of the tensor.
  AQLM_HD size_t offset(int row, int vector, int codebook) const {
    const Storage s = storage();
    if (s == Storage::kRows)
      return ((size_t(row) * in_groups + vector) * codebooks + codebook) * code_bytes();
    const int part = part_of(row), r = row - row0[part];
    const int tile = tile0(part) + r / tile_rows();
    if (s == Storage::kWordTiles) {
      const int lane = r % 8 * 4 + vector / 4 % 4;
      return unit_offset(tile, vector / kTileVectors) + lane * 16 +
             r / 8 % 2 * 8 + vector % 4 * 2;
    }
    const int step = vector / kStepVectors * codebooks + codebook;
    const int lane = r % 8 * 4 + vector % 4;
    return unit_offset(tile, step / 2) + lane * 16 + step % 2 * 8 + r / 8 % 8;
  }
};

}  // namespace aqlm
