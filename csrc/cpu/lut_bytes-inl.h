// cpu.additive.lut-bytes: quantized look-up tables read by byte shuffles (AVX-512 VBMI, AVX-512,
// AVX2); exact = 16-bit tables in two byte planes, fast = 8-bit tables in one.
//
// Per lookup t = (i, k) the 2^nbits values <x_i, C_k[c]> are quantized to 16 bits (exact) or 8
// bits (fast). A byte shuffle looks up as many rows as the vector has bytes (shuffle-inl.h); the
// bytes are added as 16-bit words, and the odd bytes of the words once more on their own, which
// is enough to tell the two apart after at most 256 lookups:
//
//   tables  chunk of 32 lookups, one token
//     +0    float scale (64 bytes reserved)
//     +64   t=0  [plane: low bytes][plane: high bytes (exact)]
//           t=1  ...
//   acc     [unit of 64 rows][token][64] float32; within a vector of n bytes row 4 d + q is at
//           q * n / 4 + d
//
// A chunk has its own scale, so an outlier among the activations costs precision in its own
// chunk only. Codebooks arrive centred and tables are symmetric: entry = round(v / scale) + zero.
// Sums within a chunk are exact integers. Error against float64 (2-norm, Gaussian x and
// codebooks, 2x8g8): exact 4.5e-5, fast 1.2e-2.
// 2x8g8 4096 x 4096, M=1, one thread, cached, tables included (EPYC Zen 5, 2026-11-22, machine
// shared): VBMI exact 148 us, fast 109 us; AVX-512 665 and 378 us; AVX2 fast 685 us.

namespace aqlm::cpu {
namespace {

constexpr int kByteChunk = 32;
constexpr int kByteTokens = 8;
constexpr int64_t kByteHeader = 64;

typedef uint16_t Words __attribute__((vector_size(kShuffleBytes)));
typedef uint32_t Dwords __attribute__((vector_size(kShuffleBytes)));
constexpr int kQuarter = kShuffleBytes / 4;
constexpr int kUnitVectors = int(kUnitRows) / kShuffleBytes;

constexpr int byte_zero(int planes) {
  return planes == 2 ? 32768 : 128;
}

inline int64_t plane_bytes(const LutArgs& args) {
  const int64_t least = int64_t(1) << kShuffleMinBits;
  return args.entries < least ? least : args.entries;
}

template <int PLANES>
int64_t byte_token_bytes(const LutArgs& args) {
  return kByteHeader + kByteChunk * PLANES * plane_bytes(args);
}

template <int PLANES>
int64_t byte_chunk_bytes(const LutArgs& args) {
  return args.tokens * byte_token_bytes<PLANES>(args);
}

// ---- tables --------------------------------------------------------------------------------

// Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the float.
template <int PLANES>
inline Vec<16>::U quantize(const float* values, float inverse) {
  const F<16> magic = F<16>() + (0x1.8p23f + float(byte_zero(PLANES)));
  return bit_cast<Vec<16>::U>(F<16>(load<16>(values) * inverse + magic));
}

template <int PLANES>
void byte_quantize(const float* values, int64_t entries, float inverse, uint8_t* out,
                   int64_t plane) {
  typedef uint8_t Bytes16 __attribute__((vector_size(16)));
  for (int64_t c = 0; c < entries; c += 16) {
    const Vec<16>::U q = quantize<PLANES>(values + c, inverse);
    write(out + c, __builtin_convertvector(q & 0xffu, Bytes16));
    if constexpr (PLANES == 2) {
      write(out + plane + c, __builtin_convertvector((q >> 8) & 0xffu, Bytes16));
    }
  }
}

inline float largest_magnitude(const float* values, int64_t count) {
  F<kLanes> largest = {};
  for (int64_t c = 0; c < count; c += kLanes) {
    const F<kLanes> value = load<kLanes>(values + c);
    const F<kLanes> magnitude = value < 0 ? -value : value;
    largest = largest > magnitude ? largest : magnitude;
  }
  float result = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    result = result > largest[lane] ? result : largest[lane];
  return result;
}

template <int PLANES>
void byte_build(const LutArgs& args, int64_t chunk, std::byte* tables, float* scratch) {
  const int64_t first = chunk * kByteChunk, left = args.shape.lookups() - first;
  const int64_t count = left < kByteChunk ? left : kByteChunk, plane = plane_bytes(args);
  for (int m = 0; m < args.tokens; ++m, tables += byte_token_bytes<PLANES>(args)) {
    for (int64_t n = 0; n < count; ++n) {
      float_table_of(args, m, first + n, scratch + n * args.entries);
    }
    const float range = largest_magnitude(scratch, count * args.entries);
    const bool empty = range < 1e-30f;  // nothing that float32 sums of this call could show
    const float steps = float(byte_zero(PLANES) - 1);
    write(tables, empty ? 0.0f : range / steps);
    uint8_t* out = reinterpret_cast<uint8_t*>(tables) + kByteHeader;
    for (int64_t n = 0; n < count; ++n, out += PLANES * plane) {
      byte_quantize<PLANES>(scratch + n * args.entries, args.entries, empty ? 0.0f : steps / range,
                            out, plane);
    }
  }
}

// ---- lookups -------------------------------------------------------------------------------

// acc += scale * (sum of each row), from sums of words and of their odd bytes.
template <int PLANES>
AQLM_INLINE void byte_spill(const Words (&words)[PLANES], const Words (&odds)[PLANES], int count,
                            float scale, float* acc) {
  Dwords sum[4] = {};
  AQLM_UNROLL
  for (int p = PLANES - 1; p >= 0; --p) {
    const Dwords even = Dwords(Words(words[p] - (odds[p] << 8))), odd = Dwords(odds[p]);
    const Dwords part[4] = {even & 0xffffu, odd & 0xffffu, even >> 16, odd >> 16};
    AQLM_UNROLL
    for (int q = 0; q < 4; ++q) sum[q] = (sum[q] << 8) + part[q];
  }
  AQLM_UNROLL
  for (int q = 0; q < 4; ++q) {
    typedef typename Vec<kQuarter>::I I;
    const I centred = I(sum[q]) - count * byte_zero(PLANES);
    const F<kQuarter> value = __builtin_convertvector(centred, F<kQuarter>);
    store<kQuarter>(acc + q * kQuarter, load<kQuarter>(acc + q * kQuarter) + value * scale);
  }
}

// One chunk (count lookups) of V vectors of rows that lie side by side in a block; prefetches
// what lies `ahead` bytes ahead.
template <int PLANES, int BITS, int V>
void byte_rows(const uint8_t* codes, int64_t width, int count, int64_t ahead, const uint8_t* tables,
               float* acc, int64_t acc_stride) {
  Words words[V][PLANES], odds[V][PLANES];
  AQLM_UNROLL
  for (int v = 0; v < V; ++v) {
    AQLM_UNROLL
    for (int p = 0; p < PLANES; ++p) words[v][p] = odds[v][p] = Words{};
  }
  const float scale = read<float>(tables);
  tables += kByteHeader;
  for (int t = 0; t < count; ++t, codes += width, tables += PLANES << BITS) {
    const Shuffle<PLANES, BITS> shuffle(tables);
    AQLM_UNROLL
    for (int v = 0; v < V; ++v) {
      __builtin_prefetch(codes + kShuffleBytes * v + ahead);
      const ShuffleKey<BITS> key(codes + kShuffleBytes * v);
      AQLM_UNROLL
      for (int p = 0; p < PLANES; ++p) {
        const Words value = bit_cast<Words>(shuffle(p, key));
        words[v][p] += value;
        odds[v][p] += value >> 8;
      }
    }
  }
  AQLM_UNROLL
  for (int v = 0; v < V; ++v) {
    float* sums = acc + v / kUnitVectors * acc_stride + v % kUnitVectors * kShuffleBytes;
    byte_spill<PLANES>(words[v], odds[v], count, scale, sums);
  }
}

template <int PLANES, int BITS>
void byte_units(int64_t units, const uint8_t* codes, int64_t width, int count, int64_t ahead,
                const uint8_t* tables, float* acc, int64_t acc_stride) {
  if constexpr (kShuffleVectors == 4) {
    if (units == 4) byte_rows<PLANES, BITS, 4>(codes, width, count, ahead, tables, acc, acc_stride);
    else if (units == 3)
      byte_rows<PLANES, BITS, 3>(codes, width, count, ahead, tables, acc, acc_stride);
    else if (units == 2)
      byte_rows<PLANES, BITS, 2>(codes, width, count, ahead, tables, acc, acc_stride);
    else byte_rows<PLANES, BITS, 1>(codes, width, count, ahead, tables, acc, acc_stride);
  } else {
    for (int64_t v = 0; v < units * kUnitVectors; ++v) {
      float* sums = acc + v / kUnitVectors * acc_stride + v % kUnitVectors * kShuffleBytes;
      byte_rows<PLANES, BITS, 1>(codes + v * kShuffleBytes, width, count, ahead, tables, sums,
                                 acc_stride);
    }
  }
}

// Units [u0, u1) chunk by chunk and token by token: the tables of one chunk and token (16 KB) stay
// in L1, codes come in runs of 8 KB. The next run is prefetched while one is looked up.
template <int PLANES, int BITS>
void byte_blocks(const LutArgs& args, int64_t u0, int64_t u1, int64_t c0, int64_t c1,
                 const std::byte* tables, float* acc) {
  constexpr int64_t kBlockUnits = kBlockRows / kUnitRows;
  const PackedShape& shape = args.shape;
  const int64_t lookups = shape.lookups(), acc_stride = args.tokens * kUnitRows;
  const auto* table = reinterpret_cast<const uint8_t*>(tables);
  for (int64_t chunk = c0; chunk < c1; ++chunk) {
    const int64_t t0 = chunk * kByteChunk, left = lookups - t0;
    const int count = int(left < kByteChunk ? left : kByteChunk);
    for (int m = 0; m < args.tokens; ++m, table += byte_token_bytes<PLANES>(args)) {
      for (int64_t u = u0; u < u1;) {
        const int64_t end = (u / kBlockUnits + 1) * kBlockUnits, stop = end < u1 ? end : u1;
        const int64_t width = shape.block_width(u);
        const uint8_t* codes = args.packed + shape.unit_offset(u) + t0 * width;
        const uint8_t* next = stop < u1
                                  ? args.packed + shape.unit_offset(stop) + t0 * width
                                  : args.packed + shape.unit_offset(u0) + (t0 + kByteChunk) * width;
        byte_units<PLANES, BITS>(stop - u, codes, width, count, m == 0 ? next - codes : 0, table,
                                 acc + (u - u0) * acc_stride + m * kUnitRows, acc_stride);
        u = stop;
      }
    }
  }
}

template <int PLANES>
void byte_accumulate(const LutArgs& args, int64_t u0, int64_t u1, int64_t c0, int64_t c1,
                     const std::byte* tables, float* acc) {
  constexpr int kLeast = kShuffleMinBits;
  const int bits = args.shape.nbits;
  if (bits == 8) byte_blocks<PLANES, 8>(args, u0, u1, c0, c1, tables, acc);
  else if (bits == 7) byte_blocks<PLANES, 7>(args, u0, u1, c0, c1, tables, acc);
  else if (bits == 6) byte_blocks<PLANES, 6>(args, u0, u1, c0, c1, tables, acc);
  else if (bits == 5)
    byte_blocks<PLANES, (kLeast < 5 ? 5 : kLeast)>(args, u0, u1, c0, c1, tables, acc);
  else byte_blocks<PLANES, kLeast>(args, u0, u1, c0, c1, tables, acc);
}

void byte_collect(const LutArgs&, const float* acc, int token, float* rows) {
  acc += token * kUnitRows;
  for (int r = 0; r < kUnitRows; ++r) {
    const int in_vector = r % kShuffleBytes;
    rows[r] = acc[r - in_vector + in_vector % 4 * kQuarter + in_vector / 4];
  }
}

constexpr LutKernel kLutBytesExact = {"cpu.additive.lut-bytes-exact",
                                      kByteChunk,
                                      kByteTokens,
                                      false,
                                      true,
                                      byte_chunk_bytes<2>,
                                      byte_build<2>,
                                      byte_accumulate<2>,
                                      byte_collect};
constexpr LutKernel kLutBytesFast = {
    "cpu.additive.lut-bytes-fast", kByteChunk,    kByteTokens,        false,       true,
    byte_chunk_bytes<1>,           byte_build<1>, byte_accumulate<1>, byte_collect};

}  // namespace
}  // namespace aqlm::cpu
