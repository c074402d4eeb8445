// E8P: the codebooks from their closed form, and published words <-> the layout of e8p-inl.h.
//
// The source set: 256 vectors of 8 half-integers 1/2 + d, d in {0, 1, 2}: in lexicographic order
// all of squared norm at most 10 (227), then 29 of norm 12. Code: index byte, sign byte; the signs'
// parity p flips sign bit 0 and chooses the shift (+1/4, or -1/4 for p = 1); vectors whose sum is
// odd count element 7 as negative. Sign bit t belongs to element kElement[t].
#include <array>
#include <cstring>
#include <vector>

#include "../common/check.h"
#include "threads.h"
#include "tiled.h"

namespace aqlm::cpu {
namespace {

using Vector = std::array<int, 8>;

constexpr int kElement[8] = {0, 2, 4, 6, 1, 3, 5, 7};

constexpr const char* kNorm12 =  // twice the values
    "31113333" "13113333" "11313333" "11133333" "33313311" "33313131" "33311331" "33313113"
    "33311313" "33311133" "33133311" "33133131" "33131331" "33133113" "33131313" "33131133"
    "31333311" "31333131" "31331331" "31333113" "31331313" "13331133" "13333311" "13333131"
    "13331331" "13333113" "13331313" "11331333" "33113331";

// Calls body(digits) for every vector of 8 digits below `base`, in lexicographic order.
template <class Body>
void each_vector(int base, const Body& body) {
  int count = 1;
  for (int j = 0; j < 8; ++j) count *= base;
  for (int n = 0; n < count; ++n) {
    Vector digits;
    for (int j = 7, rest = n; j >= 0; --j, rest /= base) digits[size_t(j)] = rest % base;
    body(digits);
  }
}

std::vector<Vector> source_set() {  // d of every element
  std::vector<Vector> set;
  each_vector(3, [&](const Vector& d) {
    int norm4 = 0;
    for (int digit : d) norm4 += (2 * digit + 1) * (2 * digit + 1);
    if (norm4 <= 40) set.push_back(d);
  });
  for (const char* text = kNorm12; *text != 0; text += 8) {
    Vector d;
    for (size_t j = 0; j < 8; ++j) d[j] = (text[j] - '1') / 2;
    set.push_back(d);
  }
  return set;
}

std::vector<Vector> residual_set() {  // twice the values
  std::vector<Vector> set;
  each_vector(3, [&](const Vector& digits) {
    Vector twice;
    int length = 0;
    for (size_t j = 0; j < 8; ++j) {
      twice[j] = 2 * (digits[j] - 1);
      length += digits[j] != 1;
    }
    if (length == 0 || length == 2) set.push_back(twice);
  });
  each_vector(2, [&](const Vector& digits) {
    Vector twice;
    int plus = 0;
    for (size_t j = 0; j < 8; ++j) {
      twice[j] = 2 * digits[j] - 1;
      plus += digits[j];
    }
    if (plus % 2 == 0) set.push_back(twice);
  });
  for (int n = 0; n < 15; ++n) {
    Vector twice = {};
    twice[size_t(n % 8)] = n < 8 ? 4 : -4;
    set.push_back(twice);
  }
  return set;
}

E8PTables make_tables() {
  E8PTables tables = {};
  const std::vector<Vector> source = source_set(), residual = residual_set();
  for (size_t i = 0; i < 256; ++i) {
    for (size_t j = 0; j < 8; ++j) {
      tables.magnitudes[j / 4 * 256 + i] |= uint8_t(source[i][j] << j % 4 * 2);
      tables.residual[j / 2 * 256 + i] |= uint8_t((residual[i][j] + 4) << j % 2 * 4);
    }
  }
  for (int nibble = 0; nibble < 16; ++nibble) {
    tables.lower[nibble] = uint8_t(2 + 4 * (nibble & 3));
    tables.upper[nibble] = uint8_t(2 + 4 * (nibble >> 2));
  }
  return tables;
}

// Whether the vector of index i has an odd sum: 4 + the sum of d.
bool odd_sum(int index) {
  const E8PTables& tables = e8p_tables();
  return __builtin_parity((tables.magnitudes[index] ^ tables.magnitudes[256 + index]) & 0x55) != 0;
}

// The stored sign byte of a code's: bits in element order, bit 0 the shift flag.
uint8_t stored_signs(int index, int signs) {
  int stored = __builtin_parity(unsigned(signs));
  for (int t = 0; t < 8; ++t) {
    if (kElement[t] != 0) stored |= (signs >> t & 1) << kElement[t];
  }
  return uint8_t(stored ^ (odd_sum(index) ? 0x80 : 0));
}

int published_signs(int index, int stored) {
  const int flag = stored & 1;
  stored ^= odd_sum(index) ? 0x80 : 0;
  int signs = 0;
  for (int t = 0; t < 8; ++t) {
    if (kElement[t] != 0) signs |= (stored >> kElement[t] & 1) << t;
  }
  return signs | (__builtin_parity(unsigned(signs)) ^ flag);  // bit 0 makes the parity p
}

// Stored position of a row of its unit (e8p-inl.h).
int64_t position_of(int64_t row) {
  return row % 16 / 4 * 16 + row / 16 * 4 + row % 4;
}

// Index byte of the code in (row n, group g); its sign byte is kTileRows further.
int64_t code_offset(const TileStream& stream, int64_t n, int64_t g) {
  return stream.offset + n / kTileRows * stream.unit_bytes + g * 2 * kTileRows +
         position_of(n % kTileRows);
}

int64_t residual_offset(const TileStream& stream, int64_t n, int64_t g) {
  return stream.offset + n / kTileRows * stream.unit_bytes + g * kTileRows +
         position_of(n % kTileRows);
}

// Calls body(word, i, n, g) for code i of every published word of rows [begin, end).
template <class Body>
void each_code(int64_t K, int64_t begin, int64_t end, const Body& body) {
  for (int64_t it = begin / 16; it < end / 16; ++it) {
    for (int64_t ik = 0; ik < K / 64; ++ik) {
      for (int64_t r = 0; r < 8; ++r) {
        for (int64_t c = 0; c < 4; ++c) {
          const int64_t word = ((it * (K / 64) + ik) * 8 + r) * 4 + c;
          for (int i = 0; i < 4; ++i) {
            body(word, i, it * 16 + 2 * r + (i & 1), ik * 8 + 2 * c + (i >> 1));
          }
        }
      }
    }
  }
}

void pack_words(const TileStream& stream, int64_t K, int64_t begin, int64_t end,
                const int64_t* words, uint8_t* packed) {
  each_code(K, begin, end, [&](int64_t word, int i, int64_t n, int64_t g) {
    const auto bits = uint64_t(words[word]);
    const int index = int(bits >> 8 * i & 255);
    int signs = 0;
    for (int j = 0; j < 8; ++j) signs |= int(bits >> (32 + 4 * j + i) & 1) << j;
    uint8_t* code = packed + code_offset(stream, n, g);
    code[0] = uint8_t(index);
    code[kTileRows] = stored_signs(index, signs);
  });
}

void unpack_words(const TileStream& stream, int64_t K, int64_t begin, int64_t end,
                  const uint8_t* packed, int64_t* words) {
  each_code(K, begin, end, [&](int64_t word, int i, int64_t n, int64_t g) {
    const uint8_t* code = packed + code_offset(stream, n, g);
    const int signs = published_signs(code[0], code[kTileRows]);
    auto bits = i == 0 ? uint64_t(0) : uint64_t(words[word]);
    bits |= uint64_t(code[0]) << 8 * i;
    for (int j = 0; j < 8; ++j) bits |= uint64_t(signs >> j & 1) << (32 + 4 * j + i);
    words[word] = int64_t(bits);
  });
}

}  // namespace

const E8PTables& e8p_tables() {
  static const E8PTables tables = make_tables();
  return tables;
}

void e8p_pack(const TiledWeight& weight, const int64_t* words, const void* rest, uint8_t* packed,
              int num_threads) {
  AQLM_CHECK(weight.bits() == 2 || rest != nullptr, "bits=", weight.bits(),
             " needs residual codes");
  std::memset(packed, 0, size_t(weight.packed_bytes()));
  const int64_t K = weight.K();
  parallel_rows(weight.N(), kTileRows, num_threads, [&](int64_t begin, int64_t end) {
    pack_words(weight.streams()[0], K, begin, end, words, packed);
    if (weight.bits() == 4) {
      pack_words(weight.streams()[1], K, begin, end, static_cast<const int64_t*>(rest), packed);
    }
    if (weight.bits() != 3) return;
    const auto* bytes = static_cast<const uint8_t*>(rest);
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t g = 0; g < K / 8; ++g) {
        packed[residual_offset(weight.streams()[1], n, g)] = bytes[n * (K / 8) + g];
      }
    }
  });
}

void e8p_unpack(const TiledWeight& weight, const uint8_t* packed, int64_t* words, void* rest,
                int num_threads) {
  AQLM_CHECK(weight.bits() == 2 || rest != nullptr, "bits=", weight.bits(),
             " needs residual codes");
  const int64_t K = weight.K();
  parallel_rows(weight.N(), kTileRows, num_threads, [&](int64_t begin, int64_t end) {
    unpack_words(weight.streams()[0], K, begin, end, packed, words);
    if (weight.bits() == 4) {
      unpack_words(weight.streams()[1], K, begin, end, packed, static_cast<int64_t*>(rest));
    }
    if (weight.bits() != 3) return;
    auto* bytes = static_cast<uint8_t*>(rest);
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t g = 0; g < K / 8; ++g) {
        bytes[n * (K / 8) + g] = packed[residual_offset(weight.streams()[1], n, g)];
      }
    }
  });
}

}  // namespace aqlm::cpu
