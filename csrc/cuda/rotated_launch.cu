// Host side of the rotated and scalar kernels: schedule, workspace, dispatch; rotation and packing.
#include <algorithm>
#include <cmath>

#include "enqueue.cuh"
#include "hadamard_many.h"
#include "hadamard_mix.cuh"
#include "hadamard_spread.cuh"
#include "mix_rows.h"
#include "rotated_bodies.h"
#include "rotated_prepare.cuh"
#include "rotated_tune.h"

namespace aqlm {
namespace {

#ifdef AQLM_TUNE
int g_rotated_cluster = 0, g_rotated_ctas = 0, g_rotated_body = 0;
int g_rotated_local = -1, g_rotated_share = -1, g_rotated_many = -1;
#endif

int log2_of(int n) {
  int bits = 0;
  while (1 << (bits + 1) <= n) ++bits;
  return bits;
}

// Blocks of a cluster that share one vector of F * 2^p elements: few tokens want the latency of
// many blocks, many tokens the throughput of one (H200: docs/notes/cuda_rotated.md).
int cluster_of(const Rotation& r, int tokens, const DeviceInfo& device) {
  if (device.arch < 90) return 1;
  int c = 1;
  while (c < 8 && r.n > c * 2048 && 2 * c * tokens <= device.sms) c *= 2;
  while (c < 8 && r.n / c * 8 > device.max_smem) c *= 2;
#ifdef AQLM_TUNE
  if (g_rotated_cluster > 0) c = g_rotated_cluster;
#endif
  while (c > 1 && r.n / r.factor / c < 4) c /= 2;  // four neighbours stay in one block
  return c;
}

template <int C>
cudaError_t rotate_cluster(const RotateParams& p, int max_smem, cudaStream_t stream) {
  static std::atomic<unsigned long long> done{0};
  const int length = p.r.n / C;
  const int smem = length * static_cast<int>(sizeof(float)) * (C > 1 && p.r.factor > 1 ? 2 : 1);
  if (smem > max_smem) return cudaErrorInvalidConfiguration;
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = allow_smem(rotate_kernel<C>, &done, device, max_smem);
  if (e != cudaSuccess) return e;
  const int log_p = log2_of(p.r.n / p.r.factor / C);
  const int threads = std::max(128, std::min(kRotateThreads, (length / 4 + 31) / 32 * 32));
  return enqueue_clusters(C, rotate_kernel<C>, dim3(C, p.tokens), threads, smem, stream, p, log_p);
}

// Whether the kernel for many tokens takes a rotation of rows of x, and is faster.
bool many_tokens(const RotateParams& p, const DeviceInfo& device) {
#ifdef AQLM_TUNE
  if (g_rotated_many >= 0) return p.tokens >= g_rotated_many && takes_many(p, device);
#endif
  return tune::rotates_many(p.r, p.tokens) && takes_many(p, device);
}

// Elements of one block of the spread rotation.
int spread_elements(int log_l) { return std::max(128, 1 << log_l); }

// Sylvester bits that stay in one block of the spread rotation; 0: the cluster kernel. Every block
// reads all of a token (H200: docs/notes/cuda_rotated.md).
int spread_bits_of(const Rotation& r, int tokens, const DeviceInfo& device) {
  const int bits = log2_of(r.n / r.factor);
  auto megabytes = [&](int local) {
    return 1e-6 * r.n / spread_elements(local) * tokens * r.n * 2;
  };
  int local = std::min(bits, 9);
#ifdef AQLM_TUNE
  if (g_rotated_cluster > 0) return 0;
#endif
  return local >= 6 && r.n % 128 == 0 && megabytes(local) <= tune::kSpreadMegabytes ? local : 0;
}

cudaError_t rotate_spread(const RotateParams& p, int log_l, cudaStream_t stream) {
  const int log_c = log2_of(p.r.n / p.r.factor) - log_l, rows = p.r.factor << log_c;
  const int elements = spread_elements(log_l), lanes = elements / 4;
  int splits = 1;
  while (splits * kSpreadLoads < rows && 2 * splits * lanes <= kSpreadThreads) splits *= 2;
  const int threads = splits * lanes;
  const auto kernel = spreads_plain(p, rows, splits) ? rotate_spread_kernel<true>
                                                     : rotate_spread_kernel<false>;
  return enqueue(kernel, dim3(p.r.n / elements, p.tokens), threads, threads * 16, stream, p, log_l,
                 log_c, splits);
}

// Elements and bytes of shared memory of a block of the mixing kernel.
int mix_length(const Rotation& r, int local_bits) { return (r.n >> local_bits) * kMixColumns; }
int mix_smem(const Rotation& r, int local_bits) {
  const int F = r.factor;
  return mix_length(r, local_bits) * 4 * (F > 1 ? 2 : 1) +
         (F > 1 && F <= kMixMaxFactor ? F * F : 0);
}

template <int kSlots>
cudaError_t rotate_mix(const RotateParams& p, int max_smem, cudaStream_t stream) {
  const int log_q = log2_of(p.r.n / p.r.factor) - p.local_bits;
  const int length = mix_length(p.r, p.local_bits), smem = mix_smem(p.r, p.local_bits);
  const int threads = std::max(64, std::min(kMixThreads, (length / 4 + 31) / 32 * 32));
  const dim3 grid((1 << p.local_bits) / kMixColumns, p.tokens);
  const auto kernel = rotate_mix_kernel<kSlots>;
  static std::atomic<unsigned long long> done{0};
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = allow_smem(kernel, &done, device, max_smem);
  return e == cudaSuccess ? enqueue(kernel, grid, threads, smem, stream, p, log_q) : e;
}

template <int kBits>
cudaError_t e8p_matmul(const RotatedConfig& c, const RotatedMatmul& p, cudaStream_t stream) {
  return RotatedBodies<Coding::kE8p, kBits>::matmul(c, p, stream);
}
template <int kBits>
cudaError_t scalar_matmul(const RotatedConfig& c, const RotatedMatmul& p, cudaStream_t stream) {
  return RotatedBodies<Coding::kScalar, kBits>::matmul(c, p, stream);
}

// Whether rotated_resident.cuh takes 5 .. 16 tokens and its blocks quantize their range of x.
bool resident_stages(const RotatedWeight& w, DType x_type, int tokens, const DeviceInfo& device) {
  if (tokens > 16 || x_type == DType::kFloat32 || !tune::rotated_resident(w.coding, w.bits, 4))
    return false;
  RotatedConfig c = {};
  c.tiles = 4;
  c.wgmma = true;
  c.share = Share::kLocal;
  RotatedMatmul p = {};
  p.w = w;
  p.tokens = tokens;
  schedule_rotated(c, device, &p);
  return 2 * tune::local_cells(p.s) <= tune::kResidentOwnCells;
}

// Whether blocks have room for their range of x of more than four tokens.
bool stages_itself(RotatedConfig c, const RotatedWeight& w, int tokens, const DeviceInfo& device) {
  if (c.grouped || c.tiles > tune::rotated_local_tiles(w.coding, w.bits)) return false;
  c.share = Share::kLocal;
  RotatedMatmul p = {};
  p.w = w;
  p.tokens = tokens;
  schedule_rotated(c, device, &p);
  int most = c.tiles == 4 ? tune::kLocalCells : 1 << 20;
  if (device.arch == 90 && tune::rotated_resident(w.coding, w.bits, c.tiles))
    most = tune::kResidentLeastCells - 1;
#ifdef AQLM_TUNE
  if (g_rotated_share == 1) most = 1 << 20;
#endif
  return tune::local_cells(p.s) <= most &&
         tune::rotated_tables(w.coding, w.bits) +
                 tune::staged_bytes(p.s, tokens, c.tiles, c.share, p.s.group_rows / kCellRows) <=
             device.max_smem;
}

int grid_of(size_t items) { return static_cast<int>((items + 255) / 256); }

}  // namespace

RotatedConfig choose_rotated(const RotatedWeight& w, DType x_type, int tokens, bool rotates,
                             const DeviceInfo& device) {
  RotatedConfig c = {};
  c.grouped = w.coding == Coding::kScalar && w.group < w.K;
  // Scale groups end with a cell, and the integers of a group must fit in int32.
  if (c.grouped && w.group % kCellColumns != 0) return c;
  if (w.K > (1 << 16)) return c;
  // Tables and the ring of activations: the 3-bit tables do not fit in 99 KB.
  const int least =
      tune::rotated_tables(w.coding, w.bits) + tune::staged_bytes({}, 1, 2, Share::kRing, 0);
  if (least > device.max_smem) return c;
  const bool hopper = device.arch == 90 && (!c.grouped || tune::rotated_group_scales(w));
  c.half = hopper && c.grouped && tune::rotated_half(w, x_type, tokens);
#ifdef AQLM_TUNE
  if (g_rotated_body > 0) c.half = false;
#endif
  const int most = c.half ? 16 : tune::rotated_max_tiles(w.coding, w.bits, c.grouped, hopper);
  const int planes = tune::rotated_planes(w.coding, w.bits);
  const int passes = c.half ? tune::kHalfPasses
                            : tune::rotated_passes(hopper, c.grouped, planes);
  if (tokens > most * passes) {
    c.half = false;
    return c;
  }
  c.tiles = 1;
  while (c.tiles < most && c.tiles * 4 < tokens) c.tiles *= 2;
  const bool own = hopper && tokens > 4 && resident_stages(w, x_type, tokens, device);
  if (own) c.tiles = 4;
  c.share = c.tiles == 1 || own || stages_itself(c, w, tokens, device) ? Share::kLocal
                                                                       : Share::kRing;
  if (c.tiles == 1 && !c.grouped && x_type != DType::kFloat32 &&
      tune::rotated_owned(w, tokens, rotates, device))
    c.share = Share::kOwned;
#ifdef AQLM_TUNE
  if (g_rotated_share == 0) c.share = c.tiles == 1 ? Share::kLocal : Share::kRing;
#endif
  c.wgmma = hopper && (own || c.share == Share::kRing) && !c.half;
  c.wide = tokens == 1 && c.share == Share::kLocal && tune::rotated_wide(w) &&
           static_cast<long long>(w.blocks()) * w.units() >= tune::kWideCells * device.sms;
#ifdef AQLM_TUNE
  if (g_rotated_body == 1) {
    c.wgmma = false;
    c.tiles = std::min(c.tiles, tune::rotated_max_tiles(w.coding, w.bits, c.grouped, false));
  }
#endif
  if (c.half) c.tiles = std::max(c.tiles, 8);  // 16 columns decode no faster than 32
  if (c.wgmma) c.tiles = std::max(c.tiles, 4);  // the narrowest of wgmma_ptx.cuh
  return c;
}

void schedule_rotated(const RotatedConfig& c, const DeviceInfo& device, RotatedMatmul* p) {
  RotatedSchedule& s = p->s;
  s = {};
  const bool resident = c.wgmma && tune::rotated_resident(p->w.coding, p->w.bits, c.tiles);
  const bool pairs =
      c.wgmma && tune::rotated_pairs(p->w.coding, p->w.bits, c.tiles, c.grouped);
  const int warps = c.half    ? tune::rotated_half_warps(c.tiles)
                   : resident ? tune::kResidentWarps
                   : pairs    ? tune::kPairWarps / 2
                   : c.wgmma ? tune::rotated_wg_warps(p->w.coding, p->w.bits, c.tiles, c.grouped)
                   : c.wide ? tune::kWideWarps
                            : tune::rotated_warps(p->w.coding, p->w.bits, c.tiles, c.grouped,
                                                  c.share);
  if (c.share == Share::kOwned) {
    s = {p->w.blocks(), kCellRows, p->w.units(), p->w.blocks(), 1, 1};
    return;
  }
  s.group_rows = warps * kCellRows;
  s.groups = (p->w.N + s.group_rows - 1) / s.group_rows;
  s.cells = c.half     ? tune::rotated_half_cells(p->w)
            : resident ? 2
            : pairs    ? tune::kPairCells
            : c.wgmma ? tune::rotated_wg_cells(p->w, c.tiles, c.grouped)
                      : 1;
  s.units = (p->w.units() + s.cells - 1) / s.cells;
  const long long cells = static_cast<long long>(s.groups) * s.units;
  int ctas = device.sms;
#ifdef AQLM_TUNE
  if (g_rotated_ctas > 0) ctas = g_rotated_ctas;
#endif
  s.ctas = static_cast<int>(
      std::max<long long>(1, std::min<long long>(ctas, cells * s.cells / tune::kRotatedMinCells)));
  const int most_x = std::min(tune::kRotatedMaxX,
                              device.max_smem - tune::rotated_tables(p->w.coding, p->w.bits));
  const int staged = p->tokens == 1 ? 1 : 4;
  if (c.tiles == 1)  // what a CTA stages must fit
    while (tune::staged_bytes(s, staged, 1, c.share, warps) > most_x && s.ctas < cells)
      s.ctas = static_cast<int>(std::min<long long>(cells, s.ctas * 2ll));
  auto steps = [&] { return static_cast<int>((cells + s.ctas - 1) / s.ctas); };  // of a block
  if (resident)  // no step of a row twice, and room for x
    while (steps() > s.units || tune::rotated_resident_smem(steps(), p->tokens, false) >
                                    device.max_smem)
      s.ctas = static_cast<int>(std::min<long long>(cells, s.ctas * 2ll));
  s.max_slots = static_cast<int>(s.units / (cells / s.ctas)) + 2;
}

int local_bits_of(const RotatedConfig& c, const RotatedSchedule& s, const Rotation& r,
                  const DeviceInfo& device) {
  if (r.factor == 0 || r.block != 0 || (c.grouped && c.tiles == 1)) return 0;
  const int bits = log2_of(r.n / r.factor);
  if (bits < 5) return 0;  // rows of one warp
  int local = 5;
  if (c.share == Share::kLocal || (c.wgmma && tune::rotated_exchanges(c.tiles)))
    while (local < bits && s.group_rows % (2 << local) == 0) ++local;
#ifdef AQLM_TUNE
  if (g_rotated_local >= 0) local = std::min(local, g_rotated_local);
#endif
  return mix_smem(r, local) <= device.max_smem ? local : 0;
}

RotatedWorkspace workspace_rotated(const RotatedConfig& c, const RotatedMatmul& p) {
  RotatedWorkspace w = {};
  w.partials = size_t(p.s.groups) * p.s.max_slots * p.tokens * p.s.group_rows * sizeof(float);
  if (c.share == Share::kRing) {
    const int planes = c.wgmma ? tune::rotated_planes(p.w.coding, p.w.bits) : 1;
    w.x_cells = size_t(p.s.units) * p.s.cells * c.tiles * 512 * planes;
    w.x_sums = size_t(p.s.units) * p.s.cells * (c.wgmma ? 4 * c.tiles : p.tokens) * sizeof(float2);
    w.x_scales = p.tokens * sizeof(float);
  }
  return w;
}

cudaError_t launch_rotated(const RotatedConfig& c, const RotatedMatmul& p, cudaStream_t stream) {
  cudaGetLastError();
  if (p.w.coding == Coding::kE8p) {
    if (p.w.bits == 2) return e8p_matmul<2>(c, p, stream);
    return p.w.bits == 3 ? e8p_matmul<3>(c, p, stream) : e8p_matmul<4>(c, p, stream);
  }
  if (p.w.bits == 2) return scalar_matmul<2>(c, p, stream);
  if (p.w.bits == 3) return scalar_matmul<3>(c, p, stream);
  return p.w.bits == 4 ? scalar_matmul<4>(c, p, stream) : scalar_matmul<8>(c, p, stream);
}

cudaError_t launch_rotated_dequant(const RotatedDequant& p, cudaStream_t stream) {
  cudaGetLastError();
  if (p.row1 <= p.row0 || p.col1 <= p.col0) return cudaSuccess;
  if (p.w.coding == Coding::kE8p) {
    if (p.w.bits == 2) return RotatedBodies<Coding::kE8p, 2>::dequant(p, stream);
    if (p.w.bits == 3) return RotatedBodies<Coding::kE8p, 3>::dequant(p, stream);
    return RotatedBodies<Coding::kE8p, 4>::dequant(p, stream);
  }
  if (p.w.bits == 2) return RotatedBodies<Coding::kScalar, 2>::dequant(p, stream);
  if (p.w.bits == 3) return RotatedBodies<Coding::kScalar, 3>::dequant(p, stream);
  if (p.w.bits == 4) return RotatedBodies<Coding::kScalar, 4>::dequant(p, stream);
  return RotatedBodies<Coding::kScalar, 8>::dequant(p, stream);
}

cudaError_t launch_rotate(const RotateParams& params, cudaStream_t stream) {
  cudaGetLastError();
  RotateParams p = params;
  if (p.tokens == 0 || p.r.n == 0) return cudaSuccess;
  int device = 0;
  DeviceInfo info;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = device_info(device, &info);
  if (e != cudaSuccess) return e;
  constexpr int kMaxRows = 65535;  // of a grid's y
  for (int m = 0; m < params.tokens; m += kMaxRows) {
    p.tokens = std::min(kMaxRows, params.tokens - m);
    if (m > 0) {
      const size_t in = p.x_type == DType::kFloat32 ? 4 : 2;
      const size_t out = p.y_type == DType::kFloat32 ? 4 : 2;
      p.x = static_cast<const char*>(p.x) + kMaxRows * p.x_stride * in;
      p.y = static_cast<char*>(p.y) + size_t(kMaxRows) * p.r.n * out;
    }
    if (p.r.factor == 0 || p.r.block) {
      p.gain = params.gain * (p.r.block ? 1.f / std::sqrt(static_cast<float>(p.r.block)) : 1.f);
      const bool few = p.tokens <= kFewTokens;
      const int threads = few ? 64 : kFlatThreads;  // few tokens: more SMs
      const bool several = p.partials != nullptr && p.tokens > 16;
      const int each = several ? kSumTokens : 1;
      const dim3 grid((p.r.n + 4 * threads - 1) / (4 * threads), (p.tokens + each - 1) / each);
      const auto kernel = several ? rotate_sums_kernel
                          : few   ? rotate_flat_kernel<kFewSlots>
                                  : rotate_flat_kernel<kManySlots>;
      e = enqueue(kernel, grid, threads, 0, stream, p);
    } else {
      p.gain = params.gain / std::sqrt(static_cast<float>(p.r.n));
      if (p.partials != nullptr && p.local_bits > 0) {
        e = takes_mix_rows(p)        ? launch_mix_rows(p, stream)
            : p.tokens <= kFewTokens ? rotate_mix<kFewSlots>(p, info.max_smem, stream)
                                     : rotate_mix<kManySlots>(p, info.max_smem, stream);
      } else if (many_tokens(p, info)) {
        e = launch_rotate_many(p, info, stream);
      } else if (const int bits = p.partials == nullptr ? spread_bits_of(p.r, p.tokens, info) : 0) {
        e = rotate_spread(p, bits, stream);
      } else switch (cluster_of(p.r, p.tokens, info)) {
        case 1: e = rotate_cluster<1>(p, info.max_smem, stream); break;
        case 2: e = rotate_cluster<2>(p, info.max_smem, stream); break;
        case 4: e = rotate_cluster<4>(p, info.max_smem, stream); break;
        default: e = rotate_cluster<8>(p, info.max_smem, stream);
      }
    }
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

cudaError_t launch_rotated_pack(const RotatedWeight& w, const void* codes, uint8_t* packed,
                                cudaStream_t stream) {
  const cudaError_t e = cudaMemsetAsync(packed, 0, w.bytes(), stream);
  if (e != cudaSuccess || w.bytes() == 0) return e;
  if (w.coding == Coding::kE8p)
    e8p_pack_kernel<<<grid_of(size_t(w.N) * w.K / 8), 256, 0, stream>>>(
        w, static_cast<const uint64_t*>(codes), packed);
  else
    scalar_pack_kernel<<<grid_of(size_t(w.blocks()) * w.units() * 32), 256, 0, stream>>>(
        w, static_cast<const uint8_t*>(codes), packed);
  return cudaGetLastError();
}

cudaError_t launch_rotated_unpack(const RotatedWeight& w, void* codes, cudaStream_t stream) {
  if (w.bytes() == 0) return cudaSuccess;
  if (w.coding == Coding::kE8p)
    e8p_unpack_kernel<<<grid_of(size_t(w.N) * (w.K / 64) * w.bits), 256, 0, stream>>>(
        w, static_cast<uint64_t*>(codes));
  else
    scalar_unpack_kernel<<<grid_of(size_t(w.N) * w.K / 8 * w.bits), 256, 0, stream>>>(
        w, static_cast<uint8_t*>(codes));
  return cudaGetLastError();
}

}  // namespace aqlm

#ifdef AQLM_TUNE
// For benchmarks/ladder/cuda: blocks per cluster of a rotation, CTAs of a matmul (0: as tuned),
// body (1: never warpgroup MMAs, 2: not those in float16), dependent launch.
extern "C" __attribute__((visibility("default"))) void aqlm_rotated_override(int cluster, int ctas,
                                                                             int body,
                                                                             int dependent) {
  aqlm::g_rotated_body = body;
  aqlm::dependent_launch = dependent != 0;
  aqlm::g_rotated_cluster = cluster;
  aqlm::g_rotated_ctas = ctas;
}
// How blocks share the work: 0 no owned rows and no local x of more than four tokens, 1 local x
// wherever it fits.
extern "C" __attribute__((visibility("default"))) void aqlm_rotated_share(int share) {
  aqlm::g_rotated_share = share;
}
// Tokens from which on the kernel for many tokens rotates (-1: as tuned).
extern "C" __attribute__((visibility("default"))) void aqlm_rotated_many(int least) {
  aqlm::g_rotated_many = least;
}
// Most Sylvester bits of the output rotation that a matmul does (-1: as tuned).
extern "C" __attribute__((visibility("default"))) void aqlm_rotated_local_bits(int most) {
  aqlm::g_rotated_local = most;
}
#endif
