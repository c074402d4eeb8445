// Direct-decode driver (9..16-bit codes): passes over the tokens, row blocks shared out.
#include <algorithm>

#include "codebooks.h"
#include "matmul.h"
#include "memory.h"
#include "threads.h"

namespace aqlm::cpu {
namespace {

constexpr int kMaxTokens = kTokenLanes;

void direct_pass(const MatmulCall& call, const KernelTable& table, const DirectArgs& args,
                 int64_t a, int64_t m0) {
  const FinishArgs finish = finish_args(call, a);
  const int64_t rows = args.shape.out_groups;
  parallel_rows(rows, kWideRows, call.num_threads, [&](int64_t r0, int64_t r1) {
    float sums[kMaxTokens * kWideRows];
    for (int64_t o = r0; o < r1; o += kWideRows) {
      table.direct(args, o / kWideRows, o / kWideRows + 1, sums);
      const int64_t count = std::min(kWideRows, rows - o);
      for (int m = 0; m < args.tokens; ++m) {
        table.finish(finish, sums + m * kWideRows, o, count, y_row(call, m0 + m));
      }
    }
  });
}

void direct_many_pass(const MatmulCall& call, const KernelTable& table, const DirectArgs& args,
                      int64_t a, int64_t m0) {
  const FinishArgs finish = finish_args(call, a);
  const int64_t rows = args.shape.out_groups;
  parallel_rows(rows, kWideRows, call.num_threads, [&](int64_t r0, int64_t r1) {
    alignas(64) float sums[kDirectTileRows * kTokenLanes];
    float column[kDirectTileRows];
    for (int64_t o = r0; o < r1; o += kDirectTileRows) {
      const int64_t count = std::min(kDirectTileRows, r1 - o);
      table.direct_many(args, o / kWideRows, (o + count + kWideRows - 1) / kWideRows, sums);
      for (int m = 0; m < args.tokens; ++m) {
        for (int64_t r = 0; r < count; ++r) column[r] = sums[r * kTokenLanes + m];
        table.finish(finish, column, o, count, y_row(call, m0 + m));
      }
    }
  });
}

}  // namespace

void matmul_direct(const MatmulCall& call, const KernelTable& table) {
  const Scheme& s = call.scheme;
  const CodebookSlices slices(s, call.codebooks, call.param_dtype);
  Workspace workspace(2 * kTokenLanes * s.K * 4);
  float* x = workspace.take<float>(kTokenLanes * s.K);
  float* x_lanes = workspace.take<float>(kTokenLanes * s.K);
  int tokens = 0;
  for (int64_t m0 = 0; m0 < call.M; m0 += tokens) {
    const int64_t left = call.M - m0;
    const bool many = left > table.direct_max_tokens && s.in_group_size <= kDirectTileWeights;
    const int most = many ? kTokenLanes : std::min(table.direct_tokens, kMaxTokens);
    tokens = int(std::min<int64_t>(left, most));
    for (int64_t m = 0; m < tokens; ++m) {
      table.to_float(x_row(call, m0 + m), call.x_dtype, s.K, x + m * s.K);
    }
    if (many) lanes_of(x, tokens, s.K, x_lanes);
    for (int64_t a = 0; a < s.out_group_size; ++a) {
      const CodebookView view = slices.for_decode(table, a, nullptr);
      const DirectArgs args{s.packed(),  call.packed, s.in_group_size,    view.data,
                            view.stride, view.dtype,  many ? x_lanes : x, tokens};
      if (many) direct_many_pass(call, table, args, a, m0);
      else direct_pass(call, table, args, a, m0);
    }
  }
}

}  // namespace aqlm::cpu
