// Driver of y = x W^T + bias: argument checks and the choice of family.
#include <algorithm>

#include "../common/check.h"
#include "additive.h"
#include "dispatch.h"
#include "matmul.h"

namespace aqlm::cpu {

void check_scheme(const Scheme& s) {
  AQLM_CHECK(s.nbits >= 1 && s.nbits <= 16, "nbits=", s.nbits, " is not in 1..16");
  AQLM_CHECK(s.num_codebooks >= 1, "num_codebooks=", s.num_codebooks, " is not positive");
  AQLM_CHECK(s.in_group_size >= 1, "in_group_size=", s.in_group_size, " is not positive");
  AQLM_CHECK(s.out_group_size >= 1, "out_group_size=", s.out_group_size, " is not positive");
  AQLM_CHECK(s.N >= 0 && s.K >= 0, "N=", s.N, ", K=", s.K, " must not be negative");
  AQLM_CHECK(s.K % s.in_group_size == 0, "K=", s.K, " is not a multiple of ", s.in_group_size,
             " (in_group_size)");
  AQLM_CHECK(s.N % s.out_group_size == 0, "N=", s.N, " is not a multiple of ", s.out_group_size,
             " (out_group_size)");
}

void additive_matmul(const MatmulCall& call) {
  const Scheme& s = call.scheme;
  check_scheme(s);
  AQLM_CHECK(call.M >= 0, "M=", call.M, " must not be negative");
  AQLM_CHECK(call.num_threads >= 1, "num_threads=", call.num_threads, " is not positive");
  if (call.M == 0 || s.N == 0) return;
  AQLM_CHECK(call.M == 1 || call.x_row_stride >= s.K, "x_row_stride=", call.x_row_stride,
             " is less than K=", s.K);
  AQLM_CHECK(call.M == 1 || call.y_row_stride >= s.N, "y_row_stride=", call.y_row_stride,
             " is less than N=", s.N);
  AQLM_CHECK(call.x != nullptr && call.y != nullptr && call.packed != nullptr &&
                 call.codebooks != nullptr && call.scales != nullptr,
             "x, y, packed, codebooks and scales must not be null");
  if (s.nbits <= 8) matmul_lut(call, kernels());
  else matmul_direct(call, kernels());
}

int64_t matmul_max_m(const Scheme& scheme, Dtype x_dtype) {
  check_scheme(scheme);
  const KernelTable& table = kernels();
  if (scheme.nbits > 8) {
    // 1x16 g8, 4096 x 4096, Zen 5, ms decoded / fused: bfloat16 M=16 7.0 / 6.3, M=32 6.6 / 9.6;
    // float32, whose GEMM is slower: M=32 19.0 / 11.7.
    return table.matmul_max_m_direct / (x_dtype == Dtype::bf16 ? 2 : 1);
  }
  return std::max<int64_t>(16, table.matmul_max_m_lut / scheme.num_codebooks);
}

}  // namespace aqlm::cpu
