// cpu.additive.direct: direct decode of 9..16-bit codes, rows against 1..4 tokens.
//
// A codebook of 2^9..2^16 vectors is too large for look-up tables per call; its vectors are
// loaded at random (1 MB for 16 bits x 8 weights: L2 and L3) and multiplied with x, which stays
// in L1. R rows run side by side so that their loads overlap.
//
// 4096 x 4096, one thread (EPYC Zen 5, 2026-11-22): 1x16g8 M=1 0.79 ms, M=4 1.26 ms; 1x16g16
// 0.65 and 1.06 ms.
//
//   packed  [block of 8 rows][t][8] uint16
//   acc     [block][token][8] float32

namespace aqlm::cpu {
namespace {

constexpr int kDirectTokens = 4;

// R rows (codes of row r at codes[t * 8 + r]) against TM tokens. W lanes; G = 0: group size at
// run time; G = 8 with W = 16: groups in pairs.
template <class T, int B, int W, int G, int TM, int R>
inline void direct_rows(const DirectArgs& args, const Entries<T>& entries, const uint16_t* codes,
                        const float* x, float* acc) {
  const int count = B > 0 ? B : args.shape.num_codebooks;
  const int64_t groups = args.shape.in_groups, ig = G > 0 ? G : args.ig, K = groups * ig;
  F<W> sums[R][TM] = {};
  int64_t i = 0;
  if constexpr (W == 16 && G == 8) {
    for (; i + 2 <= groups; i += 2, x += 16, codes += 2 * count * kWideRows) {
      AQLM_UNROLL
      for (int r = 0; r < R; ++r) {
        const F<W> weights = pair_sum<B>(entries, codes + r, kWideRows, count);
        AQLM_UNROLL
        for (int m = 0; m < TM; ++m) sums[r][m] += weights * load<W>(x + m * K);
      }
    }
  } else {
    for (; i < groups; ++i, x += ig, codes += count * kWideRows) {
      for (int64_t j = 0; j < ig; j += W) {
        AQLM_UNROLL
        for (int r = 0; r < R; ++r) {
          const F<W> weights = group_sum<W, B>(entries, codes + r, kWideRows, count, j);
          AQLM_UNROLL
          for (int m = 0; m < TM; ++m) sums[r][m] += weights * load<W>(x + m * K + j);
        }
      }
    }
  }
  AQLM_UNROLL
  for (int r = 0; r < R; ++r) {
    AQLM_UNROLL
    for (int m = 0; m < TM; ++m) {
      float sum = sum_lanes<W>(sums[r][m]);
      if constexpr (W == 16 && G == 8) {
        if (i < groups) {  // the odd group out
          const F<8> weights = group_sum<8, B>(entries, codes + r, kWideRows, count, 0);
          sum += sum_lanes<8>(F<8>(weights * load<8>(x + m * K)));
        }
      }
      acc[m * kWideRows + r] = sum;
    }
  }
}

template <class T, int B, int W, int G, int TM>
void direct_block(const DirectArgs& args, const Entries<T>& entries, const uint16_t* codes,
                  const float* x, float* acc) {
  constexpr int kRegisters = kLanes == 16 ? 24 : 12;
  constexpr int R = TM * 8 <= kRegisters ? 8 : TM * 4 <= kRegisters ? 4 : 2;
  for (int r = 0; r < kWideRows; r += R) {
    direct_rows<T, B, W, G, TM, R>(args, entries, codes + r, x, acc + r);
  }
}

template <class T, int B, int W, int G>
void direct_tokens(const DirectArgs& args, const Entries<T>& entries, const uint16_t* codes,
                   float* acc) {
  if (args.tokens == 1) direct_block<T, B, W, G, 1>(args, entries, codes, args.x, acc);
  else if (args.tokens == 2) direct_block<T, B, W, G, 2>(args, entries, codes, args.x, acc);
  else if (args.tokens == 3) direct_block<T, B, W, G, 3>(args, entries, codes, args.x, acc);
  else direct_block<T, B, W, G, 4>(args, entries, codes, args.x, acc);
}

template <class T, int B>
void direct_group_size(const DirectArgs& args, const Entries<T>& entries, const uint16_t* codes,
                       float* acc) {
  if (args.ig == 8) direct_tokens<T, B, kLanes, 8>(args, entries, codes, acc);
  else if (args.ig % 16 == 0) direct_tokens<T, B, kLanes, 0>(args, entries, codes, acc);
  else if (args.ig % 4 == 0) direct_tokens<T, B, 4, 0>(args, entries, codes, acc);
  else direct_tokens<T, B, 1, 0>(args, entries, codes, acc);
}

void direct(const DirectArgs& args, int64_t b0, int64_t b1, float* acc) {
  with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Entries<T> entries{static_cast<const T*>(args.codebook), args.entry_stride,
                             args.shape.nbits};
    for (int64_t b = b0; b < b1; ++b, acc += args.tokens * kWideRows) {
      const auto* codes =
          reinterpret_cast<const uint16_t*>(args.packed + b * args.shape.wide_block_bytes());
      if (args.shape.num_codebooks == 1) direct_group_size<T, 1>(args, entries, codes, acc);
      else direct_group_size<T, 0>(args, entries, codes, acc);
    }
  });
}

}  // namespace
}  // namespace aqlm::cpu
