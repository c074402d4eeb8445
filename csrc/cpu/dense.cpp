#include "dense.h"

#include <algorithm>

#include "../common/check.h"
#include "dispatch.h"
#include "memory.h"
#include "threads.h"

namespace aqlm::cpu {

void dense_matvec(const DenseMatvec& call) {
  constexpr int64_t kRows = 64;  // whose sums are rounded and stored together
  const int64_t N = call.N, K = call.K, size = dtype_size(call.dtype);
  AQLM_CHECK(N >= 0 && K >= 0, "N=", N, ", K=", K, " must not be negative");
  AQLM_CHECK(call.num_threads >= 1, "num_threads=", call.num_threads, " is not positive");
  if (N == 0) return;
  AQLM_CHECK(call.x != nullptr && call.weight != nullptr && call.y != nullptr,
             "x, weight and y must not be null");
  AQLM_CHECK(N == 1 || call.row_stride >= K, "row_stride=", call.row_stride, " is less than K=", K);
  const KernelTable& table = kernels();
  Workspace workspace(Workspace::padded(K * 4) + Workspace::padded(N * 4));
  float* x = workspace.take<float>(K);
  float* bias = call.bias == nullptr ? nullptr : workspace.take<float>(N);
  table.to_float(call.x, call.dtype, K, x);
  if (bias != nullptr) table.to_float(call.bias, call.dtype, N, bias);
  parallel_rows(N, kRows, call.num_threads, [&](int64_t begin, int64_t end) {
    float sums[kRows];
    for (int64_t n = begin; n < end; n += kRows) {
      const int64_t rows = std::min(end - n, kRows);
      const auto* weight = static_cast<const std::byte*>(call.weight) + n * call.row_stride * size;
      table.dense_rows({weight, call.row_stride, call.dtype, K, x}, rows, sums);
      table.tile.scale_out({sums, 1, nullptr, bias == nullptr ? nullptr : bias + n, rows,
                            static_cast<std::byte*>(call.y) + n * size, call.dtype});
    }
  });
}

}  // namespace aqlm::cpu
