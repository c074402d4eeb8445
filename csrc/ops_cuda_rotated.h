// What the CUDA operators of rotated weights share: operands, workspace, and the two operators that
// joined ones (ops_cuda_joined.cpp) fall back to.
#pragma once

#include <optional>
#include <string>

#include "cuda/rotated.h"
#include "ops_cuda_common.h"

namespace aqlm_ops {

// y = sv * U_N (x Wq^T) + bias.
Tensor rotated_matmul(const aqlm::RotatedWeight& w, const Tensor& x,
                      const std::optional<Tensor>& sv, const std::optional<Tensor>& bias,
                      const Tensor& h, int64_t factor, int64_t block,
                      const std::string& precision);

Tensor hadamard(const Tensor& x, const std::optional<Tensor>& pre,
                const std::optional<Tensor>& post, const Tensor& h, int64_t factor, int64_t block,
                bool transpose);

inline aqlm::Rotation rotation_of(const Tensor& h, int64_t n, int64_t factor, int64_t block,
                                  bool transpose, int device) {
  CHECK(factor >= 0 && (block == 0 || (block == 128 && factor == 1)), "factor=", factor,
        ", block=", block, " is no rotation");
  CHECK(factor <= 1 || factor % 4 == 0, "factor=", factor, " is no Hadamard order");
  if (block) CHECK(n % block == 0, "size ", n, " is not a multiple of ", block);
  if (factor > 0 && !block) {
    const int64_t power = n / factor;
    CHECK(n % factor == 0 && power > 0 && (power & (power - 1)) == 0, "size ", n,
          " is not factor=", factor, " times a power of two");
  }
  if (factor > 1)
    CHECK(h.numel() == factor * factor && h.scalar_type() == ScalarType::Char &&
              h.is_contiguous() && h.get_device_index() == device &&
              reinterpret_cast<uintptr_t>(h.const_data_ptr()) % 4 == 0,
          "h must be contiguous int8 [", factor, ", ", factor, "] on the input's cuda:",
          device, "; got ", h.numel(), " elements on cuda:", h.get_device_index());
  aqlm::Rotation r = {};
  r.n = static_cast<int>(n);
  r.factor = static_cast<int>(factor);
  r.block = static_cast<int>(block);
  r.h = factor > 1 ? static_cast<const int8_t*>(h.const_data_ptr()) : nullptr;
  r.transpose = transpose;
  return r;
}

// Pointer and dtype of a vector of n elements, or null.
inline const void* vector_of(const std::optional<Tensor>& t, int64_t n, const char* name,
                             int device, aqlm::DType* type) {
  if (!t) return nullptr;
  CHECK(t->numel() == n && t->is_contiguous() && t->get_device_index() == device, name,
        " must be ", n, " contiguous values on the input's cuda:", device, "; got ", t->numel(),
        " on cuda:", t->get_device_index());
  *type = dtype_of(*t, name);
  return t->const_data_ptr();
}

inline aqlm::RotatedWeight e8p_weight(int64_t bits, double residual, int64_t N, int64_t K) {
  CHECK(bits == 2 || bits == 3 || bits == 4, "bits=", bits, ": E8P has 2, 3 or 4");
  CHECK(N % 16 == 0 && K % 64 == 0, "E8P needs N % 16 = 0 and K % 64 = 0; got N=", N, ", K=", K);
  CHECK(N < (1 << 30) && K < (1 << 30), "N=", N, ", K=", K, " is too large");
  aqlm::RotatedWeight w = {};
  w.coding = aqlm::Coding::kE8p;
  w.bits = static_cast<int>(bits);
  w.N = static_cast<int>(N);
  w.K = static_cast<int>(K);
  w.group = w.K;
  w.residual = static_cast<float>(residual);
  return w;
}

inline void set_packed(aqlm::RotatedWeight& w, const Tensor& packed) {
  CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
            static_cast<size_t>(packed.numel()) == w.bytes(),
        "packed must be ", w.bytes(), " contiguous uint8; got ", packed.numel(),
        " (were the codes packed on another device?)");
  CHECK(reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0,
        "packed is not 16-byte aligned");
  w.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
}

// Gives a scheduled matmul its workspace; a tensor that is there and large enough is used again.
inline void set_workspace(const aqlm::RotatedConfig& config, const Tensor& like,
                          std::optional<Tensor>& workspace, aqlm::RotatedMatmul* p) {
  const aqlm::RotatedWorkspace need = aqlm::workspace_rotated(config, *p);
  auto padded = [](size_t n) { return static_cast<int64_t>((n + 255) / 256 * 256); };
  const int64_t bytes = padded(need.partials) + padded(need.x_cells) + padded(need.x_sums) +
                        padded(need.x_scales);
  if (!workspace || workspace->numel() < bytes)
    workspace = fresh(like, {bytes}, ScalarType::Byte);
  uint8_t* at = static_cast<uint8_t*>(workspace->mutable_data_ptr());
  p->partials = reinterpret_cast<float*>(at);
  p->x_cells = at += padded(need.partials);
  p->x_sums = reinterpret_cast<float2*>(at += padded(need.x_cells));
  p->x_scales = reinterpret_cast<float*>(at += padded(need.x_sums));
}

inline void check_input(const Tensor& x, const Tensor& packed, const char* name) {
  CHECK(x.dim() >= 1, name, " has no dimensions");
  CHECK(x.get_device_index() == packed.get_device_index(), name, " is on cuda:",
        x.get_device_index(), ", packed on cuda:", packed.get_device_index());
}

}  // namespace aqlm_ops
