// Layers whose operands this module keeps, called from Python past the dispatcher: what conversions
// of a layer's five to eight tensors cost the host, in Python, the dispatcher and the stable ABI.
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
  virtual int device() const = 0;
};

// Keeps the layer until Python takes it, under the number that it gets.
int64_t hold(std::unique_ptr<const HeldLayer> layer);

}  // namespace aqlm_ops
