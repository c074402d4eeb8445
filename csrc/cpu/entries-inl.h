// Codebook entries: sums of the vectors that a group's codes point at.

namespace aqlm::cpu {
namespace {

// Entry (k, c) of a layer, ig weights.
template <class T>
struct Entries {
  const T* base;
  int64_t stride;
  int nbits;

  const T* at(int k, uint32_t code) const { return base + ((int64_t(k) << nbits) + code) * stride; }
};

// Weights [j, j + W) of one group: float32 sum over the codebooks in order. Codes of consecutive
// codebooks are `width` apart; B = 0: count at run time.
template <int W, int B, class T, class Code>
inline F<W> group_sum(const Entries<T>& entries, const Code* codes, int64_t width, int count,
                      int64_t j) {
  F<W> sum = load<W>(entries.at(0, codes[0]) + j);
  for (int k = 1; k < (B > 0 ? B : count); ++k) {
    sum += load<W>(entries.at(k, codes[k * width]) + j);
  }
  return sum;
}

// Two consecutive groups of 8 weights.
template <int B, class T, class Code>
inline F<16> pair_sum(const Entries<T>& entries, const Code* codes, int64_t width, int count) {
  const Code* next = codes + (B > 0 ? B : count) * width;
  F<16> sum = load_pair(entries.at(0, codes[0]), entries.at(0, next[0]));
  for (int k = 1; k < (B > 0 ? B : count); ++k) {
    sum += load_pair(entries.at(k, codes[k * width]), entries.at(k, next[k * width]));
  }
  return sum;
}

}  // namespace
}  // namespace aqlm::cpu
