// Work division shared by the matmul bodies.
//
//   cells: item 0 | u0 u1 ... | item 1 | u0 u1 ... | ...
//   item: a row group in one pass of tokens
//   CTA c takes the cells [c * cells / ctas, (c + 1) * cells / ctas): one or more *pieces*, each
//   inside one item. Every piece writes float partials to slots of its own; reduce.cuh adds the
//   slots of an item in order. Slots and their order are arithmetic: deterministic.
#pragma once

#include "launch.h"
#include "numeric.cuh"
#include "ptx.cuh"

namespace aqlm {

struct Piece {
  int item;       // among those that are cut; -1: the piece is all of its item
  int pass;       // of tokens
  int u0, u1;     // K units
  int part;       // which codebooks
  int tile;       // first row tile of the group in the packed tensor
  int tiles;      // row tiles of the part from `tile` on
  int row;        // first row of the group
  int rows;       // valid rows of the group
  int first_cta;  // first CTA that works on this item
};

// Which share of the cells this block has, and of which class. (A division of two variables takes
// 150 cycles, and these functions run before anything else: they are shifts where they can be.)
__device__ __forceinline__ int own_cta(const Schedule& s) {
  return blockIdx.x >> (31 - __clz(s.classes));
}
__device__ __forceinline__ int own_class(const Schedule& s) { return blockIdx.x & (s.classes - 1); }

// Row group and pass of an item that counts from the first, whole ones included.
__device__ __forceinline__ int group_of(const Schedule& s, int item, int* pass) {
  int group = item;
  for (*pass = 0; group >= s.groups; ++*pass) group -= s.groups;
  return group;
}

// Part, packed tile and rows of a row group.
__device__ __forceinline__ void locate_group(const Additive& a, const Schedule& s, int group,
                                             Piece* p) {
  auto tiles_of = [&](int rows) { return (rows + (1 << s.tile_shift) - 1) >> s.tile_shift; };
  int g = group, tile = 0, part = 0;
  for (;; ++part) {
    const int groups = (a.rows_of(part) + s.group_rows - 1) >> s.group_shift;
    if (g < groups) break;
    g -= groups;
    tile += tiles_of(a.rows_of(part));
  }
  const int row_in_part = g << s.group_shift;
  p->part = part;
  p->row = a.row0[part] + row_in_part;
  p->rows = min(s.group_rows, a.rows_of(part) - row_in_part);
  p->tile = tile + (row_in_part >> s.tile_shift);
  p->tiles = tiles_of(p->rows);
}

// The CTA that owns a cell. make_schedule keeps cells * ctas below 2^31.
__device__ __forceinline__ int cta_of(const Schedule& s, int cell) {
  return ((cell + 1) * s.ctas - 1) / s.cells;
}

// The piece that starts at `cell`.
__device__ __forceinline__ void locate(const Additive& a, const Schedule& s, int cell, int end,
                                       Piece* p) {
  const int item = cell / s.units;
  locate_group(a, s, group_of(s, s.whole + item, &p->pass), p);
  p->item = item;
  p->u0 = cell - item * s.units;
  p->u1 = min(s.units, p->u0 + end - cell);
  p->first_cta = cta_of(s, item * s.units);
}

// Calls body(piece) for each piece of this block; all threads take part. The piece lives in
// shared memory: it is read outside the inner loops, whose registers are scarce.
template <typename Fn>
__device__ __forceinline__ void for_each_piece(const Additive& a, const Schedule& s, Fn&& body) {
  __shared__ Piece piece;
  const int cta = own_cta(s);
  const int end = (cta + 1) * s.cells / s.ctas;
  int cell = cta * s.cells / s.ctas;
  while (cell < end) {
    __syncthreads();
    if (threadIdx.x == 0) locate(a, s, cell, end, &piece);
    __syncthreads();
    cell += piece.u1 - piece.u0;
    body(const_cast<const Piece&>(piece));
  }
}

// The same with a piece of each thread's own and no barriers, for warps with different roles; items
// that are not cut come first.
template <typename Fn>
__device__ __forceinline__ void for_own_pieces(const Additive& a, const Schedule& s, Fn&& body) {
  const int cta = own_cta(s);
  int item = cta, cell = cta * s.cells / s.ctas;
  const int end = cta < s.ctas ? (cta + 1) * s.cells / s.ctas : cell;
  while (item < s.whole || cell < end) {
    Piece piece;
    if (item < s.whole) {
      locate_group(a, s, group_of(s, item, &piece.pass), &piece);
      piece.item = -1;
      piece.u0 = 0;
      piece.u1 = s.units;
      item += s.grid;
    } else {
      locate(a, s, cell, end, &piece);
      cell += piece.u1 - piece.u0;
    }
    body(const_cast<const Piece&>(piece));
  }
}

// Partials of warp `lane` (0 .. lanes - 1) of this CTA: [slot_tokens][group_rows] floats.
__device__ __forceinline__ float* slot_of(const MatmulParams& p, const Piece& piece, int lane) {
  const Schedule& s = p.s;
  const int arrival = (own_cta(s) - piece.first_cta) * s.classes + own_class(s);
  const size_t slot = size_t(piece.item) * s.max_slots + arrival * s.lanes + lane;
  return p.partials + slot * s.slot_tokens * s.group_rows;
}

}  // namespace aqlm
