#include "hadamard.h"

#include <cmath>
#include <cstddef>

#include "../common/check.h"
#include "dispatch.h"
#include "memory.h"
#include "threads.h"

namespace aqlm::cpu {

void check_rotation(const Rotation& rotation, int64_t n) {
  const int64_t F = rotation.factor, block = rotation.block;
  AQLM_CHECK(F >= 0 && (block == 0 || (block == 128 && F == 1)), "factor=", F, ", block=", block,
             " is no rotation");
  if (F == 0) return;
  const int64_t power = block > 0 ? block : n / F;
  AQLM_CHECK(n > 0 && n % (block > 0 ? block : F) == 0 && (power & (power - 1)) == 0, "size ", n,
             " is not factor=", F, " times a power of two, or not a multiple of block=", block);
  AQLM_CHECK(F == 1 || rotation.h != nullptr, "factor=", F, " needs its matrix");
}

int64_t Rotator::workspace_floats(const Rotation& rotation, int64_t n) {
  return rotation.factor > 1 ? n : 0;
}

Rotator::Rotator(const Rotation& rotation, int64_t n, const TileKernels& kernels,
                 const float* factors, float* floats)
    : rotation_(rotation),
      n_(n),
      kernels_(kernels),
      factors_(factors),
      floats_(floats),
      norm_(float(1 / std::sqrt(double(rotation.block > 0 ? rotation.block : n)))) {}

const float* Rotator::operator()(float* x) const {
  const int64_t F = rotation_.factor;
  const int64_t power = rotation_.block > 0 ? rotation_.block : n_ / F;
  kernels_.fwht(x, n_ / power, power);
  if (F <= 1) return x;
  kernels_.mix(factors_, F, power, x, floats_);
  return floats_;
}

void expand_factor(const Rotation& rotation, bool transpose, float* factors) {
  const int64_t F = rotation.factor;
  if (F <= 1) return;
  for (int64_t a = 0; a < F; ++a) {
    for (int64_t c = 0; c < F; ++c) {
      factors[a * F + c] = float(rotation.h[transpose ? c * F + a : a * F + c]);
    }
  }
}

void hadamard(const HadamardCall& call) {
  check_rotation(call.rotation, call.n);
  AQLM_CHECK(call.rotation.factor >= 1, "factor=0: a transform needs at least 1");
  AQLM_CHECK(call.num_threads >= 1, "num_threads=", call.num_threads, " is not positive");
  if (call.M == 0) return;
  const TileKernels& kernels = cpu::kernels().tile;
  const int64_t n = call.n, F = call.rotation.factor, size = dtype_size(call.dtype);
  const int threads = int(call.M < call.num_threads ? call.M : call.num_threads);
  const int64_t own = n + Rotator::workspace_floats(call.rotation, n);
  Workspace workspace(Workspace::padded(F * F * 4) + threads * Workspace::padded(own * 4));
  float* factors = workspace.take<float>(F * F);
  float* floats = workspace.take<float>(threads * Workspace::padded(own * 4) / 4);
  expand_factor(call.rotation, call.transpose, factors);
  on_threads(threads, [&](int thread, int count) {
    float* x = floats + thread * (Workspace::padded(own * 4) / 4);
    const Rotator rotate(call.rotation, n, kernels, factors, x + n);
    for (int64_t m = call.M * thread / count; m < call.M * (thread + 1) / count; ++m) {
      const auto* source = static_cast<const std::byte*>(call.x) + m * call.x_row_stride * size;
      kernels.scale_in(source, call.dtype, call.pre, n, x);
      const float* value = rotate(x);
      kernels.scale_out({value, rotate.norm(), call.post, nullptr, n,
                         static_cast<std::byte*>(call.y) + m * n * size, call.dtype});
    }
  });
}

}  // namespace aqlm::cpu
