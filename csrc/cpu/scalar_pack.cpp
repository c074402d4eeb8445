// Bit streams of scalar codes <-> the layout of scalar-inl.h. Runs once a layer, at load.
#include <cstring>

#include "threads.h"
#include "tiled.h"

namespace aqlm::cpu {
namespace {

// Where the bits of the code in (row r of its unit, column k) lie: `low` bits at `byte`, and for
// 3-bit codes one more at `upper`.
struct Place {
  int64_t byte, upper;
  int shift, upper_shift, low;

  Place(int bits, int64_t r, int64_t k) {
    const int64_t chunk = k / 32 * bits * kQuadBytes;
    const int quad = int(k % 32 / kQuad);
    const int64_t in_plane = r * kQuad + k % kQuad;
    low = bits == 3 ? 2 : bits;
    const int quads = 8 / low;  // in a byte
    upper = chunk + in_plane;
    upper_shift = quad;
    byte = chunk + (bits == 3 ? kQuadBytes : 0) + quad / quads * kQuadBytes + in_plane;
    shift = quad % quads * low;
  }
};

int code_at(const uint8_t* row, int bits, int64_t k) {
  const int64_t bit = k * bits;
  int value = row[bit / 8] >> (bit % 8);
  if (bit % 8 + bits > 8) value |= row[bit / 8 + 1] << (8 - bit % 8);
  return value & ((1 << bits) - 1);
}

}  // namespace

void scalar_pack(const TiledWeight& weight, const uint8_t* qweight, uint8_t* packed,
                 int num_threads) {
  const int bits = weight.bits();
  const int64_t K = weight.K(), row_bytes = K * bits / 8;
  std::memset(packed, 0, size_t(weight.packed_bytes()));
  parallel_rows(weight.N(), kTileRows, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      uint8_t* unit = packed + n / kTileRows * weight.streams()[0].unit_bytes;
      for (int64_t k = 0; k < K; ++k) {
        const int code = code_at(qweight + n * row_bytes, bits, k);
        const Place place(bits, n % kTileRows, k);
        unit[place.byte] |= uint8_t((code & ((1 << place.low) - 1)) << place.shift);
        if (bits == 3) unit[place.upper] |= uint8_t((code >> 2) << place.upper_shift);
      }
    }
  });
}

void scalar_unpack(const TiledWeight& weight, const uint8_t* packed, uint8_t* qweight,
                   int num_threads) {
  const int bits = weight.bits();
  const int64_t K = weight.K(), row_bytes = K * bits / 8;
  std::memset(qweight, 0, size_t(weight.N() * row_bytes));
  parallel_rows(weight.N(), kTileRows, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const uint8_t* unit = packed + n / kTileRows * weight.streams()[0].unit_bytes;
      uint8_t* row = qweight + n * row_bytes;
      for (int64_t k = 0; k < K; ++k) {
        const Place place(bits, n % kTileRows, k);
        int code = (unit[place.byte] >> place.shift) & ((1 << place.low) - 1);
        if (bits == 3) code |= ((unit[place.upper] >> place.upper_shift) & 1) << 2;
        const int64_t bit = k * bits;
        row[bit / 8] = uint8_t(row[bit / 8] | code << (bit % 8));
        if (bit % 8 + bits > 8) {
          row[bit / 8 + 1] = uint8_t(row[bit / 8 + 1] | code >> (8 - bit % 8));
        }
      }
    }
  });
}

}  // namespace aqlm::cpu
