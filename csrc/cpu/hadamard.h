// Hadamard rotations: U = (H_F (x) S_{n/F}) / sqrt(n), or I (x) S_block / sqrt(block).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace aqlm::cpu {

struct Rotation {
  int64_t factor;   // F; 0: no rotation
  int64_t block;    // 0: the full width
  const int8_t* h;  // [F][F] of +1 and -1; null when F <= 1
};

void check_rotation(const Rotation& rotation, int64_t n);

// One thread's rotation of vectors of n floats.
class Rotator {
 public:
  static int64_t workspace_floats(const Rotation& rotation, int64_t n);

  // `floats`: workspace_floats, kept by the caller as long as the rotator; `factors` as
  // `expand_factor` filled them in.
  Rotator(const Rotation& rotation, int64_t n, const TileKernels& kernels, const float* factors,
          float* floats);

  // Rotates x [n] up to the factor `norm()`; the result is in x or in the workspace.
  const float* operator()(float* x) const;
  float norm() const { return norm_; }

 private:
  Rotation rotation_;
  int64_t n_;
  const TileKernels& kernels_;
  const float* factors_;
  float* floats_;
  float norm_;
};

// H_F (or its transpose) as floats [F][F].
void expand_factor(const Rotation& rotation, bool transpose, float* factors);

struct HadamardCall {
  const void* x;
  int64_t x_row_stride;
  Dtype dtype;        // of x and y
  const float* pre;   // [n], or null
  const float* post;  // [n], or null
  Rotation rotation;
  bool transpose;
  void* y;  // [M][n]
  int64_t M, n;
  int num_threads;
};

// y = post * U (pre * x), or U^T.
void hadamard(const HadamardCall& call);

}  // namespace aqlm::cpu
