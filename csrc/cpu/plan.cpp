#include "plan.h"

#include <cstddef>

#include "../common/check.h"

namespace aqlm::cpu {

AdditivePlan::AdditivePlan(const Scheme& scheme, const std::vector<int64_t>& partitions,
                           Dtype param_dtype, Dtype x_dtype, Precision precision)
    : param_dtype_(param_dtype), x_dtype_(x_dtype), precision_(precision) {
  AQLM_CHECK(!partitions.empty(), "partitions is empty");
  int64_t row = 0;
  for (const int64_t N : partitions) {
    Scheme part = scheme;
    part.N = N;
    check_scheme(part);
    parts_.push_back({part, row, packed_bytes_});
    row += N;
    packed_bytes_ += part.packed().nbytes();
  }
  codebook_bytes_ = (int64_t(scheme.num_codebooks) << scheme.nbits) * scheme.out_group_size *
                    scheme.in_group_size * dtype_size(param_dtype);
  prepared_bytes_ = additive_prepared_bytes(parts_[0].scheme, param_dtype);
}

bool AdditivePlan::matmul(const PlanOperands& operands) const {
  if (operands.M > matmul_max_m(parts_[0].scheme, x_dtype_)) return false;
  MatmulCall call;
  call.x = operands.x;
  call.x_row_stride = operands.x_row_stride;
  call.x_dtype = x_dtype_;
  call.param_dtype = param_dtype_;
  call.y_row_stride = operands.y_row_stride;
  call.M = operands.M;
  call.precision = precision_;
  call.num_threads = operands.num_threads;
  const auto at = [](const void* base, int64_t bytes) {
    return base == nullptr ? nullptr : static_cast<const std::byte*>(base) + bytes;
  };
  int64_t index = 0;
  for (const Part& part : parts_) {
    const int64_t group = part.row / part.scheme.out_group_size;
    call.scheme = part.scheme;
    call.packed = operands.packed + part.packed;
    call.codebooks = at(operands.codebooks, index * codebook_bytes_);
    call.scales = at(operands.scales, group * dtype_size(param_dtype_));
    call.bias = at(operands.bias, part.row * dtype_size(param_dtype_));
    call.prepared = operands.prepared == nullptr || prepared_bytes_ == 0
                        ? nullptr
                        : operands.prepared + index * prepared_bytes_;
    call.y = static_cast<std::byte*>(operands.y) + part.row * dtype_size(x_dtype_);
    additive_matmul(call);
    ++index;
  }
  return true;
}

void AdditivePlan::prepare(const void* codebooks, uint8_t* prepared) const {
  for (int64_t index = 0; index < int64_t(parts_.size()); ++index) {
    additive_prepare(parts_[size_t(index)].scheme,
                     static_cast<const std::byte*>(codebooks) + index * codebook_bytes_,
                     param_dtype_, prepared + index * prepared_bytes_);
  }
}

}  // namespace aqlm::cpu
