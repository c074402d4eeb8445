// cpu.e8p: E8P codes to tiles, u = 2 w + 7.5 in 2..13, and one token against codes without tiles.
//
//   codes   unit of 64 rows, block of 32 columns: [256 lower bytes][256 sign bytes][64 upper bytes]
//   column  four groups of 8 columns make a block: quad j holds element j of all four, so that the
//           bytes of a code vector (4 r + group) are those of a quad and nothing is unpacked
//   half    elements 0..3 or 4..7 of a code, one of 32: four bits in the lower byte, the fifth of
//           code byte i at bits 2 (i / 64) and 2 (i / 64) + 1 of upper byte i % 64
//   signs   0..2: elements 0..2 are negative; 3: an odd number of 0..3; 4: the shift; 5..7:
//           elements 4..6. Elements 4..7 have the parity of 0..3 (e8p.cpp), so that bits 0..4 say
//           all of the front and bits 3..7 all of the back
//
// A nibble is 9 + 2 d for a magnitude 1/2 + d, XOR 14 if negative, XOR 1 for the shift of -1/4. So
// two look-ups give two elements of a half each: by the half, and by its bits of the sign byte.
// Shuffles of 16 entries see four of these bits and the fifth is one more XOR.

namespace aqlm::cpu {
namespace {

constexpr int64_t kE8PBlockBytes = 576, kE8PSigns = 256, kE8PUpper = 512;

#if AQLM_LEVEL >= 1

// Elements 0..3 or 4..7 of the codes of a vector.
struct E8PElements {
  CodeVector first, second, third, fourth;
};

// The tables of half BACK in registers, where g++ 12 keeps them if nothing captures them by
// reference and no loop index chooses among them.
template <int BACK>
struct E8PDecoder {
  static CodeVector bytes(int value) { return AQLM_V(set1_epi8)(char(value)); }

#if AQLM_LEVEL >= 3
  // 64 entries a look-up: tables are repeated, so that bits above an index need no mask.
  CodeVector nibbles[2], signs[2];

  explicit E8PDecoder(const E8PTables& tables)
      : nibbles{read<CodeVector>(tables.nibbles[0]), read<CodeVector>(tables.nibbles[1])},
        signs{read<CodeVector>((BACK ? tables.back : tables.front)[0]),
              read<CodeVector>((BACK ? tables.back : tables.front)[1])} {}

  template <int BIT>
  static CodeVector index(CodeVector lower, CodeVector upper) {
    return _mm512_ternarylogic_epi32(shifted<4 - BIT - BACK>(upper), bytes(15),
                                     shifted<-4 * BACK>(lower), 0xb8);
  }
  static CodeVector sign(CodeVector stored) { return shifted<-3 * BACK>(stored); }

  // Elements E and E + 2 as nibbles: what `value` and `flip` XOR to.
  template <int E, int BIT>
  void pair(CodeVector index, CodeVector, CodeVector sign, CodeVector, CodeVector& value,
            CodeVector& flip) const {
    value = _mm512_permutexvar_epi8(index, nibbles[E]);
    flip = _mm512_permutexvar_epi8(sign, signs[E]);
  }
  // (a ^ b) & mask
  static CodeVector masked(CodeVector a, CodeVector b, CodeVector mask) {
    return _mm512_ternarylogic_epi32(a, b, mask, 0x28);
  }
#else
  CodeVector nibbles[2][2], signs[2], fifth;

  explicit E8PDecoder(const E8PTables& tables)
      : nibbles{{repeat16(tables.nibbles[0]), repeat16(tables.nibbles[0] + 16)},
                {repeat16(tables.nibbles[1]), repeat16(tables.nibbles[1] + 16)}},
        // As if there were a shift; as if the halves were odd.
        signs{repeat16(BACK ? tables.back_odd[0] : tables.front[0] + 16),
              repeat16(BACK ? tables.back_odd[1] : tables.front[1] + 16)},
        fifth(bytes(BACK ? 0xe0 : 0x11)) {}

  template <int BIT>
  static CodeVector index(CodeVector lower, CodeVector) {
    return bit_and(shifted<-4 * BACK>(lower), bytes(15));
  }
  static CodeVector sign(CodeVector stored) {
    return bit_and(shifted<-4 * BACK>(stored), bytes(15));
  }

  template <int E, int BIT>
  void pair(CodeVector index, CodeVector upper, CodeVector sign, CodeVector stored,
            CodeVector& value, CodeVector& flip) const {
#if AQLM_LEVEL == 2
    value = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(nibbles[E][0], index),
                                     _mm512_test_epi8_mask(upper, bytes(1 << (BIT + BACK))),
                                     nibbles[E][1], index);
#else
    // In assembly: g++ 12 would compare the choice with zero first.
    asm("vpblendvb %3, %2, %1, %0"
        : "=x"(value)
        : "x"(_mm256_shuffle_epi8(nibbles[E][0], index)),
          "x"(_mm256_shuffle_epi8(nibbles[E][1], index)), "x"(shifted<7 - BIT - BACK>(upper)));
#endif
    flip = AQLM_V(shuffle_epi8)(signs[E], sign);
    // The fifth bit of the signs: a shuffle gives zero where bit 7 of its index is set. In the
    // back it is the parity, which element 7 makes up for.
    if constexpr (BACK == 0 || E == 1) {
      const CodeVector cross = AQLM_V(shuffle_epi8)(fifth, shifted<3 + BACK>(stored));
      value = bit_xor(value, cross, CodeVector{});
    }
  }
  static CodeVector masked(CodeVector a, CodeVector b, CodeVector mask) {
    return bit_and(bit_xor(a, b, CodeVector{}), mask);
  }
#endif

  // Of code vector PART of a block; with SCALED the third and the fourth come 16 times.
  template <int PART, bool SCALED>
  AQLM_INLINE E8PElements decode(const uint8_t* codes) const {
    constexpr int kOffset = PART * kCodeBytes, kBit = kOffset / 64 * 2;
    const auto lower = read<CodeVector>(codes + kOffset);
    const auto stored = read<CodeVector>(codes + kE8PSigns + kOffset);
    const auto upper = read<CodeVector>(codes + kE8PUpper + kOffset % 64);
    const CodeVector half = index<kBit>(lower, upper), signs = sign(stored), low = bytes(15);
    CodeVector values[2], flips[2];
    pair<0, kBit>(half, upper, signs, stored, values[0], flips[0]);
    pair<1, kBit>(half, upper, signs, stored, values[1], flips[1]);
    if constexpr (SCALED) {
      const CodeVector high = bytes(0xf0);
      return {masked(values[0], flips[0], low), masked(values[1], flips[1], low),
              masked(values[0], flips[0], high), masked(values[1], flips[1], high)};
    } else {
      const CodeVector even = bit_xor(values[0], flips[0], CodeVector{});
      const CodeVector odd = bit_xor(values[1], flips[1], CodeVector{});
      return {bit_and(even, low), bit_and(odd, low), bit_and(shifted<-4>(even), low),
              bit_and(shifted<-4>(odd), low)};
    }
  }
};

void decode_e8p(const E8PTables& tables, const uint8_t* codes, int64_t blocks, uint8_t* tile) {
  const auto store = [](const E8PElements& elements, uint8_t* out) {
    write(out, elements.first);
    write(out + kQuadBytes, elements.second);
    write(out + 2 * kQuadBytes, elements.third);
    write(out + 3 * kQuadBytes, elements.fourth);
  };
  for (int64_t b = 0; b < blocks; ++b, codes += kE8PBlockBytes, tile += 8 * kQuadBytes) {
    each_part<0>([&](auto part) {
      uint8_t* out = tile + part * kCodeBytes;
      store(E8PDecoder<0>(tables).template decode<part, false>(codes), out);
      store(E8PDecoder<1>(tables).template decode<part, false>(codes), out + 4 * kQuadBytes);
    });
  }
}

void decode_residual(const E8PTables& tables, const uint8_t* codes, int64_t blocks,
                     uint8_t* tile) {
  const CodeVector low = E8PDecoder<0>::bytes(15);
  const Shuffle<4, 8> pairs(tables.residual);
  for (int64_t b = 0; b < blocks; ++b, codes += kQuadBytes, tile += 8 * kQuadBytes) {
    for (int first = 0; first < kQuadBytes; first += kCodeBytes) {
      const ShuffleKey<8> key(codes + first);
      for (int p = 0; p < 4; ++p) {
        const CodeVector pair = pairs(p, key);
        uint8_t* out = tile + 2 * p * kQuadBytes + first;
        write(out, bit_and(pair, low));
        write(out + kQuadBytes, bit_and(shifted<-4>(pair), low));
      }
    }
  }
}

// The same block of the unit's next tile: units take turns, so that the hardware sees no stream.
// From memory, 4096 x 4096, AVX2: 0.82 ms, 1.17 without this, 0.79 one unit after the other.
AQLM_INLINE void prefetch_block(const uint8_t* codes, int64_t blocks) {
  AQLM_UNROLL
  for (int line = 0; line < kE8PBlockBytes; line += 64) {
    const uint8_t* at = codes + blocks * kE8PBlockBytes + line;
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
  }
}

// Adds the sums of a unit's rows to theirs: `spill` without scales of rows.
struct E8PSpill {
  F<kLanes> zero, factor;
  float* acc;

  E8PSpill(const ProductArgs& args, int64_t unit)
      : zero(F<kLanes>() + args.zero * args.x_sum[0]),
        factor(F<kLanes>() + args.scale * args.x_scale[0]),
        acc(args.acc + unit * kTileRows) {}
  AQLM_INLINE void operator()(int row, F<kLanes> sums) const {
    store<kLanes>(acc + row, F<kLanes>(load<kLanes>(acc + row) + (sums - zero) * factor));
  }
};

#if AQLM_LEVEL >= 3

// Four quads of x in registers: two code vectors share them, since loads would bound the product.
template <int PLANES>
struct E8PInput {
  __m512i quads[4][PLANES];

  explicit E8PInput(const uint8_t* x) {
    load<0>(x);
    load<1>(x);
    load<2>(x);
    load<3>(x);
  }
  template <int QUAD>
  AQLM_INLINE void load(const uint8_t* x) {
    quads[QUAD][0] = _mm512_set1_epi32(read<int32_t>(x + QUAD * kQuantBytes));
    if constexpr (PLANES == 2)
      quads[QUAD][1] = _mm512_set1_epi32(read<int32_t>(x + QUAD * kQuantBytes + 4));
  }
};

// Sums of a plane: of elements 0, 1, 4 and 5, and of the others, 16 times.
template <int PLANES>
struct E8PSums {
  __m512i plain[PLANES] = {}, scaled[PLANES] = {};

  AQLM_INLINE void add(const E8PElements& elements, const E8PInput<PLANES>& x) {
    dot_bytes(plain[0], elements.first, x.quads[0][0]);
    dot_bytes(scaled[0], elements.third, x.quads[2][0]);
    if constexpr (PLANES == 2) {
      dot_bytes(plain[1], elements.first, x.quads[0][1]);
      dot_bytes(scaled[1], elements.third, x.quads[2][1]);
    }
    dot_bytes(plain[0], elements.second, x.quads[1][0]);
    dot_bytes(scaled[0], elements.fourth, x.quads[3][0]);
    if constexpr (PLANES == 2) {
      dot_bytes(plain[1], elements.second, x.quads[1][1]);
      dot_bytes(scaled[1], elements.fourth, x.quads[3][1]);
    }
  }
  F<16> total() const {
    typedef Vec<16>::I I;
    I low = bit_cast<I>(plain[0]), high = bit_cast<I>(scaled[0]);
    if constexpr (PLANES == 2) {
      low = (low << 8) + bit_cast<I>(plain[1]);
      high = (high << 8) + bit_cast<I>(scaled[1]);
    }
    return __builtin_convertvector(low + (high >> 4), F<16>);
  }
};

// Code vectors PART and PART + 1, and those after them.
template <int PART, int PLANES>
AQLM_INLINE void product_parts(const E8PDecoder<0>& front, const E8PDecoder<1>& back,
                               const uint8_t* codes, int64_t blocks, const uint8_t* x,
                               const E8PSpill& spill) {
  E8PSums<PLANES> first, second;
  for (int64_t b = 0; b < blocks; ++b) {
    const uint8_t *at = codes + b * kE8PBlockBytes, *values = x + b * 8 * kQuantBytes;
    if constexpr (PART == 0) prefetch_block(at, blocks);
    const E8PInput<PLANES> left(values);
    first.add(front.template decode<PART, true>(at), left);
    second.add(front.template decode<PART + 1, true>(at), left);
    const E8PInput<PLANES> right(values + 4 * kQuantBytes);
    first.add(back.template decode<PART, true>(at), right);
    second.add(back.template decode<PART + 1, true>(at), right);
  }
  spill(PART * 16, first.total());
  spill(PART * 16 + 16, second.total());
  if constexpr (PART + 2 < kCodeParts) {
    product_parts<PART + 2, PLANES>(front, back, codes, blocks, x, spill);
  }
}

template <int PLANES>
void product_planes(const E8PTables& tables, const E8PUnits& units, int64_t blocks,
                    const ProductArgs& args) {
  const E8PDecoder<0> front(tables);
  const E8PDecoder<1> back(tables);
  for (int64_t u = 0; u < units.count; ++u) {
    product_parts<0, PLANES>(front, back, units.codes + u * units.bytes, blocks, args.x,
                             E8PSpill(args, u));
  }
}

#else

// Sums of 16 bits of a block's four elements and another's: 15 * 128 * 2 each at most.
template <int PLANES>
struct E8PSums {
  CodeVector planes[PLANES];

  template <bool FIRST, int PLANE>
  AQLM_INLINE void add(CodeVector element, const CodeVector* x) {
    const CodeVector product = AQLM_V(maddubs_epi16)(element, x[PLANE]);
    planes[PLANE] = FIRST ? product : AQLM_V(add_epi16)(planes[PLANE], product);
    asm("" : "+v"(planes[PLANE]));  // or g++ adds up pairs of products: AVX2 lacks the registers
  }
  template <bool FIRST, int PLANE>
  AQLM_INLINE void add(const E8PElements& elements, const CodeVector* x) {
    add<FIRST, PLANE>(elements.first, x);
    add<false, PLANE>(elements.second, x + PLANES);
    add<false, PLANE>(elements.third, x + 2 * PLANES);
    add<false, PLANE>(elements.fourth, x + 3 * PLANES);
  }
  template <bool FIRST>
  AQLM_INLINE void add(const E8PElements& elements, const CodeVector* x) {
    add<FIRST, 0>(elements, x);
    if constexpr (PLANES == 2) add<FIRST, 1>(elements, x);
  }
};

// Adds code vectors from PART on of a half of two blocks to `totals`.
template <int PART, int BACK, int PLANES>
AQLM_INLINE void half_products(const E8PDecoder<BACK>& decoder, const uint8_t* codes,
                               const CodeVector* x, CodeVector* totals) {
  E8PSums<PLANES> sums;
  sums.template add<true>(decoder.template decode<PART, false>(codes), x);
  sums.template add<false>(decoder.template decode<PART, false>(codes + kE8PBlockBytes),
                           x + 8 * PLANES);
  const CodeVector steps = AQLM_V(set1_epi16)(PLANES == 2 ? 256 : 1);
  CodeVector total = AQLM_V(add_epi32)(totals[PART], AQLM_V(madd_epi16)(sums.planes[0], steps));
  if constexpr (PLANES == 2) {
    const CodeVector low = AQLM_V(madd_epi16)(sums.planes[1], AQLM_V(set1_epi16)(1));
    total = AQLM_V(add_epi32)(total, low);
  }
  totals[PART] = total;
  if constexpr (PART + 1 < kCodeParts) {
    half_products<PART + 1, BACK, PLANES>(decoder, codes, x, totals);
  }
}

// A half at a time, so that its tables fit in AVX2's registers; blocks come in pairs.
template <int BACK, int PLANES>
void half_product(const E8PTables& tables, const uint8_t* codes, int64_t blocks,
                  const CodeVector* x, CodeVector* totals) {
  const E8PDecoder<BACK> decoder(tables);
  for (int64_t b = 0; b < blocks; b += 2) {
    if constexpr (BACK == 0) {
      prefetch_block(codes + b * kE8PBlockBytes, blocks);
      prefetch_block(codes + (b + 1) * kE8PBlockBytes, blocks);
    }
    half_products<0, BACK, PLANES>(decoder, codes + b * kE8PBlockBytes,
                                   x + (8 * b + 4 * BACK) * PLANES, totals);
  }
}

template <int PLANES>
void product_planes(const E8PTables& tables, const E8PUnits& units, int64_t blocks,
                    const ProductArgs& args) {
  alignas(64) CodeVector x[kTileQuads * PLANES];
  for (int64_t q = 0; q < 8 * blocks; ++q) {
    for (int p = 0; p < PLANES; ++p)
      x[PLANES * q + p] = AQLM_V(set1_epi32)(read<int32_t>(args.x + q * kQuantBytes + 4 * p));
  }
  for (int64_t u = 0; u < units.count; ++u) {
    alignas(64) CodeVector totals[kCodeParts] = {};
    const uint8_t* codes = units.codes + u * units.bytes;
    half_product<0, PLANES>(tables, codes, blocks, x, totals);
    half_product<1, PLANES>(tables, codes, blocks, x, totals);
    const E8PSpill spill(args, u);
    for (int part = 0; part < kCodeParts; ++part) {
      typedef Vec<kLanes>::I I;
      spill(part * kLanes, __builtin_convertvector(bit_cast<I>(totals[part]), F<kLanes>));
    }
  }
}

#endif

void product_e8p(const E8PTables& tables, const E8PUnits& units, int64_t blocks,
                 const ProductArgs& args) {
  if (args.fast) product_planes<1>(tables, units, blocks, args);
  else product_planes<2>(tables, units, blocks, args);
}
constexpr auto kProductE8P = product_e8p;

#else

void decode_e8p(const E8PTables& tables, const uint8_t* codes, int64_t blocks, uint8_t* tile) {
  for (int64_t b = 0; b < blocks; ++b, codes += kE8PBlockBytes, tile += 8 * kQuadBytes) {
    for (int64_t i = 0; i < kQuadBytes; ++i) {
      const int lower = codes[i], stored = codes[kE8PSigns + i];
      const int upper = codes[kE8PUpper + i % 64] >> i / 64 * 2;
      for (int e = 0; e < 4; ++e) {
        const int half = e < 2 ? (lower & 15) | (upper & 1) << 4 : lower >> 4 | (upper & 2) << 3;
        const int flip = e < 2 ? tables.front[e][stored & 31] : tables.back[e - 2][stored >> 3];
        const int pair = tables.nibbles[e % 2][half] ^ flip;
        uint8_t* out = tile + (e / 2 * 4 + e % 2) * kQuadBytes + i;
        out[0] = uint8_t(pair & 15);
        out[2 * kQuadBytes] = uint8_t(pair >> 4);
      }
    }
  }
}

void decode_residual(const E8PTables& tables, const uint8_t* codes, int64_t blocks,
                     uint8_t* tile) {
  for (int64_t b = 0; b < blocks; ++b, codes += kQuadBytes, tile += 8 * kQuadBytes) {
    for (int64_t i = 0; i < kQuadBytes; ++i) {
      for (int j = 0; j < 8; ++j) {
        const int pair = tables.residual[j / 2 * 256 + codes[i]];
        tile[j * kQuadBytes + i] = uint8_t(j % 2 ? pair >> 4 : pair & 15);
      }
    }
  }
}

constexpr void (*kProductE8P)(const E8PTables&, const E8PUnits&, int64_t,
                              const ProductArgs&) = nullptr;

#endif

}  // namespace
}  // namespace aqlm::cpu
