// Module aqlm_infer._cpu: CPU kernels on raw buffers. Torch-free: pointers arrive as Python ints
// (0 = absent), dtypes as names, strides in elements. std::invalid_argument becomes ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/check.h"
#include "cpu/additive.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"

namespace py = pybind11;

namespace {

using namespace aqlm::cpu;
using Address = uintptr_t;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Dtype parse_dtype(const std::string& name, const char* argument) {
  if (name == "float32") return Dtype::f32;
  if (name == "bfloat16") return Dtype::bf16;
  AQLM_CHECK(name == "float16", argument, "='", name, "' is not float32, bfloat16 or float16");
  return Dtype::f16;
}

Precision parse_precision(const std::string& name) {
  AQLM_CHECK(name == "exact" || name == "fast", "precision='", name, "' is not exact or fast");
  return name == "fast" ? Precision::fast : Precision::exact;
}

void matmul(Address x, int64_t x_row_stride, const std::string& x_dtype, Address packed,
            Address codebooks, Address scales, Address bias, const std::string& param_dtype,
            Address y, int64_t y_row_stride, int64_t M, int64_t N, int64_t K, int num_codebooks,
            int nbits, int64_t in_group_size, int64_t out_group_size, const std::string& precision,
            int num_threads) {
  MatmulCall call;
  call.scheme = {N, K, num_codebooks, nbits, in_group_size, out_group_size};
  call.x = pointer<void>(x);
  call.x_row_stride = x_row_stride;
  call.x_dtype = parse_dtype(x_dtype, "x_dtype");
  call.packed = pointer<uint8_t>(packed);
  call.codebooks = pointer<void>(codebooks);
  call.scales = pointer<void>(scales);
  call.bias = pointer<void>(bias);
  call.param_dtype = parse_dtype(param_dtype, "param_dtype");
  call.y = pointer<void>(y);
  call.y_row_stride = y_row_stride;
  call.M = M;
  call.precision = parse_precision(precision);
  call.num_threads = num_threads;
  additive_matmul(call);
}

void dequantize(Address packed, Address codebooks, Address scales, const std::string& param_dtype,
                Address out, int64_t out_row_stride, const std::string& out_dtype, int64_t N,
                int64_t K, int num_codebooks, int nbits, int64_t in_group_size,
                int64_t out_group_size, int64_t out_group_begin, int64_t out_group_end,
                bool apply_scales, int num_threads) {
  DequantizeCall call;
  call.scheme = {N, K, num_codebooks, nbits, in_group_size, out_group_size};
  call.packed = pointer<uint8_t>(packed);
  call.codebooks = pointer<void>(codebooks);
  call.scales = pointer<void>(scales);
  call.param_dtype = parse_dtype(param_dtype, "param_dtype");
  call.out = pointer<void>(out);
  call.out_row_stride = out_row_stride;
  call.out_dtype = parse_dtype(out_dtype, "out_dtype");
  call.out_group_begin = out_group_begin;
  call.out_group_end = out_group_end;
  call.apply_scales = apply_scales;
  call.num_threads = num_threads;
  additive_dequantize(call);
}

// One row a kernel: its id, the code widths it serves and the instruction sets that have it.
py::list kernel_table() {
  struct Row {
    std::string id;
    int nbits_min, nbits_max;
    std::vector<std::string> isas;
  };
  std::vector<Row> rows;
  const auto add = [&](const char* id, int nbits_min, int nbits_max, const char* isa) {
    for (Row& row : rows) {
      if (row.id != id) continue;
      if (row.isas.back() != isa) row.isas.emplace_back(isa);
      return;
    }
    rows.push_back({id, nbits_min, nbits_max, {isa}});
  };
  for (const KernelTable* table : compiled_tables()) {
    for (const LutKernel* kernel :
         {&table->lut_exact, &table->lut_fast, &table->lut_float, &table->lut_tokens,
          &table->lut_many}) {
      add(kernel->id, 1, 8, table->isa);
    }
    add("cpu.additive.direct", 9, 16, table->isa);
    add("cpu.additive.decode", 1, 16, table->isa);
  }
  py::list result;
  for (const Row& row : rows) {
    py::dict entry;
    entry["id"] = row.id;
    entry["nbits"] = py::make_tuple(row.nbits_min, row.nbits_max);
    entry["isas"] = row.isas;
    result.append(entry);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of aqlm_infer on raw buffers.";

  m.def("features", [] {
    py::dict features;
    for (const auto& [name, present] : cpu_features()) features[py::str(name)] = present;
    return features;
  });
  m.def("isa", [] { return std::string(kernels().isa); });
  m.def("set_isa", &select_isa, py::arg("name"));
  m.def("supported_isas", &supported_isas);
  m.def("kernel_table", &kernel_table);

  m.def(
      "packed_nbytes",
      [](int64_t out_groups, int64_t in_groups, int num_codebooks, int nbits) {
        return PackedShape{out_groups, in_groups, num_codebooks, nbits}.nbytes();
      },
      py::arg("out_groups"), py::arg("in_groups"), py::arg("num_codebooks"), py::arg("nbits"));
  m.def(
      "additive_pack",
      [](Address codes, int code_bytes, int64_t out_groups, int64_t in_groups, int num_codebooks,
         int nbits, Address packed, int num_threads) {
        additive_pack({out_groups, in_groups, num_codebooks, nbits}, pointer<void>(codes),
                      code_bytes, pointer<uint8_t>(packed), num_threads);
      },
      ReleaseGil(), py::arg("codes"), py::arg("code_bytes"), py::arg("out_groups"),
      py::arg("in_groups"), py::arg("num_codebooks"), py::arg("nbits"), py::arg("packed"),
      py::arg("num_threads"));
  m.def(
      "additive_unpack",
      [](Address packed, int64_t out_groups, int64_t in_groups, int num_codebooks, int nbits,
         Address codes, int code_bytes, int num_threads) {
        additive_unpack({out_groups, in_groups, num_codebooks, nbits}, pointer<uint8_t>(packed),
                        pointer<void>(codes), code_bytes, num_threads);
      },
      ReleaseGil(), py::arg("packed"), py::arg("out_groups"), py::arg("in_groups"),
      py::arg("num_codebooks"), py::arg("nbits"), py::arg("codes"), py::arg("code_bytes"),
      py::arg("num_threads"));

  m.def("additive_matmul", &matmul, ReleaseGil(), py::arg("x"), py::arg("x_row_stride"),
        py::arg("x_dtype"), py::arg("packed"), py::arg("codebooks"), py::arg("scales"),
        py::arg("bias"), py::arg("param_dtype"), py::arg("y"), py::arg("y_row_stride"),
        py::arg("M"), py::arg("N"), py::arg("K"), py::arg("num_codebooks"), py::arg("nbits"),
        py::arg("in_group_size"), py::arg("out_group_size"), py::arg("precision"),
        py::arg("num_threads"));
  m.def("additive_dequantize", &dequantize, ReleaseGil(), py::arg("packed"), py::arg("codebooks"),
        py::arg("scales"), py::arg("param_dtype"), py::arg("out"), py::arg("out_row_stride"),
        py::arg("out_dtype"), py::arg("N"), py::arg("K"), py::arg("num_codebooks"),
        py::arg("nbits"), py::arg("in_group_size"), py::arg("out_group_size"),
        py::arg("out_group_begin"), py::arg("out_group_end"), py::arg("apply_scales"),
        py::arg("num_threads"));
  m.def(
      "matmul_max_m",
      [](int num_codebooks, int nbits, int64_t in_group_size, int64_t out_group_size, int64_t K) {
        return matmul_max_m(
            {out_group_size, K, num_codebooks, nbits, in_group_size, out_group_size});
      },
      py::arg("num_codebooks"), py::arg("nbits"), py::arg("in_group_size"),
      py::arg("out_group_size"), py::arg("K"));

  m.def(
      "advise_huge_pages",
      [](Address ptr, int64_t nbytes) { return advise_huge_pages(pointer<void>(ptr), nbytes); },
      ReleaseGil(), py::arg("ptr"), py::arg("nbytes"));
  m.def(
      "measure_read_bandwidth",
      [](Address ptr, int64_t nbytes, int num_threads) {
        return measure_read_bandwidth(pointer<void>(ptr), nbytes, num_threads);
      },
      ReleaseGil(), py::arg("ptr"), py::arg("nbytes"), py::arg("num_threads"));
}
