// Look-up-table driver (codes of up to 8 bits).
//
// Passes over the tokens. Within a pass the lookups are cut into a fixed number of segments with
// sums of their own, added up in order at the end: the result does not depend on which thread did
// which. A thread builds the tables of its segments for itself, in tiles that fit its L2 cache.
// (Sharing tables was slower: at 4096 x 4096 fetching half of 512 KB from the other core's cache
// cost as much as building it, and token tables needed 128 barriers a call.)
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "forms.h"
#include "matmul.h"
#include "threads.h"

namespace aqlm::cpu {
namespace {

// So few rows take float tables: quantizing would cost as much as it saves, and a handful of
// outputs leaves no norm to measure its error against.
constexpr int64_t kFloatUnits = 1;

constexpr int64_t kSegments = 4;
constexpr int64_t kTileBytes = 256 << 10;  // tables of one tile, within a 1 MB L2 cache
// With tokens as the vector dimension the sums want L2 more than the tables do: two chunks of 4
// byte-code lookups.
constexpr int64_t kTokenTileBytes = 72 << 10;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The chunks of a pass: segments, each cut into equal tiles.
struct Tiling {
  int64_t chunks, segments, per_tile, chunk_bytes;

  Tiling(const LutKernel& kernel, const LutArgs& args) {
    chunks = ceil_div(args.shape.lookups(), kernel.chunk);
    segments = std::min(kSegments, chunks);
    chunk_bytes = kernel.chunk_bytes(args);
    const int64_t most = kernel.token_lanes ? kTokenTileBytes : kTileBytes;
    const int64_t fit = std::max<int64_t>(1, most / chunk_bytes);
    const int64_t longest = ceil_div(chunks, segments);
    per_tile = ceil_div(longest, ceil_div(longest, fit));
  }
  int64_t first_chunk(int64_t segment) const { return chunks * segment / segments; }
};

// Buffers of one call, sized for whichever kernel a pass ends up with.
struct Buffers {
  float* x;
  float* x_lanes;  // [K][lanes]
  std::byte* tables;  // one tile a thread
  int64_t tile_bytes;
  float* sums;  // [segment][unit]
  float* scratch;
};

LutArgs pass_args(const MatmulCall& call, const LutKernel& kernel, int tokens) {
  LutArgs args{};
  args.shape = call.scheme.packed();
  args.packed = call.packed;
  args.ig = call.scheme.in_group_size;
  args.entries = kernel.token_lanes ? int64_t(1) << call.scheme.nbits : Forms::entries(call.scheme);
  args.tokens = tokens;
  return args;
}

int64_t scratch_size(const LutArgs& args, const LutKernel& kernel) {
  return kernel.chunk * args.entries;
}

// Quantized tables need a range: activations and codebooks finite, their products far from the
// ends of float32. Anything else takes float tables, which propagate NaN and infinities.
bool quantizable(const KernelTable& table, Forms& forms, const float* x, int64_t count,
                 int64_t K) {
  const uint32_t bits = table.max_abs_bits(x, count);
  float x_max;
  std::memcpy(&x_max, &bits, 4);  // infinity or NaN if anything is not finite
  const float c_max = forms.magnitude();
  if (x_max == 0 || c_max == 0) return x_max < 1e30f && c_max < 1e30f;
  const float product = x_max * c_max;
  return x_max < 1e30f && c_max < 1e30f && product > 1e-20f && product * float(K) < 1e30f;
}

// Adds segment `s` to the sums of units [u0, u1), tile by tile.
void run_segment(const LutKernel& kernel, const LutArgs& args, const Tiling& tiling, int64_t s,
                 int64_t u0, int64_t u1, std::byte* tables, float* scratch, float* sums) {
  const int64_t last = tiling.first_chunk(s + 1);
  for (int64_t c0 = tiling.first_chunk(s); c0 < last; c0 += tiling.per_tile) {
    const int64_t c1 = std::min(c0 + tiling.per_tile, last);
    for (int64_t c = c0; c < c1; ++c) {
      kernel.build(args, c, tables + (c - c0) * tiling.chunk_bytes, scratch);
    }
    kernel.accumulate(args, u0, u1, c0, c1, tables, sums);
  }
}

void run_pass(const MatmulCall& call, const KernelTable& table, const LutKernel& kernel,
              const LutArgs& args, const float* constants, const Buffers& buffers, int64_t a,
              int64_t m0) {
  const Tiling tiling(kernel, args);
  const int64_t units = args.shape.units(), segments = tiling.segments;
  const int64_t unit_sums = kUnitRows * (kernel.token_lanes ? kernel.tokens : args.tokens);
  const FinishArgs finish = finish_args(call, a);
  const int most = int(std::min<int64_t>(call.num_threads, units * segments));
  on_threads(most, [&](int thread, int threads) {
    std::byte* tables = buffers.tables + thread * buffers.tile_bytes;
    float* scratch = buffers.scratch + thread * scratch_size(args, kernel);
    // Items (segment, share of the rows), as few shares as give every thread as many items.
    const int64_t shares = threads / std::gcd(int64_t(threads), segments);
    const int64_t items = segments * shares;
    for (int64_t i = items * thread / threads; i < items * (thread + 1) / threads; ++i) {
      const int64_t s = i / shares, share = i % shares;
      const int64_t u0 = units * share / shares, u1 = units * (share + 1) / shares;
      float* sums = buffers.sums + (s * units + u0) * unit_sums;
      std::memset(sums, 0, size_t((u1 - u0) * unit_sums) * sizeof(float));
      if (u0 < u1) run_segment(kernel, args, tiling, s, u0, u1, tables, scratch, sums);
    }
    thread_barrier(threads);
    for (int64_t u = units * thread / threads; u < units * (thread + 1) / threads; ++u) {
      float* sums = buffers.sums + u * unit_sums;
      for (int64_t s = 1; s < segments; ++s) {
        const float* others = sums + s * units * unit_sums;
        for (int64_t i = 0; i < unit_sums; ++i) sums[i] += others[i];
      }
      float rows[kUnitRows];
      const int64_t count = std::min(kUnitRows, args.shape.out_groups - u * kUnitRows);
      for (int m = 0; m < args.tokens; ++m) {
        kernel.collect(args, sums, m, rows);
        for (float& value : rows) value += constants[m];
        table.finish(finish, rows, u * kUnitRows, count, y_row(call, m0 + m));
      }
    }
  });
}

Buffers take_buffers(Workspace& workspace, int64_t tokens, const MatmulCall& call, int64_t lanes,
                     int64_t tile_bytes, int64_t sums, int64_t scratch) {
  Buffers buffers;
  buffers.x = workspace.take<float>(tokens * call.scheme.K);
  buffers.x_lanes = workspace.take<float>(lanes * call.scheme.K);
  buffers.tile_bytes = Workspace::padded(tile_bytes);
  buffers.tables = workspace.take<std::byte>(call.num_threads * buffers.tile_bytes);
  buffers.sums = workspace.take<float>(sums);
  buffers.scratch = workspace.take<float>(scratch);
  return buffers;
}

}  // namespace

void matmul_lut(const MatmulCall& call, const KernelTable& table) {
  const Scheme& s = call.scheme;
  const bool fast = call.precision == Precision::fast;
  const LutKernel& quantized = fast ? table.lut_fast : table.lut_exact;
  const int64_t few = fast ? table.fast_max_tokens : table.exact_max_tokens;
  // The tokens of the pass that begins with `left` tokens to go.
  const auto pass_of = [&](int64_t left) {
    return std::min<int64_t>(left, left <= few ? quantized.tokens : table.lut_many.tokens);
  };
  const int64_t pass =
      std::min<int64_t>(call.M, std::max(quantized.tokens, table.lut_many.tokens));

  // A tile is within its limit unless one chunk is larger; fewer tokens may well fill it better.
  int64_t tile_bytes = kTileBytes, scratch = 0;
  for (const LutKernel* kernel :
       {&quantized, &table.lut_float, &table.lut_tokens, &table.lut_many}) {
    const LutArgs args = pass_args(call, *kernel, int(std::min<int64_t>(pass, kernel->tokens)));
    tile_bytes = std::max(tile_bytes, kernel->chunk_bytes(args));
    scratch = std::max(scratch, scratch_size(args, *kernel) * call.num_threads);
  }
  const int64_t lanes = table.lut_tokens.tokens;
  const int64_t sums =
      kSegments * s.packed().units() * kUnitRows * (pass > 1 ? lanes : 1);
  Workspace workspace(Forms::workspace_bytes(s) + Workspace::padded(pass * s.K * 4) +
                      Workspace::padded(lanes * s.K * 4) +
                      call.num_threads * Workspace::padded(tile_bytes) +
                      Workspace::padded(sums * 4) + Workspace::padded(scratch * 4));
  Forms forms(s, call.codebooks, call.param_dtype, call.prepared, table, workspace);
  const Buffers buffers = take_buffers(workspace, pass, call, lanes, tile_bytes, sums, scratch);

  for (int64_t a = 0; a < s.out_group_size; ++a) {
    forms.select(a);
    int tokens = 0;
    for (int64_t m0 = 0; m0 < call.M; m0 += tokens) {
      tokens = int(pass_of(call.M - m0));
      for (int m = 0; m < tokens; ++m) {
        table.to_float(x_row(call, m0 + m), call.x_dtype, s.K, buffers.x + m * s.K);
      }
      const LutKernel* kernel = call.M - m0 <= few ? &quantized : &table.lut_many;
      if (kernel->centred && (s.packed().units() <= kFloatUnits ||
                              !quantizable(table, forms, buffers.x, tokens * s.K, s.K))) {
        kernel = &table.lut_tokens;
      }
      if (kernel->token_lanes && tokens == 1) kernel = &table.lut_float;
      LutArgs args = pass_args(call, *kernel, tokens);
      args.codebook = kernel->token_lanes ? forms.by_vector(kernel->centred)
                                          : forms.by_entry(kernel->centred);
      args.x = buffers.x;
      if (kernel->token_lanes) {
        if (kernel->centred) args.norms = forms.norms();
        lanes_of(buffers.x, tokens, s.K, buffers.x_lanes);
        args.x = buffers.x_lanes;
      }
      std::vector<float> constants(size_t(tokens), 0.0f);
      if (kernel->centred) {
        for (int m = 0; m < tokens; ++m) constants[size_t(m)] = forms.removed(buffers.x + m * s.K);
      }
      run_pass(call, table, *kernel, args, constants.data(), buffers, a, m0);
    }
  }
}

}  // namespace aqlm::cpu
