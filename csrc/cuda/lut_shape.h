// Shared memory of cuda.additive.lut (lut.cuh), for the kernel and its schedule.
#pragma once

#include "../common/additive_layout.h"

namespace aqlm {

constexpr int kLutPitch = 2 * 32 * 4;  // bytes of an entry
constexpr int kLutTableBytes = 256 * kLutPitch;
constexpr int kLutStepUnits = 4;  // packed units of one step
constexpr int kLutMaxStages = 8;  // steps of codes in flight
// The table starts so many bytes past a multiple of 64 KB of the shared window: a PRMT makes the
// whole address of a lookup and this goes into the instruction. Dynamic shared memory starts at 0
// or 1024.
constexpr int kLutTableAt = 1024;

// Two of the four units of a step lie 64 bytes further, in other banks.
AQLM_HD constexpr int lut_stage_bytes(int rows) { return kLutStepUnits * rows * 8 + 64; }
AQLM_HD constexpr int lut_smem(int rows, int stages) {
  return kLutTableAt + kLutTableBytes + stages * lut_stage_bytes(rows) +
         (kLutMaxStages + 4) * 8;
}

}  // namespace aqlm
