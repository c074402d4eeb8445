// The E8P codebooks as words of 8 nibbles, generated at compile time (QuIP#, arXiv 2402.04396).
//
// Four times a weight is an odd integer in -11..11, so v = (4w - 1) / 2 is a 4-bit integer and
//   v = (2u) ^ (0xE if negative) ^ (1 if the code's parity is even),  u = |s| - 1/2 in {0, 1, 2}
// per nibble: a code is the XOR of a word chosen by its high byte and one chosen by its low byte.
//
//   byte j of a word: high nibble = element j as two's complement, low nibble = element 4 + j
//   plus 8; masking with 0xF0.. and 0x0F.. gives int8 MMA operands without a shift.
#pragma once

#include <cstdint>

namespace aqlm {

struct E8pTables {
  uint32_t magnitude[256];  // by the high byte of a code
  uint32_t sign[256];       // by the low byte
  uint32_t residual[256];   // by a residual byte (3 bit): v = twice the weight
};

namespace e8p_detail {

// Bit of nibble 0 of element e in a word.
constexpr int nibble_shift(int e) { return e < 4 ? 8 * e + 4 : 8 * (e - 4); }
constexpr uint32_t kExcess = 0x08080808u;  // low nibbles are stored plus 8

// Vectors of eight digits in lexicographic order, from all zeros on; false after the last.
struct Digits {
  int d[8] = {};
  constexpr bool next(int base) {
    for (int i = 7; i >= 0; --i) {
      if (++d[i] < base) return true;
      d[i] = 0;
    }
    return false;
  }
};

constexpr uint32_t magnitude_word(const int (&u)[8]) {
  int sum = 0;  // twice the coordinate sum
  for (int e = 0; e < 8; ++e) sum += 2 * u[e] + 1;
  uint32_t word = 0;
  for (int e = 0; e < 8; ++e) {
    const bool negative = e == 7 && sum / 2 % 2 == 1;
    word |= static_cast<uint32_t>((2 * u[e]) ^ (negative ? 0xE : 0)) << nibble_shift(e);
  }
  return word ^ kExcess;
}

constexpr uint32_t sign_word(int code) {
  int parity = 0;
  for (int t = 0; t < 8; ++t) parity ^= code >> t & 1;
  uint32_t word = 0;
  for (int t = 0; t < 8; ++t) {
    const int element = t < 4 ? 2 * t : 2 * t - 7;  // 0, 2, 4, 6, 1, 3, 5, 7
    const bool negative = ((code ^ parity) >> t & 1) != 0;
    word |= static_cast<uint32_t>((negative ? 0xE : 0) ^ (parity == 0 ? 1 : 0))
            << nibble_shift(element);
  }
  return word;
}

// The 29 rows of squared norm 12: digits are 2u + 1.
constexpr int kNorm12[29] = {
    31113333, 13113333, 11313333, 11133333, 33313311, 33313131, 33311331, 33313113,
    33311313, 33311133, 33133311, 33133131, 33131331, 33133113, 33131313, 33131133,
    31333311, 31333131, 31331331, 31333113, 31331313, 13331133, 13333311, 13333131,
    13331331, 13333113, 13331313, 11331333, 33113331};

constexpr E8pTables make_tables() {
  E8pTables t = {};
  Digits v;
  int rows = 0;
  do {  // entries 1/2, 3/2, 5/2 with squared norm at most 10
    int norm = 0;
    for (int e = 0; e < 8; ++e) norm += (2 * v.d[e] + 1) * (2 * v.d[e] + 1);
    if (norm <= 40) t.magnitude[rows++] = magnitude_word(v.d);
  } while (v.next(3));
  for (int i = 0; i < 29; ++i) {
    int u[8] = {}, digits = kNorm12[i];
    for (int e = 7; e >= 0; --e, digits /= 10) u[e] = digits % 10 / 2;
    t.magnitude[rows++] = magnitude_word(u);
  }
  for (int i = 0; i < 256; ++i) t.sign[i] = sign_word(i);

  auto residual = [&t](int row, const int(&twice)[8]) {
    uint32_t word = 0;
    for (int e = 0; e < 8; ++e) word |= static_cast<uint32_t>(twice[e] & 15) << nibble_shift(e);
    t.residual[row] = word ^ kExcess;
  };
  int row = 0;
  Digits r;
  do {  // entries -1, 0, 1 with absolute sum 0 or 2
    int twice[8] = {}, sum = 0;
    for (int e = 0; e < 8; ++e) {
      twice[e] = 2 * (r.d[e] - 1);
      sum += r.d[e] == 1 ? 0 : 1;
    }
    if (sum == 0 || sum == 2) residual(row++, twice);
  } while (r.next(3));
  for (int bits = 0; bits < 256; ++bits) {  // entries -1/2, 1/2 with an even sum
    int twice[8] = {}, sum = 0;
    for (int e = 0; e < 8; ++e) sum += twice[e] = (bits >> (7 - e) & 1) ? 1 : -1;
    if (sum % 4 == 0) residual(row++, twice);
  }
  for (int i = 0; i < 15; ++i) {  // +2 and -2 times a unit vector
    int twice[8] = {};
    twice[i % 8] = i < 8 ? 4 : -4;
    residual(row++, twice);
  }
  return t;
}

}  // namespace e8p_detail

}  // namespace aqlm
