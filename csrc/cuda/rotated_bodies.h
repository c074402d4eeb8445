// Launchers of one coding and bit width each, defined by the files in instances/.
#pragma once

#include "rotated.h"

namespace aqlm {

template <Coding kCoding, int kBits>
struct RotatedBodies {
  static cudaError_t matmul(const RotatedConfig& c, const RotatedMatmul& p, cudaStream_t stream);
  static cudaError_t dequant(const RotatedDequant& p, cudaStream_t stream);
};

}  // namespace aqlm
