// Calls of held layers (ops_cuda_held.h): an input and a number.
// Schemas, and who gives numbers back: aqlm_infer/ops/held.py.
#include "ops_cuda_held.h"

#include <map>
#include <mutex>
#include <shared_mutex>
#include <utility>

namespace {

using namespace aqlm_ops;
using Layer = std::shared_ptr<const HeldLayer>;

struct Table {
  std::shared_mutex mutex;
  std::map<int64_t, Layer> layers;
  int64_t last = 0;
};

// Never destroyed: at the end of the process its tensors would outlive CUDA.
Table& table() {
  static Table* const made = new Table;
  return *made;
}

Layer find(int64_t number) {
  Table& t = table();
  const std::shared_lock<std::shared_mutex> lock(t.mutex);
  const auto found = t.layers.find(number);
  CHECK(found != t.layers.end(), "no layer is held under the number ", number);
  return found->second;
}

Tensor rotated(const InputRotation& r, const Tensor& x) {
  return hadamard(x, r.su, std::nullopt, r.h, r.factor, r.block, true);
}

Tensor held_linear(const Tensor& x, int64_t number) {
  const Layer layer = find(number);
  return layer->product(layer->input ? rotated(*layer->input, x) : x);
}

// Both halves of held_linear, for layers that share a rotation of their input.
Tensor held_rotation(const Tensor& x, int64_t number) {
  const Layer layer = find(number);
  CHECK(layer->input, "layer ", number, " does not rotate its input");
  return rotated(*layer->input, x);
}

Tensor held_product(const Tensor& z, int64_t number) { return find(number)->product(z); }

void release(int64_t number) {
  Layer layer;  // destroyed after the lock: freeing tensors may run anything
  Table& t = table();
  const std::unique_lock<std::shared_mutex> lock(t.mutex);
  const auto found = t.layers.find(number);
  if (found == t.layers.end()) return;
  layer = std::move(found->second);
  t.layers.erase(found);
}

}  // namespace

namespace aqlm_ops {

int64_t hold(std::shared_ptr<const HeldLayer> layer) {
  Table& t = table();
  const std::unique_lock<std::shared_mutex> lock(t.mutex);
  t.layers.emplace(++t.last, std::move(layer));
  return t.last;
}

}  // namespace aqlm_ops

STABLE_TORCH_LIBRARY_IMPL(aqlm_infer, CUDA, m) {
  m.impl("held_linear", TORCH_BOX(&held_linear));
  m.impl("held_rotation", TORCH_BOX(&held_rotation));
  m.impl("held_product", TORCH_BOX(&held_product));
}

STABLE_TORCH_LIBRARY_IMPL(aqlm_infer, CompositeExplicitAutograd, m) {
  m.impl("release", TORCH_BOX(&release));
}
