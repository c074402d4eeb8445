// cpu.dense: one token against the rows of a dense weight, a row after the other.
//
// That is one linear stream a thread: 2, 4 or 8 rows side by side are slower, and prefetches 2 to
// 8 KB ahead gain nothing (128256 x 2048 bfloat16, Zen 4, one thread, ms: 17.1, a pure read 16.0;
// rows 33, 27, 22; prefetch 21 to 23; torch 43).

namespace aqlm::cpu {
namespace {

template <class W>
void dense_rows_of(const DenseArgs& args, int64_t rows, float* sums) {
  constexpr int kChains = 4;  // sums that do not wait for each other
  const int64_t K = args.K, whole = K / (kChains * kLanes) * (kChains * kLanes);
  const W* weight = static_cast<const W*>(args.weight);
  for (int64_t r = 0; r < rows; ++r, weight += args.row_stride) {
    F<kLanes> sum[kChains] = {};
    for (int64_t k = 0; k < whole; k += kChains * kLanes) {
      AQLM_UNROLL
      for (int c = 0; c < kChains; ++c) {
        const int64_t at = k + c * kLanes;
        sum[c] += load<kLanes>(weight + at) * load<kLanes>(args.x + at);
      }
    }
    float rest = 0;
    for (int64_t k = whole; k < K; ++k) rest += load<1>(weight + k) * args.x[k];
    sums[r] = sum_lanes<kLanes>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
  }
}

void dense_rows(const DenseArgs& args, int64_t rows, float* sums) {
  with_type(args.dtype, [&](auto* type) {
    dense_rows_of<std::remove_pointer_t<decltype(type)>>(args, rows, sums);
  });
}

}  // namespace
}  // namespace aqlm::cpu
