// Codebooks [B][C][og][ig] of one layer, prepared for the kernels one output slice at a time.
#pragma once

#include <cstdint>

#include "additive.h"

namespace aqlm::cpu {

// Entry (k, c) starts at ((k << nbits) + c) * stride.
struct CodebookView {
  const void* data;
  int64_t stride;
  Dtype dtype;
};

class CodebookSlices {
 public:
  CodebookSlices(const Scheme& scheme, const void* codebooks, Dtype dtype);

  // Slice a as the decoding kernels want it. Codes of up to 8 bits: converted to float32 in
  // `floats` (decode_bytes() of it); wider codes: in place, the conversion would cost more.
  int64_t decode_bytes() const;
  CodebookView for_decode(const KernelTable& table, int64_t a, float* floats) const;

  // Slice a as float32 [B][C][ig].
  void to_float(const KernelTable& table, int64_t a, float* floats) const;

  // Elements of one slice.
  int64_t slice_size() const { return entries_ * scheme_.in_group_size; }

 private:
  Scheme scheme_;
  const void* codebooks_;
  Dtype dtype_;
  int64_t entries_;  // over all codebooks
};

}  // namespace aqlm::cpu
