// cpu.additive.direct: direct decode of 9..16-bit codes, rows against 1..4 tokens.
//
// A codebook of 2^9..2^16 vectors is too large for look-up tables per call; its vectors are
// loaded at random (1 MB for 16 bits x 8 weights: L2 and L3) and multiplied with x, which stays
// in L1. R rows run side by side so that their loads overlap.
//
//   packed  [block of 8 rows][t][8] uint16
//   acc     [block][token][8] float32

namespace aqlm::cpu {
namespace {

constexpr int kDirectTokens = 4;

// Entry (k, c) of one call: weights of a group as vectors of W lanes.
template <class T>
struct Entries {
  const T* base;
  int64_t stride;
  int nbits;

  const T* at(int k, uint32_t code) const {
    return base + ((int64_t(k) << nbits) + code) * stride;
  }
};

// Sum over the codebooks of group i, weights [j, j + W) of it.
template <int W, int B, class T>
inline F<W> group_sum(const Entries<T>& entries, const uint16_t* codes, int num_codebooks, int64_t j) {
  F<W> sum = load<W>(entries.at(0, codes[0]) + j);
  const int count = B > 0 ? B : num_codebooks;
  for (int k = 1; k < count; ++k) sum += load<W>(entries.at(k, codes[k * kWideRows]) + j);
  return sum;
}

// R rows (codes of row r at codes[t * 8 + r]) against TM tokens. W lanes; G = 0: size at run time.
template <class T, int B, int W, int G, int TM, int R>
inline void direct_rows(const DirectArgs& args, const Entries<T>& entries, const uint16_t* codes,
                        const float* x, float* acc) {
  const int count = B > 0 ? B : args.shape.num_codebooks;
  const int64_t ig = G > 0 ? G : args.ig, K = args.shape.in_groups * ig;
  F<W> sums[R][TM] = {};
  for (int64_t i = 0; i < args.shape.in_groups; ++i) {
    for (int64_t j = 0; j < ig; j += W) {
      for (int r = 0; r < R; ++r) {
        const F<W> weights = group_sum<W, B>(entries, codes + r, count, j);
        for (int m = 0; m < TM; ++m) sums[r][m] += weights * load<W>(x + m * K + i * ig + j);
      }
    }
    codes += count * kWideRows;
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < TM; ++m) acc[m * kWideRows + r] = sum_lanes<W>(sums[r][m]);
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
void direct_tokens(const DirectArgs& args, const Entries<T>& entries, const uint16_t* codes, float* acc) {
  if (args.tokens == 1) direct_block<T, B, W, G, 1>(args, entries, codes, args.x, acc);
  else if (args.tokens == 2) direct_block<T, B, W, G, 2>(args, entries, codes, args.x, acc);
  else if (args.tokens == 3) direct_block<T, B, W, G, 3>(args, entries, codes, args.x, acc);
  else direct_block<T, B, W, G, 4>(args, entries, codes, args.x, acc);
}

template <class T, int B>
void direct_group_size(const DirectArgs& args, const Entries<T>& entries, const uint16_t* codes, float* acc) {
  if (args.ig == 8) direct_tokens<T, B, (kLanes < 8 ? kLanes : 8), 8>(args, entries, codes, acc);
  else if (args.ig % 16 == 0) direct_tokens<T, B, kLanes, 0>(args, entries, codes, acc);
  else if (args.ig % 4 == 0) direct_tokens<T, B, 4, 0>(args, entries, codes, acc);
  else direct_tokens<T, B, 1, 0>(args, entries, codes, acc);
}

void direct(const DirectArgs& args, int64_t b0, int64_t b1, float* acc) {
  with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Entries<T> entries{static_cast<const T*>(args.codebook), args.entry_stride, args.shape.nbits};
    for (int64_t b = b0; b < b1; ++b, acc += args.tokens * kWideRows) {
      const auto* codes = reinterpret_cast<const uint16_t*>(args.packed + b * args.shape.wide_block_bytes());
      if (args.shape.num_codebooks == 1) direct_group_size<T, 1>(args, entries, codes, acc);
      else direct_group_size<T, 0>(args, entries, codes, acc);
    }
  });
}

}  // namespace
}  // namespace aqlm::cpu
