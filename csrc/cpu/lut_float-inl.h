// cpu.additive.lut-float: float32 look-up tables, one token (every ISA).
//
// Per lookup t = (i, k) a table of <x_i, C_k[c]> for every entry c; a row adds one entry of each
// table. Groups of 8 tables (8 KB at 8 bits) stay in L1 while the rows pass by:
//
//   tables  [chunk of 8 lookups][entries] float32
//   acc     [unit of 64 rows][64] float32
//
// Serves a few tokens without byte shuffles, calls of one unit of rows, and single tokens whose
// activations are not finite. 2x8g8 4096 x 4096, M=1, one thread (EPYC Zen 5, 2026-11-22): AVX2
// and portable 1.13 ms, about one lookup a cycle.

namespace aqlm::cpu {
namespace {

// One table: out[c] = sum_j x[j] * codebook[j][c].
template <int U>
inline void table_block(const float* x, const float* codebook, int64_t ig, int64_t entries,
                        float* out) {
  F<kLanes> acc[U] = {};
  for (int64_t j = 0; j < ig; ++j) {
    AQLM_UNROLL
    for (int u = 0; u < U; ++u) acc[u] += x[j] * load<kLanes>(codebook + j * entries + u * kLanes);
  }
  AQLM_UNROLL
  for (int u = 0; u < U; ++u) store<kLanes>(out + u * kLanes, acc[u]);
}

inline void float_table(const float* x, const float* codebook, int64_t ig, int64_t entries,
                        float* out) {
  constexpr int kWide = kLanes == 16 ? 16 : 8;  // accumulators: of 32, or of 16 registers
  int64_t c = 0;
  for (; c + kWide * kLanes <= entries; c += kWide * kLanes) {
    table_block<kWide>(x, codebook + c, ig, entries, out + c);
  }
  for (; c < entries; c += kLanes) table_block<1>(x, codebook + c, ig, entries, out + c);
}

inline void float_table_of(const LutArgs& args, int token, int64_t t, float* out) {
  const int64_t i = t / args.shape.num_codebooks, k = t % args.shape.num_codebooks;
  float_table(args.x + (token * args.shape.in_groups + i) * args.ig,
              args.codebook + k * args.ig * args.entries, args.ig, args.entries, out);
}

constexpr int kFloatChunk = 8;

int64_t float_chunk_bytes(const LutArgs& args) {
  return kFloatChunk * args.entries * 4;
}

void float_build(const LutArgs& args, int64_t chunk, std::byte* tables, float*) {
  const int64_t first = chunk * kFloatChunk, lookups = args.shape.lookups();
  float* out = reinterpret_cast<float*>(tables);
  for (int64_t t = first; t < first + kFloatChunk; ++t, out += args.entries) {
    if (t < lookups) float_table_of(args, 0, t, out);
  }
}

// Adds N lookups of 64 rows; codes of one lookup are `width` bytes apart.
template <int N>
inline void float_rows(const uint8_t* codes, int64_t width, const float* tables, int64_t entries,
                       float* acc) {
  for (int r = 0; r < kUnitRows; ++r) {
    float even = acc[r], odd = 0;
    for (int n = 0; n < N; n += 2) {
      even += tables[n * entries + codes[n * width + r]];
      if (n + 1 < N) odd += tables[(n + 1) * entries + codes[(n + 1) * width + r]];
    }
    acc[r] = even + odd;
  }
}

void float_accumulate(const LutArgs& args, int64_t u0, int64_t u1, int64_t c0, int64_t c1,
                      const std::byte* tables, float* acc) {
  const int64_t lookups = args.shape.lookups();
  for (int64_t chunk = c0; chunk < c1; ++chunk) {
    const float* table =
        reinterpret_cast<const float*>(tables) + (chunk - c0) * kFloatChunk * args.entries;
    const int64_t t0 = chunk * kFloatChunk;
    const int64_t count = lookups - t0 < kFloatChunk ? lookups - t0 : kFloatChunk;
    for (int64_t u = u0; u < u1; ++u) {
      const int64_t width = args.shape.block_width(u);
      const uint8_t* codes = args.packed + args.shape.unit_offset(u) + t0 * width;
      float* sums = acc + (u - u0) * kUnitRows;
      if (count == kFloatChunk) {
        float_rows<kFloatChunk>(codes, width, table, args.entries, sums);
      } else {
        for (int64_t n = 0; n < count; ++n) {
          float_rows<1>(codes + n * width, width, table + n * args.entries, args.entries, sums);
        }
      }
    }
  }
}

void float_collect(const LutArgs&, const float* acc, int, float* rows) {
  for (int r = 0; r < kUnitRows; ++r) rows[r] = acc[r];
}

constexpr LutKernel kLutFloat = {
    "cpu.additive.lut-float", kFloatChunk,  1, false, false, float_chunk_bytes, float_build,
    float_accumulate,         float_collect};

}  // namespace
}  // namespace aqlm::cpu
