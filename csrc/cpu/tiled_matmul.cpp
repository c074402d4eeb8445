// Driver of products with tiles.
//
// Passes of up to 64 tokens. Threads first share out the pieces of x and quantize them, then the
// units of 64 rows: a thread decodes a tile (8 KB, in L1) and multiplies all tokens of the pass
// with it. Every sum has one order, whatever the number of threads.
#include <algorithm>
#include <cstring>

#include "../common/check.h"
#include "dispatch.h"
#include "memory.h"
#include "threads.h"
#include "tiled.h"

namespace aqlm::cpu {
namespace {

constexpr int64_t kPassTokens = 64;
constexpr int64_t kUnitsACall = 8;  // of E8P without tiles: x is broadcast once for all of them

// Pieces of one tile: [first[t], first[t + 1]).
std::vector<int64_t> tile_starts(const TiledWeight& weight) {
  std::vector<int64_t> first;
  const auto& pieces = weight.pieces();
  for (int64_t p = 0; p < int64_t(pieces.size()); ++p) {
    if (pieces[size_t(p)].k0 % kTileCols == 0) first.push_back(p);
  }
  first.push_back(int64_t(pieces.size()));
  return first;
}

const uint8_t* codes_at(const TileStream& stream, const uint8_t* packed, int64_t unit, int64_t t) {
  return packed + stream.offset + unit * stream.unit_bytes + t * stream.tile_bytes;
}

void decode_tile(const TileKernels& kernels, const TiledWeight& weight, const TileStream& stream,
                 const uint8_t* packed, int64_t unit, int64_t t, uint8_t* tile) {
  const uint8_t* codes = codes_at(stream, packed, unit, t);
  const int64_t columns = std::min(kTileCols, weight.K() - t * kTileCols);
  if (stream.code == TileStream::Code::e8p) {
    kernels.decode_e8p(e8p_tables(), codes, columns / 32, tile);
  } else if (stream.code == TileStream::Code::residual) {
    kernels.decode_residual(e8p_tables(), codes, columns / 32, tile);
  } else {
    kernels.decode_bits(codes, weight.bits(), (columns + 31) / 32, tile);
  }
}

// Scales and zeros of one unit, [group][64].
struct UnitValues {
  float *scales, *zeros;
  float* rows;  // scratch, [64][groups]

  static int64_t floats(const TiledWeight& weight) {
    return weight.grouped() ? 3 * kTileRows * weight.groups() : 0;
  }
  UnitValues(const TiledWeight& weight, float* floats)
      : scales(floats),
        zeros(scales + kTileRows * weight.groups()),
        rows(zeros + kTileRows * weight.groups()) {}

  void load(const KernelTable& table, const TiledWeight& weight, const GroupValues& values,
            int64_t unit) const {
    if (!weight.grouped()) return;
    transpose(table, weight, values.scales, values.dtype, unit, scales);
    if (values.zeros != nullptr) transpose(table, weight, values.zeros, values.dtype, unit, zeros);
    else std::fill(zeros, zeros + kTileRows * weight.groups(), weight.middle());
  }

 private:
  // Rows past the end repeat the unit's first: their outputs are not stored.
  void transpose(const KernelTable& table, const TiledWeight& weight, const void* source,
                 Dtype dtype, int64_t unit, float* out) const {
    const int64_t groups = weight.groups(), first = unit * kTileRows;
    const int64_t count = std::min(kTileRows, weight.N() - first);
    const auto* values = static_cast<const std::byte*>(source) + first * groups * dtype_size(dtype);
    table.to_float(values, dtype, count * groups, rows);
    table.transpose(rows, count, groups, kTileRows, out);
  }
};

// Memory of one call; per-thread parts are padded and side by side.
struct Buffers {
  uint8_t* x;  // [token][quad][8]
  float *x_scale, *x_sum;  // [token][piece]
  float* z;                // [token][N], when there is a rotation
  float *bias, *factors;
  std::byte* threads;
  int64_t thread_bytes;
};

class Product {
 public:
  Product(const TiledWeight& weight, const TiledMatmul& call)
      : weight_(weight), call_(call), table_(kernels()), starts_(tile_starts(weight)) {
    int64_t offset = 0;
    for (const Piece& piece : weight.pieces()) {
      quad_offsets_.push_back(offset);
      offset += piece.quads();
    }
    e8p_ = weight.streams()[0].code == TileStream::Code::e8p;
    bool all = e8p_;
    for (const TileStream& stream : weight.streams()) all &= stream.code == TileStream::Code::e8p;
    const bool bits = !e8p_ && weight.bits() <= 4 && weight.group_size() % kBlockCols == 0;
    fused_ = (all || bits) && call.M == 1 && table_.tile.product_e8p != nullptr;
    planes_ = table_.tile.planes || fused_;
    step_ = fused_ && e8p_ ? kUnitsACall : 1;
  }

  void run() {
    const int64_t N = weight_.N(), pass = std::min(call_.M, kPassTokens);
    const int64_t pieces = int64_t(weight_.pieces().size());
    const bool rotates = call_.rotation.factor > 0;
    const int64_t x_bytes = pass * weight_.quads() * kQuantBytes;
    const int64_t F2 = call_.rotation.factor * call_.rotation.factor;
    acc_floats_ = std::max(pass, step_) * kTileRows;
    value_floats_ = UnitValues::floats(weight_);
    const int64_t rotator =
        rotates ? Rotator::workspace_floats(call_.rotation, N) : 0;
    buffers_.thread_bytes = Workspace::padded(kTileSize) + Workspace::padded(acc_floats_ * 4) +
                            Workspace::padded(std::max(value_floats_, rotator) * 4);
    Workspace workspace(Workspace::padded(x_bytes) + 2 * Workspace::padded(pass * pieces * 4) +
                        Workspace::padded((rotates ? pass * N : 0) * 4) +
                        Workspace::padded(N * 4) + Workspace::padded(F2 * 4) +
                        call_.num_threads * buffers_.thread_bytes);
    buffers_.x = workspace.take<uint8_t>(x_bytes);
    buffers_.x_scale = workspace.take<float>(pass * pieces);
    buffers_.x_sum = workspace.take<float>(pass * pieces);
    buffers_.z = workspace.take<float>(rotates ? pass * N : 0);
    buffers_.bias = workspace.take<float>(N);
    buffers_.factors = workspace.take<float>(F2);
    buffers_.threads = workspace.take<std::byte>(call_.num_threads * buffers_.thread_bytes);
    if (call_.bias != nullptr) table_.to_float(call_.bias, call_.bias_dtype, N, buffers_.bias);
    expand_factor(call_.rotation, false, buffers_.factors);
    const int most = int(std::min<int64_t>(call_.num_threads, weight_.units()));
    for (int64_t m0 = 0; m0 < call_.M; m0 += pass) {
      const int64_t tokens = std::min(pass, call_.M - m0);
      on_threads(most, [&](int thread, int threads) {
        quantize(m0, tokens, thread, threads);
        thread_barrier(threads);
        multiply(m0, tokens, thread, threads);
        if (!rotates) return;
        thread_barrier(threads);
        rotate(m0, tokens, thread, threads);
      });
    }
  }

 private:
  void quantize(int64_t m0, int64_t tokens, int thread, int threads) const {
    const auto& pieces = weight_.pieces();
    const int64_t count = int64_t(pieces.size()), items = tokens * count;
    const int64_t size = dtype_size(call_.x_dtype);
    for (int64_t i = items * thread / threads; i < items * (thread + 1) / threads; ++i) {
      const int64_t m = i / count, p = i % count;
      const Piece& piece = pieces[size_t(p)];
      const int64_t before = piece.k0 % kQuad, width = piece.k1 - piece.k0;
      alignas(64) float values[kTileCols + kQuad];
      const auto* x = static_cast<const std::byte*>(call_.x) +
                      ((m0 + m) * call_.x_row_stride + piece.k0) * size;
      table_.to_float(x, call_.x_dtype, width, values + before);
      const int64_t quad = m * weight_.quads() + quad_offsets_[size_t(p)];
      table_.tile.quantize({values, before, before + width, piece.quads(),
                            call_.precision == Precision::fast, planes_, e8p_,
                            buffers_.x + quad * kQuantBytes, buffers_.x_scale + i,
                            buffers_.x_sum + i});
    }
  }

  void multiply(int64_t m0, int64_t tokens, int thread, int threads) const {
    std::byte* own = buffers_.threads + thread * buffers_.thread_bytes;
    auto* tile = reinterpret_cast<uint8_t*>(own);
    auto* acc = reinterpret_cast<float*>(own + Workspace::padded(kTileSize));
    const UnitValues values(weight_, acc + Workspace::padded(acc_floats_ * 4) / 4);
    const int64_t units = weight_.units(), tiles = int64_t(starts_.size()) - 1;
    const int64_t end = units * (thread + 1) / threads;
    for (int64_t u = units * thread / threads; u < end; u += step_) {
      const int64_t count = std::min(step_, end - u);  // above 1: one token
      values.load(table_, weight_, call_.values, u);
      std::memset(acc, 0, size_t(tokens * count * kTileRows) * sizeof(float));
      for (int64_t t = 0; t < tiles; ++t) {
        for (const TileStream& stream : weight_.streams()) {
          if (!fused_) decode_tile(table_.tile, weight_, stream, call_.packed, u, t, tile);
          multiply_tile(stream, values, u, count, t, tokens, tile, acc);
        }
      }
      for (int64_t i = 0; i < count; ++i) finish(m0, tokens, u + i, acc + i * kTileRows);
    }
  }

  void multiply_tile(const TileStream& stream, const UnitValues& values, int64_t unit,
                     int64_t count, int64_t t, int64_t tokens, const uint8_t* tile,
                     float* acc) const {
    const int64_t pieces = int64_t(weight_.pieces().size());
    for (int64_t p = starts_[size_t(t)]; p < starts_[size_t(t) + 1]; ++p) {
      const Piece& piece = weight_.pieces()[size_t(p)];
      ProductArgs args;
      args.tile = tile + piece.k0 % kTileCols / kQuad * kQuadBytes;
      args.quads = piece.quads();
      args.tokens = int(tokens);
      args.fast = call_.precision == Precision::fast;
      args.x = buffers_.x + quad_offsets_[size_t(p)] * kQuantBytes;
      args.x_stride = weight_.quads() * kQuantBytes;
      args.x_scale = buffers_.x_scale + p;
      args.x_sum = buffers_.x_sum + p;
      args.piece_stride = pieces;
      const bool grouped = weight_.grouped();
      args.row_scale = grouped ? values.scales + piece.group * kTileRows : nullptr;
      args.row_zero = grouped ? values.zeros + piece.group * kTileRows : nullptr;
      args.scale = stream.scale;
      args.zero = stream.zero;
      args.acc = acc;
      if (fused_) {
        const uint8_t* codes = codes_at(stream, call_.packed, unit, t);
        const int64_t first = piece.k0 % kTileCols / kBlockCols, blocks = piece.quads() / 8;
        if (e8p_) {
          table_.tile.product_e8p(e8p_tables(), {codes, count, stream.unit_bytes}, blocks, args);
        } else {
          const int bits = weight_.bits();
          table_.tile.product_bits(codes + first * bits * kQuadBytes, bits, blocks, args);
        }
      } else {
        table_.tile.product(args);
      }
    }
  }

  // Sums of one unit: to y, or to z when they are still to be rotated.
  void finish(int64_t m0, int64_t tokens, int64_t unit, const float* acc) const {
    const int64_t N = weight_.N(), n = unit * kTileRows;
    const int64_t count = std::min(kTileRows, N - n);
    for (int64_t m = 0; m < tokens; ++m) {
      if (call_.rotation.factor > 0) {
        std::memcpy(buffers_.z + m * N + n, acc + m * kTileRows, size_t(count) * sizeof(float));
      } else {
        table_.tile.scale_out({acc + m * kTileRows, 1, call_.sv == nullptr ? nullptr : call_.sv + n,
                               call_.bias == nullptr ? nullptr : buffers_.bias + n, count,
                               y_at(m0 + m, n), call_.x_dtype});
      }
    }
  }

  void rotate(int64_t m0, int64_t tokens, int thread, int threads) const {
    const int64_t N = weight_.N();
    std::byte* own = buffers_.threads + thread * buffers_.thread_bytes;
    auto* floats = reinterpret_cast<float*>(own + Workspace::padded(kTileSize) +
                                            Workspace::padded(acc_floats_ * 4));
    const Rotator rotate(call_.rotation, N, table_.tile, buffers_.factors, floats);
    for (int64_t m = tokens * thread / threads; m < tokens * (thread + 1) / threads; ++m) {
      const float* value = rotate(buffers_.z + m * N);
      table_.tile.scale_out({value, rotate.norm(), call_.sv,
                             call_.bias == nullptr ? nullptr : buffers_.bias, N, y_at(m0 + m, 0),
                             call_.x_dtype});
    }
  }

  void* y_at(int64_t m, int64_t n) const {
    return static_cast<std::byte*>(call_.y) + (m * weight_.N() + n) * dtype_size(call_.x_dtype);
  }

  const TiledWeight& weight_;
  const TiledMatmul& call_;
  const KernelTable& table_;
  std::vector<int64_t> starts_, quad_offsets_;
  Buffers buffers_;
  bool e8p_, fused_, planes_;  // columns in E8P's order; one token without tiles; x as bytes
  int64_t step_;              // units a step
  int64_t acc_floats_ = 0, value_floats_ = 0;
};

void check_values(const TiledWeight& weight, const GroupValues& values) {
  AQLM_CHECK(!weight.grouped() || values.scales != nullptr, "a scalar grid needs scales");
}

}  // namespace

void tiled_matmul(const TiledWeight& weight, const TiledMatmul& call) {
  AQLM_CHECK(call.M >= 0, "M=", call.M, " must not be negative");
  AQLM_CHECK(call.num_threads >= 1, "num_threads=", call.num_threads, " is not positive");
  check_rotation(call.rotation, weight.N());
  check_values(weight, call.values);
  if (call.M == 0 || weight.N() == 0) return;
  AQLM_CHECK(call.x != nullptr && call.y != nullptr && call.packed != nullptr,
             "x, y and packed must not be null");
  AQLM_CHECK(call.M == 1 || call.x_row_stride >= weight.K(), "x_row_stride=", call.x_row_stride,
             " is less than K=", weight.K());
  Product(weight, call).run();
}

void tiled_decode(const TiledWeight& weight, const TiledDecode& call) {
  AQLM_CHECK(call.row_begin % kTileRows == 0 && call.row_begin >= 0 &&
                 call.row_begin <= call.row_end && call.row_end <= weight.N(),
             "rows ", call.row_begin, "..", call.row_end, " of ", weight.N(),
             ": the first must be a multiple of ", kTileRows);
  AQLM_CHECK(call.num_threads >= 1, "num_threads=", call.num_threads, " is not positive");
  check_values(weight, call.values);
  const KernelTable& table = kernels();
  const std::vector<int64_t> starts = tile_starts(weight);
  const int64_t tiles = int64_t(starts.size()) - 1, streams = int64_t(weight.streams().size());
  const int64_t value_bytes = Workspace::padded(UnitValues::floats(weight) * 4);
  const int64_t thread_bytes = streams * kTileSize + value_bytes;
  Workspace workspace(call.num_threads * thread_bytes);
  auto* memory = workspace.take<std::byte>(call.num_threads * thread_bytes);
  const int64_t rows = call.row_end - call.row_begin;
  const int64_t units = (rows + kTileRows - 1) / kTileRows, first = call.row_begin / kTileRows;
  const auto decode_unit = [&](int64_t u, uint8_t* decoded, const UnitValues& values) {
    values.load(table, weight, call.values, u);
    const int64_t end = std::min(call.row_end, (u + 1) * kTileRows);
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t s = 0; s < streams; ++s) {
        decode_tile(table.tile, weight, weight.streams()[size_t(s)], call.packed, u, t,
                    decoded + s * kTileSize);
      }
      const int64_t k0 = t * kTileCols, columns = std::min(kTileCols, weight.K() - k0);
      for (int64_t n = u * kTileRows; n < end; ++n) {
        const int64_t r = n % kTileRows;
        alignas(64) float out[kTileCols] = {};
        for (int64_t p = starts[size_t(t)]; p < starts[size_t(t) + 1]; ++p) {
          const Piece& piece = weight.pieces()[size_t(p)];
          const int64_t value = piece.group * kTileRows + r;
          for (int64_t s = 0; s < streams; ++s) {
            const TileStream& stream = weight.streams()[size_t(s)];
            const bool grouped = weight.grouped();
            table.tile.add_row(decoded + s * kTileSize, r, piece.k0 - k0, piece.k1 - k0,
                               grouped ? values.scales[value] : stream.scale,
                               grouped ? values.zeros[value] : stream.zero,
                               stream.code != TileStream::Code::bits, out);
          }
        }
        auto* target = static_cast<std::byte*>(call.out) +
                       ((n - call.row_begin) * call.out_row_stride + k0) *
                           dtype_size(call.out_dtype);
        table.tile.scale_out({out, 1, nullptr, nullptr, columns, target, call.out_dtype});
      }
    }
  };
  const int most = int(std::min<int64_t>(call.num_threads, std::max<int64_t>(units, 1)));
  on_threads(most, [&](int thread, int threads) {
    std::byte* own = memory + thread * thread_bytes;
    const UnitValues values(weight, reinterpret_cast<float*>(own + streams * kTileSize));
    for (int64_t u = units * thread / threads; u < units * (thread + 1) / threads; ++u) {
      decode_unit(first + u, reinterpret_cast<uint8_t*>(own), values);
    }
  });
}

}  // namespace aqlm::cpu
