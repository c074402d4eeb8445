// What launch_rotate sees of the rotation of many tokens.
#pragma once

#include "rotated.h"

namespace aqlm {

// Whether it takes x: rows of 16-bit values at 16-byte addresses, F * 2^p with F <= 32 and 64 to
// 1024 columns beside at most 32 rows, and `pre` or `post` but not both.
bool takes_many(const RotateParams& p, const DeviceInfo& info);

// p.gain is the whole factor, as of all kernels of the rotation.
cudaError_t launch_rotate_many(const RotateParams& p, const DeviceInfo& info, cudaStream_t stream);

}  // namespace aqlm
