// Driver of the decode kernels: row slices of the dense weight.
#include <cstddef>

#include "../common/check.h"
#include "additive.h"
#include "codebooks.h"
#include "dispatch.h"
#include "memory.h"
#include "threads.h"

namespace aqlm::cpu {

void additive_dequantize(const DequantizeCall& call) {
  const Scheme& s = call.scheme;
  check_scheme(s);
  const PackedShape shape = s.packed();
  AQLM_CHECK(0 <= call.out_group_begin && call.out_group_begin <= call.out_group_end &&
                 call.out_group_end <= shape.out_groups,
             "out groups [", call.out_group_begin, ", ", call.out_group_end, ") are not within 0..",
             shape.out_groups);
  AQLM_CHECK(!call.apply_scales || call.scales != nullptr, "apply_scales needs scales");
  AQLM_CHECK(call.num_threads >= 1, "num_threads=", call.num_threads, " is not positive");
  const KernelTable& table = kernels();
  const CodebookSlices slices(s, call.codebooks, call.param_dtype);
  Workspace workspace(slices.decode_bytes());
  float* floats = workspace.take<float>(slices.decode_bytes() / 4);
  const int64_t rows = call.out_group_end - call.out_group_begin;
  for (int64_t a = 0; a < s.out_group_size; ++a) {
    const CodebookView view = slices.for_decode(table, a, floats);
    DecodeArgs args;
    args.shape = shape;
    args.packed = call.packed;
    args.ig = s.in_group_size;
    args.codebook = view.data;
    args.entry_stride = view.stride;
    args.dtype = view.dtype;
    args.scales = call.apply_scales ? call.scales : nullptr;
    args.param_dtype = call.param_dtype;
    args.out =
        static_cast<std::byte*>(call.out) + a * call.out_row_stride * dtype_size(call.out_dtype);
    args.row0 = call.out_group_begin;
    args.out_stride = call.out_row_stride * s.out_group_size;
    args.out_dtype = call.out_dtype;
    parallel_rows(rows, kWideRows, call.num_threads, [&](int64_t r0, int64_t r1) {
      table.decode_rows(args, call.out_group_begin + r0, call.out_group_begin + r1);
    });
  }
}

}  // namespace aqlm::cpu
