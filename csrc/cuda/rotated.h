// What the root files see of the rotated and scalar kernels: parameter structs and launchers.
// Launchers enqueue on `stream`, return the launch's error and never synchronise or allocate.
//
// Runtime layout of a weight [N, K], E8P and scalar alike: cells of 32 rows x 64 columns,
//   row block | unit of K | planes of 16 bytes a lane (3 bit: and one of 8)
// so that a warp reads one contiguous stream. Lane = g * 4 + t holds rows g + 8i, i = 0..3:
//   E8P:    columns 8t .. 8t+7 and 32 + 8t .. 32 + 8t+7 (two codes a row; e8p_decode.cuh)
//   scalar: columns 16f + 4t + j, f, j = 0..3 (scalar_decode.cuh)
// Rows past N and columns past K are zero bits.
#pragma once

#include "launch.h"

namespace aqlm {

constexpr int kCellRows = 32;
constexpr int kCellColumns = 64;

enum class Coding : int { kE8p = 0, kScalar = 1 };

struct RotatedWeight {
  const uint8_t* packed;
  Coding coding;
  int bits;              // E8P 2, 3, 4; scalar 2, 3, 4, 8
  int N, K;
  float residual;        // E8P 3, 4: factor of the residual code
  const void* scales;    // scalar: [N, K / group]
  const void* zeros;     // scalar: same dtype and shape, null: (2^bits - 1) / 2
  DType scale_type;
  int group;
  AQLM_HD int blocks() const { return (N + kCellRows - 1) / kCellRows; }
  AQLM_HD int units() const { return (K + kCellColumns - 1) / kCellColumns; }
  AQLM_HD int cell_bytes() const { return kCellRows * kCellColumns / 8 * bits; }
  AQLM_HD size_t bytes() const { return size_t(blocks()) * units() * cell_bytes(); }
};

// Stream-K schedule: `ctas` blocks share groups * units cells in linear order; each writes float
// partials of the row groups it touches to slots of its own, which are added in order afterwards.
struct RotatedSchedule {
  int groups;      // row groups
  int group_rows;  // rows of one: warps * 32
  int units;
  int ctas;
  int max_slots;   // slots reserved per group
  int cells;       // 64 columns each, of a unit
};

// The CTA that owns a cell.
AQLM_HD int owner_of(const RotatedSchedule& s, int cell) {
  const long long cells = static_cast<long long>(s.groups) * s.units;
  return static_cast<int>(((cell + 1ll) * s.ctas - 1) / cells);
}

// One rotation U of vectors of length n; see aqlm_infer/formats/rotation.py.
struct Rotation {
  int n;
  int factor;         // 0: none
  int block;          // 128 or 0
  const int8_t* h;    // [factor, factor]
  bool transpose;
};

// y = gain * post * U (pre * x) + bias, x being rows of a tensor or the partial sums of a matmul.
struct RotateParams {
  Rotation r;
  RotatedSchedule s;      // of `partials`
  const float* partials;  // null: x
  int local_bits;         // of `partials`: Sylvester bits that the matmul has done
  const void* x;
  DType x_type;
  long long x_stride;
  const void* pre;        // [n], null: ones
  DType pre_type;
  const void* post;       // [n], null: ones
  DType post_type;
  const void* bias;       // of y's dtype; null: none
  float gain;
  void* y;                // [tokens, n] contiguous
  DType y_type;
  int tokens;
};

struct RotatedMatmul {
  RotatedWeight w;
  RotatedSchedule s;
  const void* x;        // [M, K], rows x_stride elements apart
  long long x_stride;
  DType x_type;
  int tokens;           // M
  float* partials;      // [groups][max_slots][tokens][group_rows]
  uint8_t* x_cells;     // [units][8 * tiles * 64]: int8 activations (more than one tile)
  float2* x_sums;       // [units][tokens]: sums of a cell's activations (see rotated_stage.cuh)
  float* x_scales;      // [tokens]
  int local_bits;       // partials are transformed over these low bits of the row; see local_bits_of
  RotateParams finish;  // owned rows: where they end (no rotation); y null: in `partials`
};

// How the blocks of the mma.sync bodies get their activations and rows.
enum class Share : int {
  kRing,   // x staged by a kernel, copied through a ring; 32 rows a warp, a range of K a block
  kLocal,  // the same rows and range; the block stages its range itself
  kOwned   // 32 rows a block and all of K, which its warps share out (rotated_owned.cuh)
};

struct RotatedConfig {
  int tiles;       // MMA column tiles of 4 tokens: one pass covers 4 * tiles tokens; 0: dequantize
  bool grouped;    // scalar scales change along K
  bool wgmma;      // Hopper's warpgroup MMAs
  bool half;       // the same in float16, which scale groups cost nothing
  bool wide;       // more warps a block
  Share share;
};

// `rotates`: a rotation of the outputs follows.
RotatedConfig choose_rotated(const RotatedWeight& w, DType x_type, int tokens, bool rotates,
                             const DeviceInfo& device);
void schedule_rotated(const RotatedConfig& c, const DeviceInfo& device, RotatedMatmul* p);
struct RotatedWorkspace {
  size_t partials, x_cells, x_sums, x_scales;
};
RotatedWorkspace workspace_rotated(const RotatedConfig& c, const RotatedMatmul& p);
// Partial sums only; launch_rotate finishes them.
cudaError_t launch_rotated(const RotatedConfig& c, const RotatedMatmul& p, cudaStream_t stream);

cudaError_t launch_rotate(const RotateParams& p, cudaStream_t stream);

// Low Sylvester bits of the output rotation that a matmul does on the rows it holds, so that its
// second kernel mixes columns that are independent of each other; 0: all is left to that kernel.
int local_bits_of(const RotatedConfig& c, const RotatedSchedule& s, const Rotation& r,
                  const DeviceInfo& device);

// Rows [row0, row1) x columns [col0, col1) (multiples of 64, or the end) of gain * Wq; out[0] is
// element (row0, col0).
struct RotatedDequant {
  RotatedWeight w;
  void* out;
  DType out_type;
  long long out_stride;
  float gain;
  int row0, row1, col0, col1;
};
cudaError_t launch_rotated_dequant(const RotatedDequant& p, cudaStream_t stream);

// Canonical codes <-> packed. E8P: Qidxs [N, K * bits / 64] int64; scalar: rows of K * bits / 8
// bytes, little-endian bit stream.
cudaError_t launch_rotated_pack(const RotatedWeight& w, const void* codes, uint8_t* packed,
                                cudaStream_t stream);
cudaError_t launch_rotated_unpack(const RotatedWeight& w, void* codes, cudaStream_t stream);

}  // namespace aqlm
