// cpu.additive.lut-bytes: quantized look-up tables read by byte permutes (AVX-512 VBMI).
//
// Per lookup t = (i, k) the 2^nbits values <x_i, C_k[c]> are quantized to 16 bits (exact) or 8
// bits (fast) and kept as byte planes of 256 entries. Two vpermi2b and one blend look up 64 rows
// at once; bytes are added as words, whose odd bytes are added a second time on their own:
//
//   chunk of 64 lookups, one token
//     +0    float scale (64 bytes reserved)
//     +64   t=0  [plane lo: entries bytes][plane hi: entries bytes (exact)]
//           t=1  ...
//   acc     [unit of 64 rows][token][4][16] float32: row 4 d + q at [q][d]
//
// A chunk has its own scale, so an outlier among the activations costs precision in its own
// chunk only. Codebooks arrive centred; tables are symmetric: entry = round(v / scale) + zero.

namespace aqlm::cpu {
namespace {

constexpr int kByteChunk = 64;
constexpr int kByteTokens = 8;
constexpr int64_t kByteHeader = 64;

constexpr int byte_zero(int planes) { return planes == 2 ? 32768 : 128; }

inline int64_t plane_bytes(const LutArgs& args) { return args.entries < 64 ? 64 : args.entries; }

template <int PLANES>
int64_t byte_token_bytes(const LutArgs& args) { return kByteHeader + kByteChunk * PLANES * plane_bytes(args); }

template <int PLANES>
int64_t byte_chunk_bytes(const LutArgs& args) { return args.tokens * byte_token_bytes<PLANES>(args); }

// ---- tables --------------------------------------------------------------------------------

template <int PLANES>
void byte_quantize(const float* values, int64_t entries, __m512 inverse, uint8_t* out, int64_t plane) {
  const __m512i zero = _mm512_set1_epi32(byte_zero(PLANES));
  for (int64_t c = 0; c < entries; c += 16) {
    const __m512i q = _mm512_add_epi32(zero, _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values + c), inverse)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c), _mm512_cvtepi32_epi8(q));
    if constexpr (PLANES == 2) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + plane + c), _mm512_cvtepi32_epi8(_mm512_srli_epi32(q, 8)));
    }
  }
}

template <int PLANES>
void byte_build(const LutArgs& args, int64_t chunk, std::byte* tables, float* scratch) {
  const int64_t first = chunk * kByteChunk, left = args.shape.lookups() - first;
  const int64_t count = left < kByteChunk ? left : kByteChunk, plane = plane_bytes(args);
  for (int m = 0; m < args.tokens; ++m, tables += byte_token_bytes<PLANES>(args)) {
    __m512 largest = _mm512_setzero_ps();
    for (int64_t n = 0; n < count; ++n) {
      float* values = scratch + n * args.entries;
      float_table_of(args, m, first + n, values);
      for (int64_t c = 0; c < args.entries; c += 16) {
        largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(values + c)));
      }
    }
    const float range = _mm512_reduce_max_ps(largest);
    const bool empty = range < 1e-30f;  // nothing that float32 sums of this call could show
    *reinterpret_cast<float*>(tables) = empty ? 0.0f : range / float(byte_zero(PLANES) - 1);
    const __m512 inverse = _mm512_set1_ps(empty ? 0.0f : float(byte_zero(PLANES) - 1) / range);
    uint8_t* out = reinterpret_cast<uint8_t*>(tables) + kByteHeader;
    for (int64_t n = 0; n < count; ++n, out += PLANES * plane) {
      byte_quantize<PLANES>(scratch + n * args.entries, args.entries, inverse, out, plane);
    }
  }
}

// ---- lookups -------------------------------------------------------------------------------

// A plane of SEGMENTS x 64 entries in registers.
template <int SEGMENTS>
struct Plane {
  __m512i part[SEGMENTS];

  explicit Plane(const uint8_t* table) {
    for (int s = 0; s < SEGMENTS; ++s) part[s] = _mm512_loadu_si512(table + 64 * s);
  }
  __m512i operator()(__m512i codes, __mmask64 upper) const {
    if constexpr (SEGMENTS == 1) return _mm512_permutexvar_epi8(codes, part[0]);
    if constexpr (SEGMENTS == 2) return _mm512_permutex2var_epi8(part[0], codes, part[1]);
    if constexpr (SEGMENTS == 4) {
      return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(part[0], codes, part[1]),
                                    _mm512_permutex2var_epi8(part[2], codes, part[3]));
    }
  }
};

// acc[q][d] += scale * (sum of row 4 d + q), from sums of words and of their odd bytes.
template <int PLANES>
inline void byte_spill(const __m512i (&words)[PLANES], const __m512i (&odds)[PLANES], int count, float scale, float* acc) {
  const __m512i low = _mm512_set1_epi32(0xffff);
  __m512i sum[4];
  for (int p = PLANES - 1; p >= 0; --p) {
    const __m512i even = _mm512_sub_epi16(words[p], _mm512_slli_epi16(odds[p], 8));
    const __m512i part[4] = {_mm512_and_si512(even, low), _mm512_and_si512(odds[p], low),
                             _mm512_srli_epi32(even, 16), _mm512_srli_epi32(odds[p], 16)};
    for (int q = 0; q < 4; ++q) {
      sum[q] = p == PLANES - 1 ? part[q] : _mm512_add_epi32(_mm512_slli_epi32(sum[q], 8), part[q]);
    }
  }
  const __m512i zero = _mm512_set1_epi32(count * byte_zero(PLANES));
  for (int q = 0; q < 4; ++q) {
    const __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[q], zero));
    _mm512_storeu_ps(acc + 16 * q, _mm512_fmadd_ps(value, _mm512_set1_ps(scale), _mm512_loadu_ps(acc + 16 * q)));
  }
}

// One chunk (count lookups) of V units that lie side by side in a block.
template <int PLANES, int SEGMENTS, int V>
void byte_rows(const uint8_t* codes, int64_t width, int count, const uint8_t* tables, float* acc, int64_t acc_stride) {
  __m512i words[V][PLANES], odds[V][PLANES];
  for (int v = 0; v < V; ++v) {
    for (int p = 0; p < PLANES; ++p) words[v][p] = odds[v][p] = _mm512_setzero_si512();
  }
  const float scale = *reinterpret_cast<const float*>(tables);
  tables += kByteHeader;
  for (int t = 0; t < count; ++t, codes += width, tables += PLANES * SEGMENTS * 64) {
    const Plane<SEGMENTS> low(tables), high(tables + (PLANES - 1) * SEGMENTS * 64);
    for (int v = 0; v < V; ++v) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + 64 * v + 8192), _MM_HINT_T0);
      const __m512i code = _mm512_loadu_si512(codes + 64 * v);
      const __mmask64 upper = SEGMENTS == 4 ? _mm512_movepi8_mask(code) : 0;
      for (int p = 0; p < PLANES; ++p) {
        const __m512i value = p == 0 ? low(code, upper) : high(code, upper);
        words[v][p] = _mm512_add_epi16(words[v][p], value);
        odds[v][p] = _mm512_add_epi16(odds[v][p], _mm512_srli_epi16(value, 8));
      }
    }
  }
  for (int v = 0; v < V; ++v) byte_spill<PLANES>(words[v], odds[v], count, scale, acc + v * acc_stride);
}

template <int PLANES, int SEGMENTS>
void byte_units(int units, const uint8_t* codes, int64_t width, int count, const uint8_t* tables, float* acc, int64_t acc_stride) {
  if (units == 4) byte_rows<PLANES, SEGMENTS, 4>(codes, width, count, tables, acc, acc_stride);
  else if (units == 3) byte_rows<PLANES, SEGMENTS, 3>(codes, width, count, tables, acc, acc_stride);
  else if (units == 2) byte_rows<PLANES, SEGMENTS, 2>(codes, width, count, tables, acc, acc_stride);
  else byte_rows<PLANES, SEGMENTS, 1>(codes, width, count, tables, acc, acc_stride);
}

template <int PLANES>
void byte_accumulate(const LutArgs& args, int64_t u0, int64_t u1, int64_t c0, int64_t c1,
                     const std::byte* tables, float* acc) {
  constexpr int64_t kBlockUnits = kBlockRows / kUnitRows;
  const int64_t lookups = args.shape.lookups(), acc_stride = args.tokens * kUnitRows;
  for (int64_t u = u0; u < u1;) {
    const int64_t end = (u / kBlockUnits + 1) * kBlockUnits, stop = end < u1 ? end : u1;
    const int64_t width = args.shape.block_width(u);
    for (int64_t chunk = c0; chunk < c1; ++chunk) {
      const int64_t t0 = chunk * kByteChunk, left = lookups - t0;
      const int count = int(left < kByteChunk ? left : kByteChunk);
      const uint8_t* codes = args.packed + args.shape.unit_offset(u) + t0 * width;
      for (int m = 0; m < args.tokens; ++m) {
        const auto* table = reinterpret_cast<const uint8_t*>(tables) + (chunk - c0) * byte_chunk_bytes<PLANES>(args) + m * byte_token_bytes<PLANES>(args);
        float* sums = acc + (u - u0) * acc_stride + m * kUnitRows;
        if (args.entries > 128) byte_units<PLANES, 4>(int(stop - u), codes, width, count, table, sums, acc_stride);
        else if (args.entries > 64) byte_units<PLANES, 2>(int(stop - u), codes, width, count, table, sums, acc_stride);
        else byte_units<PLANES, 1>(int(stop - u), codes, width, count, table, sums, acc_stride);
      }
    }
    u = stop;
  }
}

void byte_collect(const LutArgs&, const float* acc, int token, float* rows) {
  acc += token * kUnitRows;
  for (int r = 0; r < kUnitRows; ++r) rows[r] = acc[(r & 3) * 16 + (r >> 2)];
}

constexpr LutKernel kLutBytesExact = {"cpu.additive.lut-bytes-exact", kByteChunk, kByteTokens, false, true,
                                      byte_chunk_bytes<2>, byte_build<2>, byte_accumulate<2>, byte_collect};
constexpr LutKernel kLutBytesFast = {"cpu.additive.lut-bytes-fast", kByteChunk, kByteTokens, false, true,
                                     byte_chunk_bytes<1>, byte_build<1>, byte_accumulate<1>, byte_collect};

}  // namespace
}  // namespace aqlm::cpu
