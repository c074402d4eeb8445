// cpu.additive.lut-tokens: float32 look-up tables with tokens as the vector dimension.
//
// Per lookup t = (i, k) a table of <x_i, C_k[c]> for every entry c and W tokens at once; one
// load and one add serve W tokens x ig weights, in plain float32.
//
//   x       [K][W] float32                  (W = 16; unused tokens are zero)
//   tables  [chunk of 2 lookups][entries][W] float32: 2 x 16 KB at 8 bits
//   acc     [unit of 64 rows][64][W] float32
//
// Serves what lut-words must not quantize (NaN, infinities, extreme magnitudes, few rows) and the
// portable instruction set.
// 2x8g8 4096 x 4096, M=16, one thread (EPYC Zen 5, 2026-11-22): AVX-512 3.3 ms, AVX2 6.8 ms;
// bound by the tables' construction and by sums that stream from L2 once per two lookups.

namespace aqlm::cpu {
namespace {

constexpr int kTokenChunk = 2;

int64_t token_chunk_bytes(const LutArgs& args) {
  return kTokenChunk * args.entries * kTokenLanes * 4;
}

// table[c][:] = sum_j codebook[c][j] * x[j][:]; IG = 0: group size at run time.
template <int IG>
inline void token_table(const float* x, const float* codebook, int64_t ig,
                                  int64_t entries, float* table) {
  const int64_t size = IG > 0 ? IG : ig;
  F<kTokenLanes> inputs[IG > 0 ? IG : 1];  // in registers where the instruction set has enough
  AQLM_UNROLL
  for (int j = 0; j < IG; ++j) inputs[j] = load<kTokenLanes>(x + j * kTokenLanes);
  for (int64_t c = 0; c < entries; ++c, codebook += size, table += kTokenLanes) {
    F<kTokenLanes> sum = {};
    if constexpr (IG > 0) {
      sum = codebook[0] * inputs[0];
      AQLM_UNROLL
      for (int j = 1; j < IG; ++j) sum += codebook[j] * inputs[j];
    } else {
      for (int64_t j = 0; j < size; ++j) {
        sum += codebook[j] * load<kTokenLanes>(x + j * kTokenLanes);
      }
    }
    store<kTokenLanes>(table, sum);
  }
}

inline void token_table_of(const LutArgs& args, int64_t t, float* table) {
  const int64_t i = t / args.shape.num_codebooks, k = t % args.shape.num_codebooks;
  const int64_t ig = args.ig, entries = args.entries;
  const float* x = args.x + i * ig * kTokenLanes;
  const float* codebook = args.codebook + k * entries * ig;
  if (ig == 8) token_table<8>(x, codebook, ig, entries, table);
  else if (ig == 4) token_table<4>(x, codebook, ig, entries, table);
  else token_table<0>(x, codebook, ig, entries, table);
}

void token_build(const LutArgs& args, int64_t chunk, std::byte* tables, float*) {
  float* table = reinterpret_cast<float*>(tables);
  for (int64_t t = chunk * kTokenChunk; t < (chunk + 1) * kTokenChunk; ++t) {
    if (t < args.shape.lookups()) token_table_of(args, t, table);
    table += args.entries * kTokenLanes;
  }
}

template <int N>
inline void token_rows(const uint8_t* codes, int64_t width, const float* tables, int64_t entries,
                       float* acc) {
  for (int r = 0; r < kUnitRows; ++r) {
    F<kTokenLanes> sum = load<kTokenLanes>(acc + r * kTokenLanes);
    for (int n = 0; n < N; ++n) {
      sum += load<kTokenLanes>(tables + (n * entries + codes[n * width + r]) * kTokenLanes);
    }
    store<kTokenLanes>(acc + r * kTokenLanes, sum);
  }
}

void token_accumulate(const LutArgs& args, int64_t u0, int64_t u1, int64_t c0, int64_t c1,
                      const std::byte* tables, float* acc) {
  const int64_t lookups = args.shape.lookups();
  for (int64_t chunk = c0; chunk < c1; ++chunk) {
    const float* table = reinterpret_cast<const float*>(tables) +
                         (chunk - c0) * kTokenChunk * args.entries * kTokenLanes;
    const int64_t t0 = chunk * kTokenChunk;
    for (int64_t u = u0; u < u1; ++u) {
      const int64_t width = args.shape.block_width(u);
      const uint8_t* codes = args.packed + args.shape.unit_offset(u) + t0 * width;
      float* sums = acc + (u - u0) * kUnitRows * kTokenLanes;
      if (t0 + kTokenChunk <= lookups)
        token_rows<kTokenChunk>(codes, width, table, args.entries, sums);
      else token_rows<1>(codes, width, table, args.entries, sums);
    }
  }
}

void token_collect(const LutArgs&, const float* acc, int token, float* rows) {
  for (int r = 0; r < kUnitRows; ++r) rows[r] = acc[r * kTokenLanes + token];
}

constexpr LutKernel kLutTokens = {
    "cpu.additive.lut-tokens", kTokenChunk, kTokenLanes,      true,         false,
    token_chunk_bytes,         token_build, token_accumulate, token_collect};

}  // namespace
}  // namespace aqlm::cpu
