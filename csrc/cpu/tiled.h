// Products with weights that decode to tiles: E8P and scalar grids, with the rotation of the
// outputs. Entry points check their arguments (std::invalid_argument) before they start threads;
// results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "additive.h"
#include "hadamard.h"

namespace aqlm::cpu {

constexpr int64_t kBlockCols = 32;  // of the blocks of e8p-inl.h and the chunks of scalar-inl.h

// One code stream of a weight: units of 64 rows, tile after tile.
struct TileStream {
  enum class Code { e8p, residual, bits } code;
  int64_t offset, unit_bytes, tile_bytes;  // from the start of the packed weight; of a unit, a tile
  float scale, zero;                       // w = scale * (u - zero)
};

// Columns [k0, k1) of one tile and one scale group.
struct Piece {
  int64_t k0, k1, group;
  int64_t quads() const { return (k1 + kQuad - 1) / kQuad - k0 / kQuad; }
};

class TiledWeight {
 public:
  // Wq = G[c] + residual * (residual code); bits 2, 3 or 4.
  static TiledWeight e8p(int bits, double residual, int64_t N, int64_t K);
  // w = scales[n][k / G] * (q - zeros[n][k / G]); bits 2, 3, 4 or 8.
  static TiledWeight scalar(int bits, int64_t group_size, int64_t N, int64_t K);

  int64_t N() const { return N_; }
  int64_t K() const { return K_; }
  int bits() const { return bits_; }
  bool grouped() const { return grouped_; }  // whether it takes scales and zeros
  int64_t group_size() const { return group_size_; }
  int64_t groups() const { return grouped_ ? K_ / group_size_ : 1; }
  int64_t units() const { return (N_ + kTileRows - 1) / kTileRows; }
  int64_t packed_bytes() const;
  const std::vector<TileStream>& streams() const { return streams_; }
  const std::vector<Piece>& pieces() const { return pieces_; }
  int64_t quads() const { return quads_; }  // of all pieces
  // The zero of a grouped weight without zeros.
  float middle() const { return float((1 << bits_) - 1) / 2; }

 private:
  TiledWeight(int bits, bool grouped, int64_t group_size, int64_t N, int64_t K);

  int bits_;
  bool grouped_;
  int64_t group_size_, N_, K_, quads_ = 0;
  std::vector<TileStream> streams_;
  std::vector<Piece> pieces_;
};

struct GroupValues {
  const void* scales;  // [N][groups]; null unless the weight is grouped
  const void* zeros;   // [N][groups], or null: the middle of the grid
  Dtype dtype;
};

struct TiledMatmul {
  const void* x;  // rotated already
  int64_t x_row_stride;
  Dtype x_dtype;  // of x and y
  const uint8_t* packed;
  GroupValues values;
  const float* sv;   // [N], or null
  const void* bias;  // [N], or null
  Dtype bias_dtype;
  Rotation rotation;  // of the N outputs
  void* y;            // [M][N]
  int64_t M;
  Precision precision;
  int num_threads;
};

struct TiledDecode {
  const uint8_t* packed;
  GroupValues values;
  void* out;  // row n at out + (n - row_begin) * out_row_stride
  int64_t out_row_stride;
  Dtype out_dtype;
  int64_t row_begin, row_end;
  int num_threads;
};

// y = sv * U (x Wq^T) + bias
void tiled_matmul(const TiledWeight& weight, const TiledMatmul& call);
// Rows of Wq.
void tiled_decode(const TiledWeight& weight, const TiledDecode& call);

// Canonical words <-> packed, e8p.cpp and scalar.cpp. E8P: `words` [N][K/32] in the published
// order; `rest` the residual's words (4 bits), its bytes [N][K/8] (3 bits), or null.
void e8p_pack(const TiledWeight& weight, const int64_t* words, const void* rest, uint8_t* packed,
              int num_threads);
void e8p_unpack(const TiledWeight& weight, const uint8_t* packed, int64_t* words, void* rest,
                int num_threads);
// `qweight` [N][K * bits / 8]: rows of little-endian bit streams.
void scalar_pack(const TiledWeight& weight, const uint8_t* qweight, uint8_t* packed,
                 int num_threads);
void scalar_unpack(const TiledWeight& weight, const uint8_t* packed, uint8_t* qweight,
                   int num_threads);

const E8PTables& e8p_tables();
const E8PHalves& e8p_halves();

}  // namespace aqlm::cpu
