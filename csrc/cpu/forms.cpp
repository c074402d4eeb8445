#include "forms.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "dispatch.h"

namespace aqlm::cpu {
namespace {

int64_t by_entry_size(const Scheme& s) {
  return s.num_codebooks * s.in_group_size * Forms::entries(s);
}

int64_t codebook_bytes(const Scheme& s, Dtype dtype) {
  const int64_t vectors = int64_t(s.num_codebooks) << s.nbits;
  return vectors * s.out_group_size * s.in_group_size * dtype_size(dtype);
}

// Floats of one slice of `prepared`, each form padded.
int64_t padded_floats(int64_t count) {
  return Workspace::padded(count * 4) / 4;
}

int64_t slice_floats(const Scheme& s) {
  return padded_floats(by_entry_size(s)) + padded_floats(s.in_group_size) +
         padded_floats(s.num_codebooks) + padded_floats(1);
}

float largest(const KernelTable& table, const float* values, int64_t count) {
  const uint32_t bits = table.max_abs_bits(values, count);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace

Forms::Forms(const Scheme& scheme, const void* codebooks, Dtype dtype, const uint8_t* prepared,
             const KernelTable& table, Workspace& workspace)
    : scheme_(scheme),
      table_(table),
      slices_(scheme, codebooks, dtype),
      prepared_(nullptr),
      natural_(workspace.take<float>(slices_.slice_size())),
      centred_(workspace.take<float>(slices_.slice_size())),
      by_entry_(workspace.take<float>(by_entry_size(scheme))),
      own_by_entry_centred_(workspace.take<float>(by_entry_size(scheme))),
      own_means_(workspace.take<float>(scheme.in_group_size)),
      own_norms_(workspace.take<float>(scheme.num_codebooks)),
      own_magnitude_(workspace.take<float>(1)) {
  const int64_t bytes = codebook_bytes(scheme, dtype);
  if (prepared != nullptr && std::memcmp(prepared, codebooks, size_t(bytes)) == 0) {
    prepared_ = prepared + Workspace::padded(bytes);
  }
}

int64_t Forms::entries(const Scheme& s) {
  return std::max<int64_t>(16, int64_t(1) << s.nbits);
}

int64_t Forms::workspace_bytes(const Scheme& s) {
  const int64_t slice = (int64_t(s.num_codebooks) << s.nbits) * s.in_group_size;
  return 2 * Workspace::padded(slice * 4) + Workspace::padded(by_entry_size(s) * 4) +
         slice_floats(s) * 4;
}

int64_t Forms::prepared_bytes(const Scheme& s, Dtype dtype) {
  return Workspace::padded(codebook_bytes(s, dtype)) + s.out_group_size * slice_floats(s) * 4;
}

void Forms::prepare(const Scheme& s, const void* codebooks, Dtype dtype, const KernelTable& table,
                    uint8_t* prepared) {
  std::memset(prepared, 0, size_t(prepared_bytes(s, dtype)));
  std::memcpy(prepared, codebooks, size_t(codebook_bytes(s, dtype)));
  Workspace workspace(workspace_bytes(s));
  Forms forms(s, codebooks, dtype, nullptr, table, workspace);
  auto* out = reinterpret_cast<float*>(prepared + Workspace::padded(codebook_bytes(s, dtype)));
  const auto append = [&out](const float* values, int64_t count) {
    std::memcpy(out, values, size_t(count) * sizeof(float));
    out += padded_floats(count);
  };
  for (int64_t a = 0; a < s.out_group_size; ++a) {
    forms.select(a);
    append(forms.by_entry(true), by_entry_size(s));
    append(forms.means_, s.in_group_size);
    append(forms.norms(), s.num_codebooks);
    forms.magnitude();
    append(forms.magnitude_, 1);
  }
}

void Forms::select(int64_t a) {
  slice_ = a;
  std::fill(ready_, ready_ + kForms, false);
  if (prepared_ == nullptr) {
    by_entry_centred_ = own_by_entry_centred_;
    means_ = own_means_;
    norms_ = own_norms_;
    magnitude_ = own_magnitude_;
    return;
  }
  by_entry_centred_ = reinterpret_cast<const float*>(prepared_) + a * slice_floats(scheme_);
  means_ = by_entry_centred_ + padded_floats(by_entry_size(scheme_));
  norms_ = means_ + padded_floats(scheme_.in_group_size);
  magnitude_ = norms_ + padded_floats(scheme_.num_codebooks);
  ready_[kByEntryCentred] = ready_[kNorms] = ready_[kMagnitude] = true;
}

bool Forms::need(Form form) {
  const bool first = !ready_[form];
  ready_[form] = true;
  return first;
}

const float* Forms::natural() {
  if (need(kNatural)) slices_.to_float(table_, slice_, natural_);
  return natural_;
}

const float* Forms::by_vector(bool centred) {
  if (!centred) return natural();
  centre();
  return centred_;
}

const float* Forms::by_entry(bool centred) {
  if (centred) {
    if (need(kByEntryCentred)) transpose(by_vector(true), own_by_entry_centred_);
    return by_entry_centred_;
  }
  if (need(kByEntry)) transpose(natural(), by_entry_);
  return by_entry_;
}

const float* Forms::norms() {
  if (!need(kNorms)) return norms_;
  const int64_t count = int64_t(1) << scheme_.nbits, ig = scheme_.in_group_size;
  centre();
  for (int k = 0; k < scheme_.num_codebooks; ++k) {
    own_norms_[k] = 0;
    for (int64_t c = 0; c < count; ++c) {
      const float* entry = centred_ + (k * count + c) * ig;
      double squares = 0;
      for (int64_t j = 0; j < ig; ++j) squares += double(entry[j]) * entry[j];
      own_norms_[k] = std::max(own_norms_[k], float(std::sqrt(squares)));
    }
  }
  return norms_;
}

float Forms::magnitude() {
  if (need(kMagnitude)) *own_magnitude_ = largest(table_, natural(), slices_.slice_size());
  return *magnitude_;
}

float Forms::removed(const float* x) {
  if (prepared_ == nullptr) centre();
  constexpr int64_t kChains = 8;  // independent sums hide the latency of double additions
  const int64_t ig = scheme_.in_group_size;
  double total = 0;
  for (int64_t j0 = 0; j0 < ig; j0 += kChains) {
    const int64_t width = std::min(kChains, ig - j0);
    double sums[kChains] = {};
    for (int64_t i = j0; i < scheme_.K; i += ig) {
      for (int64_t j = 0; j < width; ++j) sums[j] += x[i + j];
    }
    for (int64_t j = 0; j < width; ++j) total += sums[j] * means_[j0 + j];
  }
  return float(total);
}

void Forms::centre() {
  if (!need(kCentred)) return;
  const int64_t count = int64_t(1) << scheme_.nbits, ig = scheme_.in_group_size;
  std::vector<double> sums(static_cast<size_t>(ig));
  std::vector<float> means(static_cast<size_t>(ig));
  std::fill(own_means_, own_means_ + ig, 0.0f);
  for (int k = 0; k < scheme_.num_codebooks; ++k) {
    const float* source = natural() + k * count * ig;
    float* target = centred_ + k * count * ig;
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t j = 0; j < ig; ++j) sums[size_t(j)] += source[c * ig + j];
    }
    for (int64_t j = 0; j < ig; ++j) {
      means[size_t(j)] = float(sums[size_t(j)] / double(count));
      own_means_[j] += means[size_t(j)];
    }
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t j = 0; j < ig; ++j) target[c * ig + j] = source[c * ig + j] - means[size_t(j)];
    }
  }
}

void Forms::transpose(const float* source, float* target) const {
  const int64_t count = int64_t(1) << scheme_.nbits, ig = scheme_.in_group_size;
  for (int k = 0; k < scheme_.num_codebooks; ++k) {
    table_.transpose(source + k * count * ig, count, ig, entries(scheme_),
                     target + k * ig * entries(scheme_));
  }
}

int64_t additive_prepared_bytes(const Scheme& scheme, Dtype dtype) {
  check_scheme(scheme);
  return scheme.nbits <= 8 ? Forms::prepared_bytes(scheme, dtype) : 0;
}

void additive_prepare(const Scheme& scheme, const void* codebooks, Dtype dtype, uint8_t* prepared) {
  if (additive_prepared_bytes(scheme, dtype) > 0) {
    Forms::prepare(scheme, codebooks, dtype, kernels(), prepared);
  }
}

}  // namespace aqlm::cpu
