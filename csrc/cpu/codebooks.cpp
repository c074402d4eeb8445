#include "codebooks.h"

#include <cstddef>

namespace aqlm::cpu {

CodebookSlices::CodebookSlices(const Scheme& scheme, const void* codebooks, Dtype dtype)
    : scheme_(scheme),
      codebooks_(codebooks),
      dtype_(dtype),
      entries_(int64_t(scheme.num_codebooks) << scheme.nbits) {}

int64_t CodebookSlices::decode_bytes() const {
  return scheme_.nbits <= 8 ? slice_size() * int64_t(sizeof(float)) : 0;
}

CodebookView CodebookSlices::for_decode(const KernelTable& table, int64_t a, float* floats) const {
  const int64_t ig = scheme_.in_group_size;
  if (scheme_.nbits <= 8) {
    to_float(table, a, floats);
    return {floats, ig, Dtype::f32};
  }
  const auto* bytes = static_cast<const std::byte*>(codebooks_);
  return {bytes + a * ig * dtype_size(dtype_), ig * scheme_.out_group_size, dtype_};
}

void CodebookSlices::to_float(const KernelTable& table, int64_t a, float* floats) const {
  const int64_t ig = scheme_.in_group_size, og = scheme_.out_group_size;
  const auto* bytes = static_cast<const std::byte*>(codebooks_);
  if (og == 1) {
    table.to_float(bytes, dtype_, slice_size(), floats);
    return;
  }
  for (int64_t entry = 0; entry < entries_; ++entry) {
    table.to_float(bytes + (entry * og + a) * ig * dtype_size(dtype_), dtype_, ig,
                   floats + entry * ig);
  }
}

}  // namespace aqlm::cpu
