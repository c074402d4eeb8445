// What the root files see of the CUDA kernels: plain parameter structs and host launchers.
// Launchers enqueue on `stream`, return the launch's error and never synchronise or allocate.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/additive_layout.h"

namespace aqlm {

enum class DType : int { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };
enum class Precision : int { kExact = 0, kInt8 = 1 };

// Which matmul body runs. Each sums a (row group) x (K units) grid that is cut evenly over blocks.
enum class Body : int {
  kLut = 0, kMma = 1, kSplit = 2, kGather = 3, kWgmma = 4, kSplitWgmma = 5, kColumns = 6,
  kWgmmaInt8 = 7, kWgmmaWide = 8, kWgmmaLong = 9, kMmaRing = 10, kOwned = 11
};

// Stream-K schedule: `ctas` blocks per class share items * units cells in linear order, so an item
// is computed by a run of blocks; each writes float partials into slots of its own, which a second
// kernel adds in order. Items that fill whole waves are not cut and need no partials.
struct Schedule {
  int groups;         // row groups of all parts
  int group_rows;     // rows per group, a power of two (kOwned: of a block, a multiple of 16)
  int group_shift;    // log2(group_rows)
  int tile_shift;     // log2 of the rows of a row tile
  int units;          // K units per row group
  int tiles;          // row tiles of all parts: one unit of K is tiles * 512 bytes
  int passes;         // of slot_tokens tokens each; an item is a row group in one pass
  int whole;          // items that one block computes alone, `grid` blocks in turn (kWgmma)
  int cells;          // (items - whole) * units, cut evenly over `ctas`
  int ctas;           // blocks per class that share the cells
  int grid;           // blocks (kWgmma, kOwned)
  int slot_tokens;    // tokens of a pass: a slot is [slot_tokens][group_rows]
  int classes;        // blocks that share one cell (split codebook dimensions): a power of two
  int lanes;          // partial slots that one block writes per piece (warps along K)
  int max_slots;      // slots reserved per group
  int max_units;      // longest K range of one block
  int x_steps;        // K steps in the x image (kWgmma ...: of 32 columns, kSplitWgmma: units)
};

struct MatmulParams {
  Additive a;
  Schedule s;
  const uint8_t* packed;
  const void* codebooks;
  const uint8_t* aux;
  const void* scales;
  const void* bias;          // null: none
  const void* x;             // [M, K], rows x_stride elements apart
  void* y;                   // [M, N] contiguous
  long long x_stride;
  int tokens;                // M
  float* partials;           // [items - whole][max_slots][slot_tokens][group_rows]
  uint8_t* x_fragments;      // activations in MMA order (all but kLut, kGather and exact kMma)
  float* x_scales;           // [M] of the int8 activations
};

struct LaunchConfig {
  Body body;
  DType dtype;
  Precision precision;
  int variant;    // kLut: row blocks per warp; kColumns: CTAs an SM; kMma: warps along rows;
                   // kOwned: rows of a piece, 0: the short form
  int token_tile; // tokens one pass of the body covers
  int passes;     // of one launch (more than one: kWgmma)
  int carveout = 0;  // enqueue.cuh; of kWgmma and kWgmmaInt8
};

// Limits of the device that schedules depend on; read once per device.
struct DeviceInfo {
  int arch;       // 80, 86, 89, 90, ...
  int sms;
  int max_smem;   // per block, opt-in
};
cudaError_t device_info(int device, DeviceInfo* info);

// Bytes of the workspace regions, in the order partials, x_fragments, x_scales.
struct Workspace {
  size_t partials, x_fragments, x_scales;
};

// Picks the body and its schedule for M tokens (see tune.h); token_tile 0 means "dequantize".
// `image`: of those that read an image of x where there is one (a decode step, 2x8 of 16 tokens:
// 2597 us with images; rows leave the sums of the matmul before no room beside the body).
LaunchConfig choose(const Additive& a, int tokens, DType dtype, Precision precision,
                    const DeviceInfo& device, bool image = false);
void make_schedule(const LaunchConfig& config, const DeviceInfo& device, MatmulParams* p);
Workspace workspace_of(const LaunchConfig& config, const MatmulParams& p);
cudaError_t launch_matmul(const LaunchConfig& config, const MatmulParams& p, cudaStream_t stream);

// The matmul up to its partial sums, which a kernel of the caller's adds (sum_joined.cu). Where
// image_tokens is not 0, x may be null: x_fragments then is an image of it, so many tokens wide (of
// int8, with its x_scales, where that is the config's precision).
cudaError_t launch_partials(const LaunchConfig& config, const MatmulParams& p,
                            cudaStream_t stream);
int image_tokens(const LaunchConfig& config, const MatmulParams& p);
// Carve-out (enqueue.cuh) of such a matmul and of what adds its sums, which wait beside each other
// on an SM: placed by the driver they wait until it is empty. A step of B = 16 of 2x8 on an H200,
// 2026-11-29: 2842 us so, 2750 with 100 %; later 50 / 72 / 85 / 100 % 2670 / 2597 / 2597 / 2625,
// int8 with its larger tables 72 / 85 / 100 % 2572 / 2572 / 2517.
inline int carveout_beside(const Additive& a, bool int8) {
  return int8 || a.codebooks > 2 ? 100 : 72;
}

// Rearranged codebooks: kAuxHeader bytes with a float scale per part, then
//   byte storage, int8: [part][codebook][entry] of 8 int8
//   word storage:       [part][class][entry] of 2 bytes: two int8 dimensions, or one as stored
constexpr int kAuxHeader = 64;
// Size for one precision; 0 bytes where the body reads the codebooks as stored.
size_t aux_bytes(const Additive& a, Precision precision);
cudaError_t launch_prepare(const Additive& a, Precision precision, DType dtype,
                           const void* codebooks, uint8_t* aux, cudaStream_t stream);

// code_bytes: 1 (int8) or 2 (int16), the container of the canonical codes.
cudaError_t launch_pack(const Additive& a, const void* codes, uint8_t* packed, int code_bytes,
                        cudaStream_t stream);
cudaError_t launch_unpack(const Additive& a, const uint8_t* packed, void* codes, int code_bytes,
                          cudaStream_t stream);

// Rows [row0, row1) x columns [col0, col1) of the dense weight; columns are multiples of 4 vectors
// (or the end), out[0] is element (row0, col0).
struct DequantParams {
  Additive a;
  const uint8_t* packed;
  const void* codebooks;
  const void* scales;
  void* out;
  long long out_stride;
  int row0, row1, col0, col1;
  bool rounded_sum;  // the sum of two codebooks may be rounded to 16 bits before the scale
};
cudaError_t launch_dequant(DType dtype, const DequantParams& p, cudaStream_t stream);

// y[m, n] += bias[n], for the dequantized path.
cudaError_t launch_add_bias(DType dtype, void* y, const void* bias, int tokens, int features,
                            cudaStream_t stream);

}  // namespace aqlm
