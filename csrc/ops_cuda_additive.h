// What the CUDA operators of additive codebooks share: the format that operands describe.
#pragma once

#include <string>
#include <vector>

#include "ops_cuda_common.h"

namespace aqlm_ops {

inline aqlm::Precision precision_of(const std::string& s) {
  CHECK(s == "exact" || s == "int8", "precision='", s, "' is neither 'exact' nor 'int8'");
  return s == "int8" ? aqlm::Precision::kInt8 : aqlm::Precision::kExact;
}

inline aqlm::Additive make_additive(int64_t in_groups, int64_t codebooks, int64_t nbits,
                             int64_t out_group, int64_t in_group,
                             const std::vector<int64_t>& partitions) {
  CHECK(nbits >= 1 && nbits <= 16, "nbits=", nbits, " is outside 1..16");
  CHECK(in_group % 4 == 0 && in_group > 0, "in_group_size=", in_group, " is not a multiple of 4");
  CHECK(out_group >= 1, "out_group_size=", out_group, " is not positive");
  CHECK(codebooks >= 1, "num_codebooks=", codebooks, " is not positive");
  CHECK(!partitions.empty() && partitions.size() <= aqlm::kMaxParts, "partitions has ",
        partitions.size(), " parts; supported are 1..", aqlm::kMaxParts);
  aqlm::Additive a = {};
  a.codebooks = static_cast<int>(codebooks);
  a.nbits = static_cast<int>(nbits);
  a.out_group = static_cast<int>(out_group);
  a.in_group = static_cast<int>(in_group);
  a.in_groups = static_cast<int>(in_groups);
  a.parts = static_cast<int>(partitions.size());
  for (int p = 0; p < a.parts; ++p) {
    CHECK(partitions[p] >= 0 && partitions[p] % out_group == 0, "partition ", p, " has ",
          partitions[p], " rows, not a multiple of out_group_size=", out_group);
    a.row0[p + 1] = a.row0[p] + static_cast<int>(partitions[p] / out_group);
  }
  return a;
}

// The format of an op that has codebooks [P * B, 2^b, og, ig] and scales [O, 1, 1, 1].
inline aqlm::Additive describe(const Tensor& packed, const Tensor& codebooks, const Tensor& scales,
                        int64_t K, const std::vector<int64_t>& partitions) {
  CHECK(codebooks.dim() == 4, "codebooks must be [P * B, entries, og, ig]; got ", codebooks.dim(),
        " dimensions");
  const int64_t parts = static_cast<int64_t>(partitions.size());
  CHECK(parts > 0 && codebooks.size(0) % parts == 0, "codebooks.size(0)=", codebooks.size(0),
        " is not a multiple of the ", parts, " partitions");
  int nbits = 0;
  while ((int64_t(1) << nbits) < codebooks.size(1)) ++nbits;
  CHECK((int64_t(1) << nbits) == codebooks.size(1), "codebooks have ", codebooks.size(1),
        " entries, not a power of two");
  const int64_t G = codebooks.size(3);
  CHECK(K % G == 0, "K=", K, " is not a multiple of ", G, " (vector length of the codebooks)");
  const aqlm::Additive a = make_additive(K / G, codebooks.size(0) / parts, nbits,
                                         codebooks.size(2), G, partitions);
  CHECK(scales.numel() == a.out_groups(), "scales has ", scales.numel(), " elements for ",
        a.out_groups(), " output groups");
  CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
            static_cast<size_t>(packed.numel()) == a.packed_bytes(),
        "packed must be ", a.packed_bytes(), " contiguous uint8; got ", packed.numel(),
        " (were the codes packed on another device or with other partitions?)");
  CHECK(reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0,
        "packed is not 16-byte aligned");
  CHECK(codebooks.scalar_type() == scales.scalar_type(), "codebooks and scales differ in dtype");
  CHECK(codebooks.is_contiguous() && scales.is_contiguous(),
        "codebooks and scales must be contiguous");
  CHECK(reinterpret_cast<uintptr_t>(codebooks.const_data_ptr()) % 16 == 0,
        "codebooks are not 16-byte aligned");
  CHECK(packed.get_device_index() == codebooks.get_device_index() &&
            scales.get_device_index() == codebooks.get_device_index(),
        "packed, codebooks and scales are on different devices");
  return a;
}

}  // namespace aqlm_ops
