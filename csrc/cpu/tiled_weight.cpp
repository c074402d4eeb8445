// What a weight is made of: its streams of codes and its pieces of columns.
#include <algorithm>

#include "../common/check.h"
#include "tiled.h"

namespace aqlm::cpu {

TiledWeight::TiledWeight(int bits, bool grouped, int64_t group_size, int64_t N, int64_t K)
    : bits_(bits), grouped_(grouped), group_size_(group_size), N_(N), K_(K) {
  for (int64_t k = 0; k < K;) {
    const int64_t tile_end = (k / kTileCols + 1) * kTileCols;
    const int64_t group_end = (k / group_size + 1) * group_size;
    const int64_t end = std::min({tile_end, group_end, K});
    pieces_.push_back({k, end, k / group_size});
    quads_ += pieces_.back().quads();
    k = end;
  }
}

TiledWeight TiledWeight::e8p(int bits, double residual, int64_t N, int64_t K) {
  AQLM_CHECK(bits >= 2 && bits <= 4, "bits=", bits, " is not 2, 3 or 4");
  AQLM_CHECK(N >= 0 && K >= 0 && N % 16 == 0 && K % 64 == 0, "N=", N, ", K=", K,
             ": E8P needs multiples of 16 and 64");
  TiledWeight weight(bits, false, std::max<int64_t>(K, 1), N, K);
  constexpr int64_t kBlock = 576, kBlocks = kTileCols / kBlockCols;  // e8p-inl.h
  const int64_t blocks = K / kBlockCols;
  const TileStream base = {TileStream::Code::e8p, 0, blocks * kBlock, kBlocks * kBlock, 0.5f, 7.5f};
  weight.streams_.push_back(base);
  const int64_t offset = weight.units() * base.unit_bytes;
  const auto scale = float(residual);
  if (bits == 4) {
    weight.streams_.push_back(
        {base.code, offset, base.unit_bytes, base.tile_bytes, scale / 2, base.zero});
  } else if (bits == 3) {
    weight.streams_.push_back(
        {TileStream::Code::residual, offset, blocks * kQuadBytes, kBlocks * kQuadBytes,
         scale / 2, 4});
  }
  return weight;
}

TiledWeight TiledWeight::scalar(int bits, int64_t group_size, int64_t N, int64_t K) {
  AQLM_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits=", bits,
             " is not 2, 3, 4 or 8");
  AQLM_CHECK(N >= 0 && K >= 0, "N=", N, ", K=", K, " must not be negative");
  AQLM_CHECK(group_size >= 1 && K % group_size == 0, "K=", K, " is not a multiple of ", group_size,
             " (group_size)");
  AQLM_CHECK(K * bits % 8 == 0, "K=", K, ": a row of ", bits,
             "-bit codes does not fill whole bytes");
  TiledWeight weight(bits, true, group_size, N, K);
  const int64_t chunk = bits * kQuadBytes, chunks = (K + kBlockCols - 1) / kBlockCols;
  weight.streams_.push_back({TileStream::Code::bits, 0, chunks * chunk,
                             kTileCols / kBlockCols * chunk, 1, 0});
  return weight;
}

int64_t TiledWeight::packed_bytes() const {
  const TileStream& last = streams_.back();
  return last.offset + units() * last.unit_bytes;
}

}  // namespace aqlm::cpu
