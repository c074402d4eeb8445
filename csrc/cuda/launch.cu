// Host side of the matmul: device limits, choice of the body, schedule, workspace, dispatch.
#include <atomic>
#include <climits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "bodies.h"
#include "tune.h"

namespace aqlm {
#ifdef AQLM_TUNE
bool dependent_launch = true;
#endif
namespace {

constexpr int kMaxDevices = 64;
#ifdef AQLM_TUNE
int g_variant = 0, g_occupancy = 0, g_body = -1;
#endif

template <typename Row, size_t n>
const Row& pick(const Row (&rows)[n], long long cells) {
  for (const Row& r : rows)
    if (cells >= r.min_cells) return r;
  return rows[n - 1];
}

long long code_units(const Additive& a) {
  return static_cast<long long>(a.tile0(a.parts)) * a.units();
}

int round_up_tile(int tokens, int per_tile, int max_tiles) {
  int tiles = 1;
  while (tiles < max_tiles && tiles * per_tile < tokens) tiles *= 2;
  return tiles * per_tile;
}

// int32 accumulators must hold K * B products of 127 * 128.
bool int8_fits(const Additive& a) {
  return static_cast<long long>(a.in_features()) * a.codebooks * 127 * 128 < (1ll << 31);
}

int ctas_per_sm(const LaunchConfig& c, const Additive& a) {
  if (c.body == Body::kLut) {
    for (const tune::LutRow& r : tune::kLut)
      if (r.variant == c.variant) return r.ctas_per_sm;
    return c.variant >= 8 ? 1 : 2;
  }
  if (c.body == Body::kColumns) return c.variant;
  if (c.body != Body::kMma) return 1;
  const int tiles = c.token_tile / (c.precision == Precision::kInt8 ? 4 : 8);
  return tune::mma_ctas_per_sm(a.codebooks, tiles);
}

int owned_pairs(const Additive& a) {
  return a.codebooks == 1 ? a.units() : ceil_div(a.units(), 2);
}

// Blocks of kOwned of all parts, if about `blocks` share them, and the most rows of one, which are
// pieces of so many.
int owned_grid(const Additive& a, int blocks, int piece, int* rows) {
  int grid = 0, most = 0;
  for (int i = 0; i < a.parts; ++i) {
    const int own = tune::owned_blocks(a, i, piece, blocks);
    grid += own;
    if (own > 0) most = std::max(most, ceil_div(tune::owned_pieces(a, i, piece), own));
  }
  *rows = most * piece;
  return grid;
}

}  // namespace

cudaError_t device_info(int device, DeviceInfo* info) {
  static DeviceInfo cache[kMaxDevices];
  static std::atomic<bool> known[kMaxDevices];
  if (device < kMaxDevices && known[device].load(std::memory_order_acquire)) {
    *info = cache[device];
    return cudaSuccess;
  }
  int major = 0, minor = 0;
  DeviceInfo d = {};
  cudaError_t e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (e == cudaSuccess)
    e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (e == cudaSuccess)
    e = cudaDeviceGetAttribute(&d.sms, cudaDevAttrMultiProcessorCount, device);
  if (e == cudaSuccess)
    e = cudaDeviceGetAttribute(&d.max_smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (e != cudaSuccess) return e;
  d.arch = major * 10 + minor;
  if (device < kMaxDevices) {
    cache[device] = d;
    known[device].store(true, std::memory_order_release);
  }
  *info = d;
  return cudaSuccess;
}

LaunchConfig choose(const Additive& a, int tokens, DType dtype, Precision precision,
                    const DeviceInfo& device, bool image) {
  LaunchConfig c = {Body::kGather, dtype, precision, 0, 0, 1};
  const long long cells = code_units(a);
  const Storage storage = a.storage();
  if (dtype == DType::kFloat32 && storage != Storage::kRows) return c;
  if (!int8_fits(a)) {
    if (storage == Storage::kWordTiles && precision == Precision::kInt8) return c;
    c.precision = Precision::kExact;
  }
  const bool int8 = c.precision == Precision::kInt8;
  if (storage == Storage::kRows) {
    c.precision = Precision::kExact;
    if (tokens <= 8) c.token_tile = 8;
  } else if (storage == Storage::kWordTiles) {
    bool wgmma = device.arch == 90 && tokens >= tune::kSplitWgmmaFirst;
#ifdef AQLM_TUNE
    if (g_body >= 0) wgmma = g_body == 3;
    if (g_body == 2) return c;
#endif
    const int most = wgmma ? tune::split_wgmma_tokens(int8) : tune::kSplitTokens;
    const int room = device.max_smem - tune::kSplitStatic -
                     tune::split_table_bytes(device.arch, a.entries());
    if (tokens > most || room < 0) return c;
    c.body = wgmma ? Body::kSplitWgmma : Body::kSplit;
    c.token_tile = wgmma ? round_up_tile(tokens, 16, 4) : round_up_tile(tokens, int8 ? 4 : 8, 4);
    if (tokens == 1 && !wgmma && a.units() * tune::split_x_unit(int8) <= room) c.token_tile = 1;
  } else {
    const bool mma = a.in_group == 8 && (a.codebooks <= 2 || a.codebooks == 4);
    const int smem = tune::mma_smem(a.codebooks, 1);
    bool wide = a.in_group == 32 && a.codebooks == 8 && device.arch == 90 &&
                tokens >= tune::wide_first(cells) && tokens <= tune::wide_tokens(cells);
    bool lut = tokens <= (mma ? tune::kLutTokens : tune::kLutTokensOther);
    bool wgmma = mma && device.arch == 90 && tokens >= tune::kWgmmaFirst &&
                 tokens <= tune::wgmma_tokens(a.codebooks, cells);
    bool mma_sync = mma && device.max_smem >= smem &&
                    tokens < (device.arch == 90 ? tune::kWgmmaFirst : tune::kMmaTokens + 1);
    bool wgmma_int8 = mma && int8 && a.codebooks <= 2 && device.arch == 90 &&
                      tokens >= tune::kWgmmaInt8First && tokens <= tune::kWgmmaInt8Tokens;
    bool ring = mma && a.codebooks <= 2 && device.arch == 90 && !int8 && !image &&
                tokens >= tune::ring_first(a.codebooks, cells) && tokens <= tune::kRingTokens;
    int owned_rows = 0;
    const int owned_piece = tune::owned_piece(a, tokens, device.sms);
    owned_grid(a, device.sms, owned_piece, &owned_rows);
    const int pairs = owned_pairs(a);
    const bool owned_short = tune::owned_short(pairs, tokens, owned_rows);
    const bool owned_fits = mma && int8 && a.codebooks <= 2 && device.arch == 90 && !image &&
                            tokens <= tune::kOwnedTokens &&
                            a.in_features() <= tune::kOwnedColumns &&
                            tune::owned_smem(pairs, tokens, owned_rows) <= device.max_smem;
    bool owned = owned_fits && tune::owned_wins(a.codebooks, cells, tokens, owned_piece);
    const int long_tokens = tune::long_tokens(a.codebooks, cells);
    bool wgmma_long = mma && a.codebooks <= 2 && device.arch == 90 &&
                      tokens >= tune::kLongFirst && tokens <= long_tokens;
#ifdef AQLM_TUNE
    if (g_body >= 0) {
      owned = owned_fits && g_body == 11;
      wgmma_long = g_body == 9;
      lut = g_body == 0;
      wgmma_int8 = g_body == 7;
      ring = g_body == 10 && a.codebooks <= 2 && tokens <= tune::kRingTokens;
      wide = g_body == 8;
      wgmma = g_body == 3;
      mma_sync = g_body == 1 && tokens <= tune::kMmaTokens;
    }
    if (g_body == 2) return c;
#endif
    if (owned) {
      c.body = Body::kOwned;
      c.token_tile = round_up_tile(tokens, 2, 2);
      c.variant = owned_short ? 0 : owned_piece;
      if (owned_short) c.carveout = 100;  // for two blocks an SM
    } else if (wgmma_long) {
      c.body = Body::kWgmmaLong;
      c.precision = Precision::kExact;
      c.token_tile = 256;
      c.passes = (tokens + 256 - tune::kLongFirst) / 256;  // the rest is faster in other bodies
    } else if (wide) {
      c.body = Body::kWgmmaWide;
      c.precision = Precision::kExact;
      c.token_tile = round_up_tile(tokens, 32, 4);
    } else if (lut) {
      c.body = Body::kLut;
      c.precision = Precision::kExact;
      c.token_tile = 1;
      c.variant = device.max_smem < (227 << 10) ? 2
                  : a.in_group > 8              ? tune::kLutLongVectors
                                                : pick(tune::kLut, cells).variant;
      if (mma && tokens == 1 && device.arch == tune::kColumnsArch) {
        c.body = Body::kColumns;
        c.variant = tune::columns_variant(cells);
      }
    } else if (wgmma_int8) {
      c.body = Body::kWgmmaInt8;
      c.token_tile = round_up_tile(tokens, 8, 4);
    } else if (ring) {
      c.body = Body::kMmaRing;
      c.precision = Precision::kExact;
      c.token_tile = tune::kRingTokens;
    } else if (wgmma) {
      c.body = Body::kWgmma;
      c.precision = Precision::kExact;
      c.token_tile = round_up_tile(tokens, 16, 8);
      // A rest of up to 64 tokens is cheaper in a call of its own.
      const int most = std::max(1, tune::wgmma_tokens(a.codebooks, cells) / c.token_tile);
      if (tokens > c.token_tile) c.passes = std::min((tokens + 63) / c.token_tile, most);
#ifdef AQLM_TUNE
      if (g_occupancy == -1) c.passes = 1;
#endif
    } else if (mma_sync) {
      c.body = Body::kMma;
      c.token_tile = round_up_tile(tokens, int8 ? 4 : 8, a.codebooks == 4 ? 2 : 8);
      c.variant = pick(tune::kMma, cells).row_warps;
    }
  }
#ifdef AQLM_TUNE
  if (g_variant && c.body != Body::kGather) c.variant = g_variant;
#endif
  return c;
}

void make_schedule(const LaunchConfig& c, const DeviceInfo& device, MatmulParams* p) {
  Schedule& s = p->s;
  const Additive& a = p->a;
  s = {};
  if (c.body == Body::kGather) return;
  s.units = a.units();
  s.tiles = a.tile0(a.parts);
  s.classes = 1;
  s.lanes = 1;
  if (c.body == Body::kOwned) {
    s.ctas = device.sms;
    s.grid = owned_grid(a, s.ctas, c.variant == 64 ? 64 : 32, &s.group_rows);
    return;
  }
  if (c.body == Body::kLut) {
    s.group_rows = tune::lut_group_rows(c.variant);
  } else if (c.body == Body::kColumns) {
    s.group_rows = tune::kColumnRows;
    s.units = ceil_div(s.units, 4);  // steps of columns.cuh
  } else if (c.body == Body::kSplit) {
    s.group_rows = tune::kSplitRows;
  } else if (c.body == Body::kSplitWgmma) {
    s.group_rows = tune::kSplitWgmmaRows;
    s.units = ceil_div(s.units, tune::kSplitWgmmaCell);
    s.x_steps = s.units * tune::kSplitWgmmaCell;
  } else if (c.body == Body::kWgmmaWide) {
    s.group_rows = tune::wide_group_rows(c.token_tile);
    s.classes = 2;  // four codebooks each
    s.units /= 4;   // of four vectors
    s.x_steps = s.units;
  } else if (c.body == Body::kWgmmaInt8 || c.body == Body::kMmaRing) {
    s.group_rows = 512;
  } else if (c.body == Body::kWgmmaLong) {
    s.group_rows = tune::kLongGroupRows;
    s.x_steps = a.codebooks == 1 ? 2 * s.units : s.units;
  } else if (c.body == Body::kWgmma) {
    s.group_rows = tune::wgmma_group_rows(c.token_tile);
    s.x_steps = a.codebooks == 1 ? 2 * s.units : a.codebooks == 2 ? s.units : s.units / 2;
    if (a.codebooks == 4) s.units /= 2;  // two at a time
  } else {
    s.group_rows = c.variant * a.tile_rows();
    s.lanes = tune::mma_warps(a.codebooks) / c.variant;
  }
  const bool split = c.body == Body::kSplit || c.body == Body::kSplitWgmma;
  if (split)
    s.classes = c.precision == Precision::kInt8 ? a.in_group / 2 : a.in_group;
  while ((1 << s.group_shift) < s.group_rows) ++s.group_shift;
  while ((1 << s.tile_shift) < a.tile_rows()) ++s.tile_shift;
  for (int i = 0; i < a.parts; ++i) s.groups += ceil_div(a.rows_of(i), s.group_rows);
  s.passes = c.passes;
  s.slot_tokens = s.passes > 1 ? c.token_tile : p->tokens;
  const int items = s.groups * s.passes;
  const bool longer = c.body == Body::kWgmmaLong;
  const bool direct = longer || (c.body == Body::kWgmma && a.codebooks < 4);
  if (direct && (longer || items >= tune::kWholeWaves * device.sms))
    s.whole = items / device.sms * device.sms;
#ifdef AQLM_TUNE
  if (g_occupancy == -2) s.whole = 0;
  if (g_occupancy == -3 && direct) s.whole = items / device.sms * device.sms;
#endif
  s.cells = (items - s.whole) * s.units;
  const long long cells = std::max(1, s.cells);
  int per_sm = ctas_per_sm(c, a);
#ifdef AQLM_TUNE
  if (g_occupancy > 0) per_sm = g_occupancy;
#endif
  // A shorter K range per block would cost more in partial sums than it gains.
  const bool wide = c.body == Body::kWgmmaWide;  // its units are four times as long
  const bool mma = c.body == Body::kMma || c.body == Body::kWgmma ||
                   c.body == Body::kWgmmaLong || c.body == Body::kWgmmaInt8 ||
                   c.body == Body::kMmaRing;
  const int min_units = wide ? 2 : mma ? tune::mma_min_units(p->tokens) : 1;
  const long long most = std::max<long long>(1, cells / (s.lanes * min_units));
  const int wave = std::max(1, per_sm * device.sms / s.classes);
  s.ctas = static_cast<int>(std::min<long long>(most, wave));
  if (c.body == Body::kSplit) {  // no more blocks than the longest piece asks for
    const long long longest = (cells + s.ctas - 1) / s.ctas;
    s.ctas = static_cast<int>((cells + longest - 1) / longest);
  }
  // A wave and a bit would leave most SMs waiting for the few with one CTA more.
  if (s.ctas * s.classes > device.sms && s.classes == 1 && c.body != Body::kColumns)
    s.ctas -= s.ctas % device.sms;
  if (c.body == Body::kLut) {  // the staged activations of one K range must fit
    const int step_bytes = kStepVectors * a.in_group * 2;
    const int fit = std::max(1, (tune::kLutMaxX / step_bytes - 2) * a.codebooks / 2);
    s.ctas = static_cast<int>(std::max<long long>(s.ctas, (cells + fit - 1) / fit));
  }
  const long long limit = INT_MAX / cells - 1;  // the kernels' 32-bit cell arithmetic
  s.ctas = static_cast<int>(std::max<long long>(1, std::min<long long>(s.ctas, limit)));
  s.grid = s.whole > 0 ? device.sms : s.ctas;
  s.max_units = static_cast<int>(std::min<long long>(s.units, (cells + s.ctas - 1) / s.ctas));
  s.max_slots = (ceil_div(s.units, static_cast<int>(cells / s.ctas)) + 1) * s.classes * s.lanes;
}

Workspace workspace_of(const LaunchConfig& c, const MatmulParams& p) {
  Workspace w = {};
  const Schedule& s = p.s;
  if (c.body == Body::kGather || c.body == Body::kOwned) return w;
  const size_t slots = size_t(s.cells / s.units) * s.max_slots;
  w.partials = slots * s.slot_tokens * s.group_rows * sizeof(float);
  const bool int8 = c.precision == Precision::kInt8;
  const int tiles = c.token_tile / (int8 ? 4 : 8);
  if (c.body == Body::kSplit) w.x_fragments = size_t(s.classes) * s.units * tiles * 256;
  if (c.body == Body::kSplitWgmma) w.x_fragments = size_t(s.classes) * s.x_steps * tiles * 256;
  if (int8 && (c.body == Body::kMma || c.body == Body::kWgmmaInt8))
    w.x_fragments = size_t(ceil_div(p.a.in_groups, kStepVectors) + 1) * tiles * 256;
  if (c.body == Body::kWgmma || c.body == Body::kWgmmaLong)
    w.x_fragments = size_t(s.passes) * s.x_steps * c.token_tile * 64;
  if (c.body == Body::kWgmmaWide) w.x_fragments = size_t(s.x_steps) * c.token_tile * 256;
  if (int8) w.x_scales = size_t(c.token_tile) * sizeof(float);
  return w;
}

namespace {

template <typename T>
cudaError_t dispatch(const LaunchConfig& c, const MatmulParams& p, bool reduce,
                     cudaStream_t stream) {
  const bool int8 = c.precision == Precision::kInt8;
  if (c.body == Body::kGather) return launch_gather<T>(p, stream);
  if (c.body == Body::kOwned) return launch_owned<T>(c, p, stream);
  cudaError_t e = cudaSuccess;
  const bool split = c.body == Body::kSplit || c.body == Body::kSplitWgmma;
  if ((split || int8) && c.token_tile > 1 && p.x != nullptr) e = launch_fragments<T>(c, p, stream);
  if (e != cudaSuccess) return e;
  if (c.body == Body::kLut) e = launch_lut<T>(c, p, stream);
  else if (c.body == Body::kColumns) e = launch_columns<T>(c, p, stream);
  else if (c.body == Body::kSplit) e = launch_split<T>(c, p, stream);
  else if (c.body == Body::kSplitWgmma) e = launch_split_wgmma<T>(c, p, stream);
  else if (c.body == Body::kMmaRing) e = launch_mma_ring<T>(c, p, stream);
  else if (c.body == Body::kWgmma) e = launch_wgmma<T>(c, p, stream);
  else if (c.body == Body::kWgmmaLong) e = launch_wgmma_long<T>(c, p, stream);
  else if (c.body == Body::kWgmmaWide) e = launch_wgmma_wide<T>(c, p, stream);
  else if (c.body == Body::kWgmmaInt8) e = launch_wgmma_int8<T>(c, p, stream);
  else e = int8 ? launch_mma_int8<T>(c, p, stream) : launch_mma_exact<T>(c, p, stream);
  return e == cudaSuccess && p.s.cells > 0 && reduce ? launch_reduce<T>(p, stream) : e;
}

}  // namespace

int image_tokens(const LaunchConfig& c, const MatmulParams& p) {
  const int K = p.a.in_features(), vectors = 4 * (p.a.codebooks == 1 ? 2 : 1);  // of a unit
  if (c.body == Body::kWgmmaInt8) return K % (8 * vectors) == 0 ? c.token_tile : 0;
  return c.body == Body::kWgmma && p.s.passes == 1 && p.s.x_steps * 32 == K ? c.token_tile : 0;
}

cudaError_t launch_partials(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream) {
  cudaGetLastError();
  LaunchConfig beside = c;
  beside.carveout = carveout_beside(p.a, c.precision == Precision::kInt8);
  if (c.dtype == DType::kFloat16) return dispatch<__half>(beside, p, false, stream);
  if (c.dtype == DType::kBFloat16) return dispatch<__nv_bfloat16>(beside, p, false, stream);
  return cudaErrorInvalidValue;
}

cudaError_t launch_matmul(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream) {
  cudaGetLastError();
  cudaError_t e = cudaErrorInvalidValue;
  if (c.dtype == DType::kFloat16) e = dispatch<__half>(c, p, true, stream);
  if (c.dtype == DType::kBFloat16) e = dispatch<__nv_bfloat16>(c, p, true, stream);
  if (c.dtype == DType::kFloat32 && c.body == Body::kGather) e = launch_gather<float>(p, stream);
  return e;
}

}  // namespace aqlm

#ifdef AQLM_TUNE
// For benchmarks/ladder/cuda: forces variant, CTAs per SM (0: as tuned; of the wgmma body: -1 one
// pass a launch, -2 all items cut, -3 whole waves not cut), body (0 table, 1 mma, 2 dequantize,
// 3 wgmma, 7 wgmma_int8, 8 wgmma_wide, 9 wgmma_long, 10 mma_ring, 11 owned_int8, -1: as tuned) and
// dependent launch of every later call.
extern "C" __attribute__((visibility("default"))) void aqlm_cuda_override(int variant,
                                                                          int occupancy, int body,
                                                                          int dependent) {
  aqlm::g_variant = variant;
  aqlm::g_occupancy = occupancy;
  aqlm::g_body = body;
  aqlm::dependent_launch = dependent != 0;
}
#endif
