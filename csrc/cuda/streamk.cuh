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

// Part, packed tile and rows of a row group.
__device__ __forceinline__ void locate_group(const Additive& a, const Schedule& s, int group,
                                             Piece* p) {
  int g = group, tile = 0, part = 0;
  for (;; ++part) {
    const int groups = ceil_div(a.rows_of(part), s.group_rows);
    if (g < groups) break;
    g -= groups;
    tile += ceil_div(a.rows_of(part), a.tile_rows());
  }
  const int row_in_part = g * s.group_rows;
  p->part = part;
  p->row = a.row0[part] + row_in_part;
  p->rows = min(s.group_rows, a.rows_of(part) - row_in_part);
  p->tile = tile + row_in_part / a.tile_rows();
  p->tiles = ceil_div(p->rows, a.tile_rows());
}

// The CTA that owns a cell. make_schedule keeps cells * ctas below 2^31.
__device__ __forceinline__ int cta_of(const Schedule& s, int cell) {
  return ((cell + 1) * s.ctas - 1) / s.cells;
}

// The piece that starts at `cell`.
__device__ __forceinline__ void locate(const Additive& a, const Schedule& s, int cell, int end,
                                       Piece* p) {
  const int item = cell / s.units, all = s.whole + item;
  locate_group(a, s, all % s.groups, p);
  p->item = item;
  p->pass = all / s.groups;
  p->u0 = cell - item * s.units;
  p->u1 = min(s.units, p->u0 + end - cell);
  p->first_cta = cta_of(s, item * s.units);
}

// Part of the first piece of CTA `cta`.
__device__ __forceinline__ int first_part(const Additive& a, const Schedule& s, int cta) {
  int group = (s.whole + cta * s.cells / s.ctas / s.units) % s.groups, part = 0;
  for (;; ++part) {
    const int groups = ceil_div(a.rows_of(part), s.group_rows);
    if (group < groups) return part;
    group -= groups;
  }
}

// Calls body(piece) for each piece of CTA `cta`; all threads take part. The piece lives in
// shared memory: it is read outside the inner loops, whose registers are scarce.
template <typename Fn>
__device__ __forceinline__ void for_each_piece(const Additive& a, const Schedule& s, int cta,
                                               Fn&& body) {
  __shared__ Piece piece;
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
template <typename Fn>
__device__ __forceinline__ void for_each_piece(const Additive& a, const Schedule& s, Fn&& body) {
  for_each_piece(a, s, blockIdx.x / s.classes, body);
}

// The same with a piece of each thread's own and no barriers, for warps with different roles; items
// that are not cut come first.
template <typename Fn>
__device__ __forceinline__ void for_own_pieces(const Additive& a, const Schedule& s, Fn&& body) {
  const int cta = blockIdx.x / s.classes;
  int item = cta, cell = cta * s.cells / s.ctas;
  const int end = cta < s.ctas ? (cta + 1) * s.cells / s.ctas : cell;
  while (item < s.whole || cell < end) {
    Piece piece;
    if (item < s.whole) {
      locate_group(a, s, item % s.groups, &piece);
      piece.item = -1;
      piece.pass = item / s.groups;
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

// Partials of warp `lane` (0 .. lanes - 1) of CTA `cta`: [slot_tokens][group_rows] floats.
__device__ __forceinline__ float* slot_of(const MatmulParams& p, const Piece& piece, int lane,
                                          int cta) {
  const Schedule& s = p.s;
  const int arrival = (cta - piece.first_cta) * s.classes + blockIdx.x % s.classes;
  const size_t slot = size_t(piece.item) * s.max_slots + arrival * s.lanes + lane;
  return p.partials + slot * s.slot_tokens * s.group_rows;
}
__device__ __forceinline__ float* slot_of(const MatmulParams& p, const Piece& piece, int lane) {
  return slot_of(p, piece, lane, blockIdx.x / p.s.classes);
}

}  // namespace aqlm
