// One slice of a layer's byte-code codebooks in the forms the look-up-table kernels read.
//
// The forms depend on the codebooks alone. `additive_prepare` computes once, for every slice, those
// that one token needs, behind a copy of the codebooks they were made from:
//
//   prepared  [codebooks as stored, padded to 64 bytes] [slice 0] [slice 1] ...
//   slice     [by_entry, centred] [means] [norms] [magnitude]   (float32, each padded to 64 bytes)
//
// A call compares the copy with the codebooks it is given (0.2 us for 2x8g8) and ignores what was
// prepared for others, so codebooks that change in place can never meet stale forms.
#pragma once

#include <cstdint>

#include "codebooks.h"
#include "memory.h"

namespace aqlm::cpu {

class Forms {
 public:
  // `prepared` may be null.
  Forms(const Scheme& scheme, const void* codebooks, Dtype dtype, const uint8_t* prepared,
        const KernelTable& table, Workspace& workspace);

  static int64_t workspace_bytes(const Scheme& scheme);
  static int64_t prepared_bytes(const Scheme& scheme, Dtype dtype);
  static void prepare(const Scheme& scheme, const void* codebooks, Dtype dtype,
                      const KernelTable& table, uint8_t* prepared);

  // Entries of one codebook in `by_entry`, padded to a multiple of 16.
  static int64_t entries(const Scheme& scheme);

  void select(int64_t a);

  // [B][entries][ig]; centred: every codebook minus its mean.
  const float* by_vector(bool centred);

  // [B][ig][entries]; centred: every codebook minus its mean.
  const float* by_entry(bool centred);

  // Largest length of a centred entry, by codebook.
  const float* norms();

  // Largest magnitude in the slice: infinite or NaN if anything is not finite.
  float magnitude();

  // What centring took out of one row of the product.
  float removed(const float* x);

 private:
  enum Form { kNatural, kCentred, kByEntry, kByEntryCentred, kNorms, kMagnitude, kForms };

  bool need(Form form);  // true the first time after select
  const float* natural();
  void centre();
  void transpose(const float* source, float* target) const;

  Scheme scheme_;
  const KernelTable& table_;
  CodebookSlices slices_;
  const uint8_t* prepared_;
  int64_t slice_ = 0;
  float* natural_;
  float* centred_;
  float* by_entry_;
  // Also what `prepared` holds: own_* in the workspace, or the selected slice of `prepared`.
  float *own_by_entry_centred_, *own_means_, *own_norms_, *own_magnitude_;
  const float *by_entry_centred_, *means_, *norms_, *magnitude_;
  bool ready_[kForms] = {};
};

}  // namespace aqlm::cpu
