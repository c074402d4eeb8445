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

E8PHalves make_halves() {
  E8PHalves halves = {};
  const std::vector<Vector> source = source_set();
  std::array<uint8_t, 81> number;  // by the digits of base 3
  number.fill(255);
  int count = 0;
  for (int i = 0; i < 256; ++i) {
    uint8_t half[2];
    for (size_t h = 0; h < 2; ++h) {
      int digits = 0, sum = 0;
      for (size_t j = 0; j < 4; ++j) {
        digits = 3 * digits + source[size_t(i)][4 * h + j];
        sum += source[size_t(i)][4 * h + j];
      }
      uint8_t& place = number[size_t(digits)];
      if (place == 255) {
        place = uint8_t(count++);
        halves.odd[place] = sum % 2 != 0;
      }
      half[h] = place;
    }
    halves.front[i] = half[0];
    halves.back[i] = half[1];
    halves.index[half[0]][half[1]] = uint8_t(i);
  }
  return halves;
}

// What elements e and e + 2 of a half are XORed with as nibbles: bits 0..2 of `signs` are those of
// its elements 0..2 (as in a byte of signs), `odd` the parity of all four; 1 everywhere for a shift.
uint8_t flips(int signs, int odd, int shift, int e) {
  signs &= 7;
  signs |= ((odd ^ __builtin_parity(unsigned(signs))) & 1) << 3;
  return uint8_t((signs >> e & 1 ? 0x0e : 0) ^ (signs >> (e + 2) & 1 ? 0xe0 : 0) ^
                 (shift & 1 ? 0x11 : 0));
}

E8PTables make_tables() {
  E8PTables tables = {};
  const E8PHalves& halves = e8p_halves();
  const std::vector<Vector> source = source_set(), residual = residual_set();
  for (size_t i = 0; i < 256; ++i) {
    // Every half is the front of an index: of the one whose back is all 1/2.
    const int half = halves.front[i];
    for (int j = 0; j < 4; ++j) {
      int nibble = 9 + 2 * source[i][size_t(j)];
      if (j == 0 && halves.odd[half]) nibble ^= 14;
      uint8_t& entry = tables.nibbles[j % 2][half];
      entry = uint8_t(j < 2 ? (entry & 0xf0) | nibble : (entry & 15) | nibble << 4);
    }
    for (size_t j = 0; j < 8; ++j) {
      tables.residual[j / 2 * 256 + i] |= uint8_t((residual[i][j] + 4) << j % 2 * 4);
    }
  }
  for (int i = 0; i < 64; ++i) {
    for (int e = 0; e < 2; ++e) {
      tables.nibbles[e][i] = tables.nibbles[e][i % 32];
      tables.front[e][i] = flips(i, i >> 3, i >> 4, e);
      tables.back[e][i] = flips(i >> 2, i, i >> 1, e);
      tables.back_odd[e][i] = flips(i % 16 >> 1, 1, i, e);
    }
  }
  return tables;
}

// What the stored signs of an index have flipped: odd halves their first element, an odd vector
// also element 7. An even number, so that their parity is the published one.
int flipped_signs(int index) {
  const E8PHalves& halves = e8p_halves();
  const int front = halves.odd[halves.front[index]], back = halves.odd[halves.back[index]];
  return front | back << 4 | (front ^ back) << 7;
}

// Byte of signs (e8p-inl.h): the parity of the published bits is the shift and flips element 0, so
// that an even number of elements is negative and both halves have the same parity.
uint8_t stored_signs(int index, int signs) {
  int negative = flipped_signs(index);
  for (int t = 0; t < 8; ++t) negative ^= (signs >> t & 1) << kElement[t];
  const int shift = __builtin_parity(unsigned(negative));
  negative ^= shift;
  const int odd = __builtin_parity(unsigned(negative & 15));
  return uint8_t((negative & 7) | odd << 3 | shift << 4 | (negative >> 4 & 7) << 5);
}

int published_signs(int index, int stored) {
  const int front = stored & 7, back = stored >> 5, odd = stored >> 3 & 1, shift = stored >> 4 & 1;
  int negative = front | (odd ^ __builtin_parity(unsigned(front))) << 3;
  negative |= back << 4 | (odd ^ __builtin_parity(unsigned(back))) << 7;
  negative ^= shift ^ flipped_signs(index);
  int signs = 0;
  for (int t = 0; t < 8; ++t) signs |= (negative >> kElement[t] & 1) << t;
  return signs;
}

// Where a code lies: byte of its row and group in a block of 32 columns (e8p-inl.h).
struct Place {
  int64_t block, byte;

  Place(const TileStream& stream, int64_t n, int64_t g, int64_t block_bytes)
      : block(stream.offset + n / kTileRows * stream.unit_bytes + g / 4 * block_bytes),
        byte(n % kTileRows * 4 + g % 4) {}
};

constexpr int64_t kBlockBytes = 576, kSigns = 256, kUpper = 512;

void store_code(const TileStream& stream, int64_t n, int64_t g, int index, int signs,
                uint8_t* packed) {
  const Place place(stream, n, g, kBlockBytes);
  const int front = e8p_halves().front[index], back = e8p_halves().back[index];
  uint8_t* const block = packed + place.block;
  block[place.byte] = uint8_t((front & 15) | (back & 15) << 4);
  block[kSigns + place.byte] = stored_signs(index, signs);
  block[kUpper + place.byte % 64] |=
      uint8_t((front >> 4 | back >> 4 << 1) << place.byte / 64 * 2);
}

void load_code(const TileStream& stream, int64_t n, int64_t g, const uint8_t* packed, int* index,
               int* signs) {
  const Place place(stream, n, g, kBlockBytes);
  const uint8_t* const block = packed + place.block;
  const int upper = block[kUpper + place.byte % 64] >> place.byte / 64 * 2;
  const int lower = block[place.byte];
  *index = e8p_halves().index[(lower & 15) | (upper & 1) << 4][lower >> 4 | (upper >> 1 & 1) << 4];
  *signs = published_signs(*index, block[kSigns + place.byte]);
}

int64_t residual_offset(const TileStream& stream, int64_t n, int64_t g) {
  const Place place(stream, n, g, kQuadBytes);
  return place.block + place.byte;
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
    int signs = 0;
    for (int j = 0; j < 8; ++j) signs |= int(bits >> (32 + 4 * j + i) & 1) << j;
    store_code(stream, n, g, int(bits >> 8 * i & 255), signs, packed);
  });
}

void unpack_words(const TileStream& stream, int64_t K, int64_t begin, int64_t end,
                  const uint8_t* packed, int64_t* words) {
  each_code(K, begin, end, [&](int64_t word, int i, int64_t n, int64_t g) {
    int index, signs;
    load_code(stream, n, g, packed, &index, &signs);
    auto bits = i == 0 ? uint64_t(0) : uint64_t(words[word]);
    bits |= uint64_t(index) << 8 * i;
    for (int j = 0; j < 8; ++j) bits |= uint64_t(signs >> j & 1) << (32 + 4 * j + i);
    words[word] = int64_t(bits);
  });
}

}  // namespace

const E8PHalves& e8p_halves() {
  static const E8PHalves halves = make_halves();
  return halves;
}

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
