// cpu.tile: tokens quantized to integers against tiles of unsigned bytes (tile.h).
//
//   VBMI           vpdpbusd (VNNI) on the high and on the low bytes of x
//   AVX-512, AVX2  tile bytes widened to words, vpmaddwd
//
// Tokens share each load of the tile: three a pass on AVX-512 (24 sums in 32 registers), two on
// AVX2.

namespace aqlm::cpu {
namespace {

// Position 4 j + i of 32 <- 8 i + j (e8p-inl.h).
template <class T>
inline void e8p_order(T* values) {
  typedef T Block __attribute__((vector_size(32 * sizeof(T))));
  const auto block = read<Block>(values);
  write(values, __builtin_shufflevector(block, block, 0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3,
                                        11, 19, 27, 4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7,
                                        15, 23, 31));
}

void quantize(const QuantizeArgs& args) {
  const int64_t columns = args.quads * kQuad;
  const uint32_t bits = max_abs_bits(args.x + args.begin, args.end - args.begin);
  const float largest = bit_cast<float>(bits), steps = args.fast ? 127.0f : 32639.0f;
  const bool finite = bits < 0x7f800000u;
  const bool empty = !finite || largest < 1e-33f;  // below: nothing that float32 sums could show
  *args.scale = finite ? (empty ? 0.0f : largest / steps) : __builtin_nanf("");
  const float inverse = empty ? 0.0f : steps / largest;
  alignas(64) int16_t q[kTileCols] = {};
  int32_t total = 0;
  if (!empty) {
    for (int64_t k = args.begin; k < args.end; ++k) {
      // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the float.
      const float value = args.x[k] * inverse + 0x1.8p23f;
      const int32_t integer = int32_t(bit_cast<uint32_t>(value)) - 0x4b400000;
      q[k] = int16_t(integer);
      total += integer;
    }
  }
  *args.sum = float(total);
  if (args.planes) {
    alignas(64) int8_t high[kTileCols], low[kTileCols];
    const int shift = args.fast ? 0 : 8, half = args.fast ? 0 : 128;
    for (int64_t k = 0; k < columns; ++k) {
      const int upper = (q[k] + half) >> shift;
      high[k] = int8_t(upper);
      low[k] = int8_t(q[k] - upper * (1 << shift));
    }
    if (args.e8p) {
      for (int64_t k = 0; k < columns; k += 32) {
        e8p_order(high + k);
        e8p_order(low + k);
      }
    }
    for (int64_t d = 0; d < args.quads; ++d) {
      __builtin_memcpy(args.out + d * kQuantBytes, high + d * kQuad, 4);
      __builtin_memcpy(args.out + d * kQuantBytes + 4, low + d * kQuad, 4);
    }
    return;
  }
  if (args.e8p) {
    for (int64_t k = 0; k < columns; k += 32) e8p_order(q + k);
  }
  auto* out = reinterpret_cast<int16_t*>(args.out);
  constexpr int kOrder[4] = {0, AQLM_LEVEL >= 1 ? 2 : 1, AQLM_LEVEL >= 1 ? 1 : 2, 3};
  for (int64_t k = 0; k < columns; ++k) out[k] = q[k / 4 * 4 + kOrder[k % 4]];
}

// acc += (sums - zero * x_sum) * scale for rows [row, row + kLanes).
AQLM_INLINE void spill(const ProductArgs& args, int64_t token, int64_t row, F<kLanes> sums) {
  const float x_sum = args.x_sum[token * args.piece_stride];
  const float scale = args.scale * args.x_scale[token * args.piece_stride];
  F<kLanes> zero = F<kLanes>() + args.zero, factor = F<kLanes>() + scale;
  if (args.row_zero != nullptr) zero += load<kLanes>(args.row_zero + row);
  if (args.row_scale != nullptr) factor *= load<kLanes>(args.row_scale + row);
  float* acc = args.acc + token * kTileRows + row;
  store<kLanes>(acc, F<kLanes>(load<kLanes>(acc) + (sums - zero * x_sum) * factor));
}

#if AQLM_LEVEL >= 3

constexpr int kProductTokens = 3;

// In assembly because g++ 12 copies every sum before and after the intrinsic, and keeps sums that
// three unrolled loops touch on the stack: E8P at M = 16 took 3.7 ms.
AQLM_INLINE void dot_bytes(__m512i& sum, __m512i weights, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
}

template <int T, int PLANES>
void product_of(const ProductArgs& args, int64_t m) {
  __m512i sums[T * PLANES][4];
  AQLM_UNROLL
  for (int i = 0; i < T * PLANES; ++i) {
    AQLM_UNROLL
    for (int v = 0; v < 4; ++v) sums[i][v] = _mm512_setzero_si512();
  }
  const uint8_t* x = args.x + m * args.x_stride;
  for (int64_t d = 0; d < args.quads; ++d) {
    __m512i weights[4];
    AQLM_UNROLL
    for (int v = 0; v < 4; ++v) weights[v] = read<__m512i>(args.tile + d * kQuadBytes + v * 64);
    AQLM_UNROLL
    for (int i = 0; i < T * PLANES; ++i) {
      const uint8_t* bytes = x + i / PLANES * args.x_stride + d * kQuantBytes + i % PLANES * 4;
      const __m512i value = _mm512_set1_epi32(read<int32_t>(bytes));
      AQLM_UNROLL
      for (int v = 0; v < 4; ++v) dot_bytes(sums[i][v], weights[v], value);
    }
  }
  AQLM_UNROLL
  for (int t = 0; t < T; ++t) {
    AQLM_UNROLL
    for (int v = 0; v < 4; ++v) {
      typedef Vec<16>::I I;
      I total = bit_cast<I>(sums[t * PLANES][v]);
      if constexpr (PLANES == 2) total = (total << 8) + bit_cast<I>(sums[t * PLANES + 1][v]);
      spill(args, m + t, v * 16, __builtin_convertvector(total, F<16>));
    }
  }
}

template <int T>
void product_of(const ProductArgs& args, int64_t m) {
  if (args.fast) product_of<T, 1>(args, m);
  else product_of<T, 2>(args, m);
}

#elif AQLM_LEVEL >= 1

constexpr int kProductTokens = 2;

#if AQLM_LEVEL == 2
typedef __m512i TileVector;
inline TileVector even_bytes(TileVector v) {
  return _mm512_and_si512(v, _mm512_set1_epi16(255));
}
inline TileVector odd_bytes(TileVector v) {
  return _mm512_srli_epi16(v, 8);
}
inline TileVector dot_words(TileVector sum, TileVector a, TileVector b) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
}
inline TileVector broadcast(int32_t value) {
  return _mm512_set1_epi32(value);
}
#else
typedef __m256i TileVector;
inline TileVector even_bytes(TileVector v) {
  return _mm256_and_si256(v, _mm256_set1_epi16(255));
}
inline TileVector odd_bytes(TileVector v) {
  return _mm256_srli_epi16(v, 8);
}
inline TileVector dot_words(TileVector sum, TileVector a, TileVector b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
inline TileVector broadcast(int32_t value) {
  return _mm256_set1_epi32(value);
}
#endif

template <int T>
void product_of(const ProductArgs& args, int64_t m) {
  constexpr int V = 4;  // vectors of rows side by side
  const uint8_t* x = args.x + m * args.x_stride;
  for (int64_t row = 0; row < kTileRows; row += V * kLanes) {
    TileVector sums[V][T];
    AQLM_UNROLL
    for (int v = 0; v < V; ++v) {
      AQLM_UNROLL
      for (int t = 0; t < T; ++t) sums[v][t] = TileVector{};
    }
    for (int64_t d = 0; d < args.quads; ++d) {
      AQLM_UNROLL
      for (int v = 0; v < V; ++v) {
        const uint8_t* source = args.tile + d * kQuadBytes + (row + v * kLanes) * kQuad;
        const auto weights = read<TileVector>(source);
        const TileVector even = even_bytes(weights), odd = odd_bytes(weights);
        AQLM_UNROLL
        for (int t = 0; t < T; ++t) {
          const uint8_t* value = x + t * args.x_stride + d * kQuantBytes;
          sums[v][t] = dot_words(sums[v][t], even, broadcast(read<int32_t>(value)));
          sums[v][t] = dot_words(sums[v][t], odd, broadcast(read<int32_t>(value + 4)));
        }
      }
    }
    AQLM_UNROLL
    for (int v = 0; v < V; ++v) {
      AQLM_UNROLL
      for (int t = 0; t < T; ++t) {
        typedef Vec<kLanes>::I I;
        spill(args, m + t, row + v * kLanes,
              __builtin_convertvector(bit_cast<I>(sums[v][t]), F<kLanes>));
      }
    }
  }
}

#else

constexpr int kProductTokens = 1;

template <int T>
void product_of(const ProductArgs& args, int64_t m) {
  int32_t sums[kTileRows] = {};
  const auto* x = reinterpret_cast<const int16_t*>(args.x + m * args.x_stride);
  for (int64_t d = 0; d < args.quads; ++d) {
    const uint8_t* tile = args.tile + d * kQuadBytes;
    for (int64_t r = 0; r < kTileRows; ++r) {
      for (int j = 0; j < 4; ++j) sums[r] += tile[r * 4 + j] * x[d * 4 + j];
    }
  }
  for (int64_t row = 0; row < kTileRows; row += kLanes) {
    typedef Vec<kLanes>::I I;
    spill(args, m, row, __builtin_convertvector(read<I>(sums + row), F<kLanes>));
  }
}

#endif

void product(const ProductArgs& args) {
  int64_t m = 0;
  for (; m + kProductTokens <= args.tokens; m += kProductTokens) {
    product_of<kProductTokens>(args, m);
  }
  if constexpr (kProductTokens == 3) {
    if (m + 2 == args.tokens) {
      product_of<2>(args, m);
      return;
    }
  }
  if (m < args.tokens) product_of<1>(args, m);
}

void add_row(const uint8_t* tile, int64_t row, int64_t begin, int64_t end, float scale, float zero,
             bool e8p, float* out) {
  alignas(64) uint8_t bytes[kTileCols];
  for (int64_t d = begin / kQuad; d * kQuad < end; ++d) {
    __builtin_memcpy(bytes + d * kQuad, tile + d * kQuadBytes + row * kQuad, kQuad);
  }
  for (int64_t k = begin; k < end; ++k) {
    const int64_t at = e8p ? k / 32 * 32 + k % 8 * 4 + k % 32 / 8 : k;
    out[k] += scale * (float(bytes[at]) - zero);
  }
}

}  // namespace
}  // namespace aqlm::cpu
