// What is the same in every call on a layer of given shapes: worked out once, kept by the caller.
// A plan holds sizes and types only, no addresses and no values, so it cannot go stale.
#pragma once

#include <cstdint>
#include <vector>

#include "additive.h"

namespace aqlm::cpu {

struct PlanOperands {
  const void* x;
  int64_t x_row_stride;
  const uint8_t* packed;
  const void* codebooks;
  const void* scales;
  const void* bias;         // may be null
  const uint8_t* prepared;  // may be null
  void* y;
  int64_t y_row_stride;
  int64_t M;
  int num_threads;
};

// Fused layers ("parts") that share x: their operands lie one behind the other.
class AdditivePlan {
 public:
  // `scheme.N` is ignored: `partitions` holds the N of every part.
  AdditivePlan(const Scheme& scheme, const std::vector<int64_t>& partitions, Dtype param_dtype,
               Dtype x_dtype, Precision precision);

  // y = x W^T + bias; false, with nothing done, for an M at which decoding row slices and a dense
  // GEMM is faster.
  bool matmul(const PlanOperands& operands) const;

  // Bytes of all parts.
  int64_t packed_bytes() const { return packed_bytes_; }
  int64_t prepared_bytes() const { return prepared_bytes_ * int64_t(parts_.size()); }
  void prepare(const void* codebooks, uint8_t* prepared) const;

 private:
  struct Part {
    Scheme scheme;
    int64_t row, packed;  // first output row, first byte of the codes
  };

  std::vector<Part> parts_;
  Dtype param_dtype_, x_dtype_;
  Precision precision_;
  int64_t packed_bytes_ = 0;
  int64_t codebook_bytes_, prepared_bytes_;  // of one part
};

}  // namespace aqlm::cpu
