// cpu.additive.decode: rows of the dense weight in any float type.
//
// W[o][i * ig + c] = scale[o] * sum_k C_k[code(o, i, k)][c]: float32 sum in order k = 0..B-1,
// one float32 multiply, one rounding to nearest even. Byte codes are walked in tiles of 64 rows
// x 128 lookups, so that codes (a lookup apart in memory) stay in L1 and every row is written in
// runs of a few hundred bytes.

namespace aqlm::cpu {
namespace {

constexpr int64_t kDecodeTile = 128;  // lookups

template <class T, class Code, class Out, int W, int G>
inline void decode_run(const DecodeArgs& args, const Code* codes, int64_t width, int64_t groups,
                       float scale, Out* out) {
  const T* base = static_cast<const T*>(args.codebook);
  const int64_t ig = G > 0 ? G : args.ig, stride = args.entry_stride;
  const int count = args.shape.num_codebooks, nbits = args.shape.nbits;
  for (int64_t i = 0; i < groups; ++i, out += ig) {
    for (int64_t j = 0; j < ig; j += W) {
      F<W> sum = load<W>(base + int64_t(codes[0]) * stride + j);
      for (int k = 1; k < count; ++k) {
        sum += load<W>(base + ((int64_t(k) << nbits) + codes[k * width]) * stride + j);
      }
      store<W>(out + j, F<W>(sum * scale));
    }
    codes += count * width;
  }
}

template <class T, class Code, class Out>
void decode_any(const DecodeArgs& args, const Code* codes, int64_t width, int64_t groups,
                float scale, Out* out) {
  if (args.ig == 8) decode_run<T, Code, Out, (kLanes < 8 ? kLanes : 8), 8>(args, codes, width, groups, scale, out);
  else if (args.ig % 16 == 0) decode_run<T, Code, Out, kLanes, 0>(args, codes, width, groups, scale, out);
  else if (args.ig % 4 == 0) decode_run<T, Code, Out, 4, 0>(args, codes, width, groups, scale, out);
  else decode_run<T, Code, Out, 1, 0>(args, codes, width, groups, scale, out);
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
      const uint8_t* codes = args.packed + args.shape.unit_offset(unit) + i * count * width + row - unit * kUnitRows;
      Out* out = static_cast<Out*>(args.out) + (row - args.row0) * args.out_stride + i * args.ig;
      decode_any<float>(args, codes, width, groups, scale_of(args, row), out);
    }
  }
}

template <class Out>
void decode_wide(const DecodeArgs& args, int64_t row) {
  const auto* codes = reinterpret_cast<const uint16_t*>(
      args.packed + row / kWideRows * args.shape.wide_block_bytes()) + row % kWideRows;
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
