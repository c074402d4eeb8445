// Canonical codes [O][I][B] <-> the packed layout of packed.h. Runs once a layer, at load.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/check.h"
#include "additive.h"
#include "threads.h"

namespace aqlm::cpu {
namespace {

constexpr int64_t kTile = 64;  // lookups: 64 rows x 64 lookups of both layouts fit L1

// Position of the packed code of (row, lookup), in codes.
struct Place {
  int64_t base, stride;

  Place(const PackedShape& shape, int64_t row) {
    if (shape.wide()) {
      base = row / kWideRows * (shape.wide_block_bytes() / 2) + row % kWideRows;
      stride = kWideRows;
    } else {
      base = shape.unit_offset(row / kUnitRows) + row % kUnitRows;
      stride = shape.block_width(row / kUnitRows);
    }
  }
  int64_t operator[](int64_t t) const { return base + t * stride; }
};

// Packs rows [r0, r1); returns the flat index of the first code out of range, or -1.
template <class Stored, class Packed>
int64_t pack_rows(const PackedShape& shape, const Stored* codes, int64_t r0, int64_t r1,
                  Packed* packed) {
  const int64_t lookups = shape.lookups(), half = int64_t(1) << (shape.nbits - 1);
  const uint32_t mask = uint32_t(2 * half - 1);
  int64_t bad = -1;
  for (int64_t t0 = 0; t0 < lookups; t0 += kTile) {
    const int64_t t1 = t0 + kTile < lookups ? t0 + kTile : lookups;
    for (int64_t row = r0; row < r1; ++row) {
      const Place place(shape, row);
      for (int64_t t = t0; t < t1; ++t) {
        const int64_t flat = row * lookups + t, value = codes[flat];
        if ((value < -half || value >= half) && (bad < 0 || flat < bad)) bad = flat;
        packed[place[t]] = Packed(uint32_t(value) & mask);
      }
    }
  }
  return bad;
}

template <class Stored, class Packed>
void unpack_rows(const PackedShape& shape, const Packed* packed, int64_t r0, int64_t r1,
                 Stored* codes) {
  const int64_t lookups = shape.lookups(), half = int64_t(1) << (shape.nbits - 1);
  for (int64_t t0 = 0; t0 < lookups; t0 += kTile) {
    const int64_t t1 = t0 + kTile < lookups ? t0 + kTile : lookups;
    for (int64_t row = r0; row < r1; ++row) {
      const Place place(shape, row);
      for (int64_t t = t0; t < t1; ++t) {
        const int64_t value = packed[place[t]];
        codes[row * lookups + t] = Stored(value < half ? value : value - 2 * half);
      }
    }
  }
}

void check_shape(const PackedShape& shape, int code_bytes) {
  AQLM_CHECK(shape.nbits >= 1 && shape.nbits <= 16, "nbits=", shape.nbits, " is not in 1..16");
  AQLM_CHECK(shape.num_codebooks >= 1, "num_codebooks=", shape.num_codebooks, " is not positive");
  AQLM_CHECK(shape.out_groups >= 0 && shape.in_groups >= 0, "out_groups=", shape.out_groups,
             ", in_groups=", shape.in_groups, " must not be negative");
  AQLM_CHECK(code_bytes == 1 || code_bytes == 2 || code_bytes == 4, "code_bytes=", code_bytes,
             " is not 1, 2 or 4");
  AQLM_CHECK(shape.nbits <= 8 * code_bytes, "code_bytes=", code_bytes,
             " cannot hold nbits=", shape.nbits);
}

// Calls body with typed null pointers for the stored and the packed code.
template <class Body>
void with_code_types(int code_bytes, bool wide, const Body& body) {
  const auto with_packed = [&](auto* stored) {
    if (wide) body(stored, static_cast<uint16_t*>(nullptr));
    else body(stored, static_cast<uint8_t*>(nullptr));
  };
  if (code_bytes == 1) with_packed(static_cast<int8_t*>(nullptr));
  else if (code_bytes == 2) with_packed(static_cast<int16_t*>(nullptr));
  else with_packed(static_cast<int32_t*>(nullptr));
}

int64_t code_at(const void* codes, int code_bytes, int64_t flat) {
  if (code_bytes == 1) return static_cast<const int8_t*>(codes)[flat];
  if (code_bytes == 2) return static_cast<const int16_t*>(codes)[flat];
  return static_cast<const int32_t*>(codes)[flat];
}

}  // namespace

void additive_pack(const PackedShape& shape, const void* codes, int code_bytes, uint8_t* packed,
                   int num_threads) {
  check_shape(shape, code_bytes);
  std::memset(packed, 0, size_t(shape.nbytes()));
  int64_t first_bad = -1;
  with_code_types(code_bytes, shape.wide(), [&](auto* stored, auto* target) {
    using Packed = std::remove_pointer_t<decltype(target)>;
    parallel_rows(shape.out_groups, kUnitRows, num_threads, [&](int64_t r0, int64_t r1) {
      const int64_t bad =
          pack_rows(shape, static_cast<const std::remove_pointer_t<decltype(stored)>*>(codes), r0,
                    r1, reinterpret_cast<Packed*>(packed));
#pragma omp critical(aqlm_pack)
      if (bad >= 0 && (first_bad < 0 || bad < first_bad)) first_bad = bad;
    });
  });
  if (first_bad < 0) return;
  const int64_t k = first_bad % shape.num_codebooks, group = first_bad / shape.num_codebooks;
  const int64_t half = int64_t(1) << (shape.nbits - 1);
  AQLM_CHECK(false, "codes[", group / shape.in_groups, ", ", group % shape.in_groups, ", ", k,
             "]=", code_at(codes, code_bytes, first_bad), " is not a ", shape.nbits,
             "-bit code (stored values are ", -half, "..", half - 1, ")");
}

void additive_unpack(const PackedShape& shape, const uint8_t* packed, void* codes, int code_bytes,
                     int num_threads) {
  check_shape(shape, code_bytes);
  with_code_types(code_bytes, shape.wide(), [&](auto* stored, auto* source) {
    parallel_rows(shape.out_groups, kUnitRows, num_threads, [&](int64_t r0, int64_t r1) {
      unpack_rows(shape, reinterpret_cast<const std::remove_pointer_t<decltype(source)>*>(packed),
                  r0, r1, static_cast<decltype(stored)>(codes));
    });
  });
}

}  // namespace aqlm::cpu
