// Layers whose operands this module keeps under a number. An argument that is a tensor costs a call
// 0.5 us of the host (conversions of Python, of the dispatcher and of the stable ABI), and a layer
// has 5 to 8 of them; a number costs nothing.
#pragma once

#include <memory>
#include <optional>

#include "ops_cuda_rotated.h"

namespace aqlm_ops {

// U^T (su x), what a layer does to its input first.
struct InputRotation {
  Tensor su, h;
  int64_t factor, block;
};

struct HeldLayer {
  std::optional<InputRotation> input;

  virtual ~HeldLayer() = default;
  virtual Tensor product(const Tensor& x) const = 0;  // of x after the input's rotation
};

// The number under which ops_cuda_held.cpp finds the layer.
int64_t hold(std::shared_ptr<const HeldLayer> layer);

}  // namespace aqlm_ops
