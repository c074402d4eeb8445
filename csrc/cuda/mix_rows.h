// What the root files see of the second kernel of a matmul of few tokens.
#pragma once

#include "rotated.h"

namespace aqlm {

// Whether it finishes this rotation of partial sums: few rows of a factor, 16-bit results, float32
// values that multiply them, no bias.
bool takes_mix_rows(const RotateParams& p);

cudaError_t launch_mix_rows(const RotateParams& p, cudaStream_t stream);

}  // namespace aqlm
