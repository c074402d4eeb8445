// One-time work on a layer: pack and unpack of codes, rearranged codebooks. Not tuned.
#pragma once

#include "launch.h"
#include "numeric.cuh"

namespace aqlm {

// One thread per canonical code [out group][in group][codebook]; Code is int8_t or int16_t.
template <typename Code>
__global__ void pack_kernel(const __grid_constant__ Additive a, const Code* codes,
                            uint8_t* packed) {
  const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size_t(a.out_groups()) * a.in_groups * a.codebooks) return;
  const int b = i % a.codebooks, v = i / a.codebooks % a.in_groups;
  const int row = i / (size_t(a.codebooks) * a.in_groups);
  const int code = codes[i] & (a.entries() - 1);
  uint8_t* to = packed + a.offset(row, v, b);
  if (a.code_bytes() == 1) *to = code;
  else *reinterpret_cast<uint16_t*>(to) = code;
}

// A warp for each (row tile, kChoiceUnits units): chooses which copy of its entry a code reads
// (additive_layout.h). A thread has one lookup of one unit, lookups that 32 lanes do together, and
// moves codes one by one to the copy whose bank has fewer, three times over.
constexpr int kChooseWarps = 4;
__global__ void __launch_bounds__(kChooseWarps * 32)
choose_kernel(const __grid_constant__ Additive a, uint8_t* packed) {
  __shared__ uint8_t loads[kChooseWarps][32][32];  // [warp][bank][thread]
  const int thread = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int all_tiles = a.tile0(a.parts), groups = ceil_div(a.units(), kChoiceUnits);
  const long long index = blockIdx.x * static_cast<long long>(kChooseWarps) + warp;
  if (index >= static_cast<long long>(groups) * all_tiles) return;
  const int tile = index % all_tiles, unit = index / all_tiles * kChoiceUnits + thread / 2 % 4;
  const int position = thread % 2 * 4 + thread / 8;  // see choice_bit
  const bool valid = unit < a.units();
  uint16_t* const codes = reinterpret_cast<uint16_t*>(
      packed + a.unit_offset(tile, valid ? unit : 0)) + position;
  auto load = [&](int bank) -> uint8_t& { return loads[warp][bank][thread]; };
  auto bank_of = [](int entry) { return entry >> 1 & 31; };
  const int limit = a.entries() < kSecondEntries ? a.entries() : kSecondEntries;
  uint32_t second = 0;  // a bit for each lane
  if (valid) {
    for (int b = 0; b < 32; ++b) load(b) = 0;
    for (int lane = 0; lane < 32; ++lane) ++load(bank_of(codes[lane * 8]));
    for (int i = 0; i < 3 * 32; ++i) {
      const int lane = i % 32, code = codes[lane * 8];
      if (code >= limit) continue;
      const int bank = bank_of(code), second_bank = bank_of(second_copy(code));
      const bool moved = second >> lane & 1;
      uint8_t& here = load(moved ? second_bank : bank);
      uint8_t& there = load(moved ? bank : second_bank);
      const bool move = there < here;  // else it would have as many there
      here -= move;
      there += move;
      second ^= uint32_t(move) << lane;
    }
    for (int lane = 0; lane < 32; ++lane)
      if (second >> lane & 1) codes[lane * 8] = second_copy(codes[lane * 8]);
  }
  uint32_t* const choices = reinterpret_cast<uint32_t*>(packed + a.choice_offset(tile, unit));
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t word = __ballot_sync(~0u, second >> lane & 1);
    if (thread == lane) choices[lane] = word;
  }
}

// The inverse; restores the sign extension of the canonical container.
template <typename Code>
__global__ void unpack_kernel(const __grid_constant__ Additive a, const uint8_t* packed,
                              Code* codes) {
  const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size_t(a.out_groups()) * a.in_groups * a.codebooks) return;
  const int b = i % a.codebooks, v = i / a.codebooks % a.in_groups;
  const int row = i / (size_t(a.codebooks) * a.in_groups);
  const uint8_t* from = packed + a.offset(row, v, b);
  int code = a.code_bytes() == 1 ? *from : *reinterpret_cast<const uint16_t*>(from);
  if (a.storage() == Storage::kWordTiles) {
    const int r = row - a.row0[a.part_of(row)];
    const int tile = a.tile0(a.part_of(row)) + r / kTileRows;
    const uint32_t* choices =
        reinterpret_cast<const uint32_t*>(packed + a.choice_offset(tile, v / kTileVectors));
    if (choices[r % 8 * 4 + v / 4 % 4] >> a.choice_bit(r, v) & 1) code = second_copy(code);
  }
  codes[i] = static_cast<Code>(code >= a.entries() / 2 ? code - a.entries() : code);
}

// Block `part`: scale = max|entry| / 127 over all codebooks of the part (one scale, so that the
// integer accumulators of the codebooks add up), then the int8 entries.
template <typename T>
__global__ void __launch_bounds__(1024)
prepare_int8_kernel(const __grid_constant__ Additive a, const T* codebooks, uint8_t* aux) {
  __shared__ float warp_max[32];
  const int part = blockIdx.x, G = a.in_group, n = a.codebooks * a.entries() * G;
  const bool words = a.storage() == Storage::kWordTiles;
  const T* from = codebooks + size_t(part) * n;
  float peak = 0.f;
  for (int i = threadIdx.x; i < n; i += 1024) peak = fmaxf(peak, fabsf(to_float(from[i])));
  for (int d = 16; d > 0; d /= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, d));
  if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = peak;
  __syncthreads();
  for (int i = 0; i < 32; ++i) peak = fmaxf(peak, warp_max[i]);
  const float inverse = peak > 0.f ? 127.f / peak : 0.f;
  if (threadIdx.x == 0) reinterpret_cast<float*>(aux)[part] = peak / 127.f;
  int8_t* to = reinterpret_cast<int8_t*>(aux + kAuxHeader) + size_t(part) * n;
  for (int i = threadIdx.x; i < n; i += 1024) {
    const int e = i / G, c = i % G;
    to[words ? (c / 2 * a.entries() + e) * 2 + c % 2 : i] =
        static_cast<int8_t>(__float2int_rn(to_float(from[i]) * inverse));
  }
}

// [entry][dimension] -> [dimension][entry], 16-bit values.
__global__ void __launch_bounds__(256)
prepare_split_kernel(const __grid_constant__ Additive a, const uint16_t* codebooks,
                     uint16_t* to) {
  const int i = blockIdx.x * 256 + threadIdx.x, G = a.in_group, n = a.entries() * G;
  if (i < n)
    to[size_t(blockIdx.y) * n + i % G * a.entries() + i / G] =
        codebooks[size_t(blockIdx.y) * n + i];
}

template <typename T>
__global__ void __launch_bounds__(256)
add_bias_kernel(T* y, const T* bias, int features) {
  const int n = blockIdx.x * 256 + threadIdx.x;
  T* row = y + size_t(blockIdx.y) * features;
  if (n < features) row[n] = from_float<T>(to_float(row[n]) + to_float(bias[n]));
}

}  // namespace aqlm
