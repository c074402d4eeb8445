// cpu.additive.lut-words: 16-bit look-up tables with tokens as the vector dimension.
//
// Per lookup t = (i, k) a table of <x_i, C_k[c]> for every entry c and 16 tokens at once, rounded
// to 16 bits; one 32-byte load and one add serve 16 tokens x ig weights. A chunk of 4 lookups has
// one scale a token, so sums within a chunk are exact integers.
//
//   x       [K][16] float32                  (unused tokens are zero)
//   tables  chunk of 4 lookups
//     +0    [16] float32 scales
//     +64   t=0 [entries][16] int16, t=1 ...  (4 x 8 KB at 8 bits: they stay in L1)
//   acc     [unit of 64 rows][64][16] float32
//
// The scale comes from |x_i| * max |C_k[c]| (Cauchy and Schwarz), so tables are built in one pass
// and cannot overflow; the true maximum gives 3.3e-5 but costs a trip through L2. Error
// against float64 (2-norm): 5.4e-5 on Gaussian input, 6.8e-5 with one channel 1000 times the
// others (2x8g8); 7.4e-5 (8x8g32).
//
// 2x8g8 4096 x 4096, M=16, one thread, cached, tables included (EPYC Zen 5, 2026-11-22, machine
// shared, minimum): AVX-512 1.70 ms, 0.4 of it tables; AVX2 4.0 ms. Bound by vector loads: at
// random entries this machine does 1.1 to 1.6 a cycle, and a row takes five for four lookups.
// Adding pairs in 16 bits before widening, and 32 tokens a vector, were no faster.

namespace aqlm::cpu {
namespace {

constexpr int kWordChunk = 4;
constexpr int64_t kWordHeader = kTokenLanes * 4;
constexpr float kWordSteps = 32760;  // of 32767: room for the rounding of the bound

typedef int16_t WordVector __attribute__((vector_size(2 * kTokenLanes)));

inline Vec<kTokenLanes>::I load_words(const std::byte* src) {
#if AQLM_LEVEL >= 2
  return bit_cast<Vec<kTokenLanes>::I>(_mm512_cvtepi16_epi32(read<__m256i>(src)));
#else
  return __builtin_convertvector(read<WordVector>(src), Vec<kTokenLanes>::I);
#endif
}

inline int64_t word_table_bytes(const LutArgs& args) {
  return args.entries * int64_t(sizeof(WordVector));
}

int64_t word_chunk_bytes(const LutArgs& args) {
  return kWordHeader + kWordChunk * word_table_bytes(args);
}

inline F<kTokenLanes> square_root(F<kTokenLanes> v) {
  for (int l = 0; l < kTokenLanes; ++l) v[l] = __builtin_sqrtf(v[l]);
  return v;
}

// Largest magnitude that Cauchy and Schwarz allow in lookups [t0, t1), for each token.
inline F<kTokenLanes> word_range(const LutArgs& args, int64_t t0, int64_t t1) {
  F<kTokenLanes> largest = {};
  for (int64_t t = t0; t < t1; ++t) {
    const int64_t i = t / args.shape.num_codebooks, k = t % args.shape.num_codebooks;
    const float* x = args.x + i * args.ig * kTokenLanes;
    F<kTokenLanes> most = {}, squares = {};
    for (int64_t j = 0; j < args.ig; ++j) {
      const F<kTokenLanes> value = load<kTokenLanes>(x + j * kTokenLanes);
      const F<kTokenLanes> magnitude = value < 0 ? -value : value;
      most = most > magnitude ? most : magnitude;
    }
    // Relative to the largest, so that no square under- or overflows.
    const F<kTokenLanes> one = F<kTokenLanes>() + 1.0f;
    const F<kTokenLanes> inverse = one / (most > 1e-35f ? most : one);
    for (int64_t j = 0; j < args.ig; ++j) {
      const F<kTokenLanes> value = load<kTokenLanes>(x + j * kTokenLanes) * inverse;
      squares += value * value;
    }
    const F<kTokenLanes> bound = square_root(squares) * most * args.norms[k];
    largest = largest > bound ? largest : bound;
  }
  return largest;
}

// Two entries of a table, from their values plus 1.5 * 2^23: that leaves the nearest integer in
// the low bits of the float.
inline void store_words(std::byte* out, F<kTokenLanes> first, F<kTokenLanes> second) {
#if AQLM_LEVEL >= 2
  typedef uint16_t Words32 __attribute__((vector_size(64)));
  write(out, __builtin_shufflevector(bit_cast<Words32>(first), bit_cast<Words32>(second), 0, 2, 4,
                                     6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36,
                                     38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62));
#else
  typedef Vec<kTokenLanes>::U U;
  typedef Vec<kTokenLanes>::H H;
  write(out, __builtin_convertvector(bit_cast<U>(first) & 0xffffu, H));
  write(out + sizeof(H), __builtin_convertvector(bit_cast<U>(second) & 0xffffu, H));
#endif
}

// One table; IG = 0: group size at run time.
template <int IG>
inline void word_table(const float* x, const float* codebook, int64_t ig, int64_t entries,
                       F<kTokenLanes> inverse, std::byte* out) {
  const F<kTokenLanes> magic = F<kTokenLanes>() + 0x1.8p23f;
  if constexpr (IG > 0) {
    F<kTokenLanes> inputs[IG];  // in registers where the instruction set has enough
    AQLM_UNROLL
    for (int j = 0; j < IG; ++j) inputs[j] = load<kTokenLanes>(x + j * kTokenLanes) * inverse;
    for (int64_t c = 0; c < entries; c += 2, codebook += 2 * IG, out += 2 * sizeof(WordVector)) {
      F<kTokenLanes> a = codebook[0] * inputs[0], b = codebook[IG] * inputs[0];
      AQLM_UNROLL
      for (int j = 1; j < IG; ++j) {
        a += codebook[j] * inputs[j];
        b += codebook[IG + j] * inputs[j];
      }
      store_words(out, a + magic, b + magic);
    }
  } else {
    for (int64_t c = 0; c < entries; c += 2, codebook += 2 * ig, out += 2 * sizeof(WordVector)) {
      F<kTokenLanes> a = {}, b = {};
      for (int64_t j = 0; j < ig; ++j) {
        const F<kTokenLanes> input = load<kTokenLanes>(x + j * kTokenLanes);
        a += codebook[j] * input;
        b += codebook[ig + j] * input;
      }
      store_words(out, a * inverse + magic, b * inverse + magic);
    }
  }
}

void word_build(const LutArgs& args, int64_t chunk, std::byte* tables, float*) {
  const int64_t t0 = chunk * kWordChunk, lookups = args.shape.lookups();
  const int64_t t1 = t0 + kWordChunk < lookups ? t0 + kWordChunk : lookups;
  const F<kTokenLanes> range = word_range(args, t0, t1), zero = {};
  // Below 1e-30: nothing that float32 sums of this call could show.
  store<kTokenLanes>(reinterpret_cast<float*>(tables),
                     range < 1e-30f ? zero : F<kTokenLanes>(range / kWordSteps));
  const F<kTokenLanes> inverse = range < 1e-30f ? zero : F<kTokenLanes>(kWordSteps / range);
  std::byte* out = tables + kWordHeader;
  for (int64_t t = t0; t < t1; ++t, out += word_table_bytes(args)) {
    const int64_t i = t / args.shape.num_codebooks, k = t % args.shape.num_codebooks;
    const int64_t ig = args.ig, entries = args.entries;
    const float* x = args.x + i * ig * kTokenLanes;
    const float* codebook = args.codebook + k * entries * ig;
    if (ig == 8) word_table<8>(x, codebook, ig, entries, inverse, out);
    else if (ig == 4) word_table<4>(x, codebook, ig, entries, inverse, out);
    else word_table<0>(x, codebook, ig, entries, inverse, out);
  }
}

// Byte offsets of the entries of 64 codes: widened and shifted side by side, which leaves one
// 16-bit load a lookup instead of a load, a shift and an add.
inline void word_offsets(const uint8_t* codes, uint16_t* offsets) {
  typedef uint8_t Bytes __attribute__((vector_size(32)));
  typedef uint16_t Offsets __attribute__((vector_size(64)));
  for (int r = 0; r < kUnitRows; r += 32) {
    const Offsets wide = __builtin_convertvector(read<Bytes>(codes + r), Offsets);
    write(offsets + r, wide * uint16_t(sizeof(WordVector)));
  }
}

// Adds N lookups of 64 rows; codes of one lookup are `width` bytes apart. ENTRIES = 0: table size
// at run time.
template <int N, int ENTRIES>
inline void word_rows(const uint8_t* codes, int64_t width, const std::byte* tables,
                      int64_t table_bytes, float* acc) {
  typedef Vec<kTokenLanes>::I I;
  if (ENTRIES > 0) table_bytes = ENTRIES * int64_t(sizeof(WordVector));
  uint16_t offsets[N][kUnitRows];
  for (int n = 0; n < N; ++n) word_offsets(codes + n * width, offsets[n]);
  const F<kTokenLanes> scale = load<kTokenLanes>(reinterpret_cast<const float*>(tables));
  tables += kWordHeader;
  for (int r = 0; r < kUnitRows; r += 4) {
    uint64_t four[N];  // offsets of four rows in one load: the tables' loads are what bounds this
    AQLM_UNROLL
    for (int n = 0; n < N; ++n) {
      four[n] = read<uint64_t>(offsets[n] + r);
      asm("" : "+r"(four[n]));  // or g++ splits the load again
    }
    AQLM_UNROLL
    for (int q = 0; q < 4; ++q) {
      I sum = {};
      AQLM_UNROLL
      for (int n = 0; n < N; ++n) {
        sum += load_words(tables + n * table_bytes + uint16_t(four[n]));
        four[n] >>= 16;
      }
      float* row = acc + (r + q) * kTokenLanes;
      store<kTokenLanes>(row, load<kTokenLanes>(row) +
                                  __builtin_convertvector(sum, F<kTokenLanes>) * scale);
    }
  }
}

template <int ENTRIES>
void word_units(const LutArgs& args, int64_t u0, int64_t u1, int64_t t0, const std::byte* tables,
                float* acc) {
  const int64_t left = args.shape.lookups() - t0, bytes = word_table_bytes(args);
  for (int64_t u = u0; u < u1; ++u, acc += kUnitRows * kTokenLanes) {
    const int64_t width = args.shape.block_width(u);
    const uint8_t* codes = args.packed + args.shape.unit_offset(u) + t0 * width;
    if (left >= 4) word_rows<4, ENTRIES>(codes, width, tables, bytes, acc);
    else if (left == 3) word_rows<3, ENTRIES>(codes, width, tables, bytes, acc);
    else if (left == 2) word_rows<2, ENTRIES>(codes, width, tables, bytes, acc);
    else word_rows<1, ENTRIES>(codes, width, tables, bytes, acc);
  }
}

void word_accumulate(const LutArgs& args, int64_t u0, int64_t u1, int64_t c0, int64_t c1,
                     const std::byte* tables, float* acc) {
  for (int64_t chunk = c0; chunk < c1; ++chunk, tables += word_chunk_bytes(args)) {
    if (args.entries == 256) word_units<256>(args, u0, u1, chunk * kWordChunk, tables, acc);
    else word_units<0>(args, u0, u1, chunk * kWordChunk, tables, acc);
  }
}

constexpr LutKernel kLutWords = {
    "cpu.additive.lut-words", kWordChunk, kTokenLanes,     true,         true,
    word_chunk_bytes,         word_build, word_accumulate, token_collect};

}  // namespace
}  // namespace aqlm::cpu
