// cpu.additive.decode: rows of the dense weight in any float type.
//
// W[o][i * ig + c] = scale[o] * sum_k C_k[code(o, i, k)][c]: float32 sum in order k = 0..B-1,
// one float32 multiply, one rounding to nearest even. Byte codes are walked in tiles of 64 rows
// x 128 lookups, so that codes (a lookup apart in memory) stay in L1 and every row is written in
// runs of a few hundred bytes. To bfloat16, one thread, AVX-512 (EPYC Zen 5, 2026-11-22): 2x8g8
// 7 Gweights/s, 1x16g8 7.7, 1x16g16 8.3, 8x8g32 2.1.

namespace aqlm::cpu {
namespace {

constexpr int64_t kDecodeTile = 128;  // lookups

// Groups of ig weights, W at a time; B = 0: number of codebooks at run time.
template <class T, class Code, class Out, int B, int W, int G>
inline void decode_run(const Entries<T>& entries, int num_codebooks, int64_t group_size,
                       const Code* codes, int64_t width, int64_t groups, float scale, Out* out) {
  const int count = B > 0 ? B : num_codebooks;
  const int64_t ig = G > 0 ? G : group_size;
  for (int64_t i = 0; i < groups; ++i, out += ig, codes += count * width) {
    for (int64_t j = 0; j < ig; j += W) {
      store<W>(out + j, F<W>(group_sum<W, B>(entries, codes, width, count, j) * scale));
    }
  }
}

// Groups of 8 weights, two at a time in 16 lanes.
template <class T, class Code, class Out, int B>
inline void decode_run8(const Entries<T>& entries, int num_codebooks, const Code* codes,
                        int64_t width, int64_t groups, float scale, Out* out) {
  const int count = B > 0 ? B : num_codebooks;
  int64_t i = 0;
  for (; i + 2 <= groups; i += 2, out += 16, codes += 2 * count * width) {
    store<16>(out, F<16>(pair_sum<B>(entries, codes, width, count) * scale));
  }
  if (i < groups) {
    store<8>(out, F<8>(group_sum<8, B>(entries, codes, width, count, 0) * scale));
  }
}

template <class T, class Code, class Out, int B>
void decode_group_size(const Entries<T>& entries, int count, int64_t ig, const Code* codes,
                       int64_t width, int64_t groups, float scale, Out* out) {
  if (ig == 8 && kLanes == 16) {
    decode_run8<T, Code, Out, B>(entries, count, codes, width, groups, scale, out);
  } else if (ig == 8) {
    constexpr int W = kLanes < 8 ? kLanes : 8;
    decode_run<T, Code, Out, B, W, 8>(entries, count, ig, codes, width, groups, scale, out);
  } else if (ig % 16 == 0) {
    decode_run<T, Code, Out, B, kLanes, 0>(entries, count, ig, codes, width, groups, scale, out);
  } else if (ig % 4 == 0) {
    decode_run<T, Code, Out, B, 4, 0>(entries, count, ig, codes, width, groups, scale, out);
  } else {
    decode_run<T, Code, Out, B, 1, 0>(entries, count, ig, codes, width, groups, scale, out);
  }
}

template <class T, class Code, class Out>
void decode_any(const DecodeArgs& args, const Code* codes, int64_t width, int64_t groups,
                float scale, Out* out) {
  const Entries<T> entries{static_cast<const T*>(args.codebook), args.entry_stride,
                           args.shape.nbits};
  const int count = args.shape.num_codebooks;
  if (count == 1) {
    decode_group_size<T, Code, Out, 1>(entries, count, args.ig, codes, width, groups, scale, out);
  } else if (count == 2) {
    decode_group_size<T, Code, Out, 2>(entries, count, args.ig, codes, width, groups, scale, out);
  } else {
    decode_group_size<T, Code, Out, 0>(entries, count, args.ig, codes, width, groups, scale, out);
  }
}

inline float scale_of(const DecodeArgs& args, int64_t row) {
  float scale = 1.0f;
  if (args.scales == nullptr) return scale;
  with_type(args.param_dtype, [&](auto* type) {
    scale = load<1>(static_cast<decltype(type)>(const_cast<void*>(args.scales)) + row);
  });
  return scale;
}

// Rows [r0, r1) of one unit of byte codes.
template <class Out>
void decode_unit(const DecodeArgs& args, int64_t unit, int64_t r0, int64_t r1) {
  const int64_t width = args.shape.block_width(unit), count = args.shape.num_codebooks;
  const int64_t step = kDecodeTile / count > 0 ? kDecodeTile / count : 1;
  for (int64_t i = 0; i < args.shape.in_groups; i += step) {
    const int64_t left = args.shape.in_groups - i, groups = left < step ? left : step;
    for (int64_t row = r0; row < r1; ++row) {
      const uint8_t* codes =
          args.packed + args.shape.unit_offset(unit) + i * count * width + row - unit * kUnitRows;
      Out* out = static_cast<Out*>(args.out) + (row - args.row0) * args.out_stride + i * args.ig;
      decode_any<float>(args, codes, width, groups, scale_of(args, row), out);
    }
  }
}

template <class Out>
void decode_wide(const DecodeArgs& args, int64_t row) {
  const auto* codes = reinterpret_cast<const uint16_t*>(
                          args.packed + row / kWideRows * args.shape.wide_block_bytes()) +
                      row % kWideRows;
  Out* out = static_cast<Out*>(args.out) + (row - args.row0) * args.out_stride;
  with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    decode_any<T>(args, codes, kWideRows, args.shape.in_groups, scale_of(args, row), out);
  });
}

void decode_rows(const DecodeArgs& args, int64_t row_begin, int64_t row_end) {
  with_type(args.out_dtype, [&](auto* type) {
    using Out = std::remove_pointer_t<decltype(type)>;
    if (args.shape.wide()) {
      for (int64_t row = row_begin; row < row_end; ++row) decode_wide<Out>(args, row);
      return;
    }
    for (int64_t row = row_begin; row < row_end;) {
      const int64_t unit = row / kUnitRows, end = (unit + 1) * kUnitRows;
      const int64_t stop = end < row_end ? end : row_end;
      decode_unit<Out>(args, unit, row, stop);
      row = stop;
    }
  });
}

}  // namespace
}  // namespace aqlm::cpu
