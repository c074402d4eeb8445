// Module aqlm_infer._cpu: CPU kernels on raw buffers. Torch-free: pointers arrive as Python ints
// (0 = absent), dtypes as names, strides in elements. std::invalid_argument becomes ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "common/check.h"
#include "cpu/additive.h"
#include "cpu/dense.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/plan.h"
#include "cpu/step.h"
#include "cpu/tiled.h"

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

AdditivePlan make_plan(const std::vector<int64_t>& partitions, int64_t K, int num_codebooks,
                       int nbits, int64_t in_group_size, int64_t out_group_size,
                       const std::string& param_dtype, const std::string& x_dtype,
                       const std::string& precision) {
  return AdditivePlan({0, K, num_codebooks, nbits, in_group_size, out_group_size}, partitions,
                      parse_dtype(param_dtype, "param_dtype"), parse_dtype(x_dtype, "x_dtype"),
                      parse_precision(precision));
}

bool matmul(const AdditivePlan& plan, Address x, int64_t x_row_stride, Address packed,
            Address codebooks, Address scales, Address bias, Address prepared, Address y,
            int64_t y_row_stride, int64_t M, int num_threads) {
  return plan.matmul({pointer<void>(x), x_row_stride, pointer<uint8_t>(packed),
                      pointer<void>(codebooks), pointer<void>(scales), pointer<void>(bias),
                      pointer<uint8_t>(prepared), pointer<void>(y), y_row_stride, M, num_threads});
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

void rotate(Address x, int64_t x_row_stride, const std::string& dtype, Address pre, Address post,
            Address h, int64_t factor, int64_t block, bool transpose, Address y, int64_t M,
            int64_t n, int num_threads) {
  hadamard({pointer<void>(x), x_row_stride, parse_dtype(dtype, "dtype"), pointer<float>(pre),
            pointer<float>(post), {factor, block, pointer<int8_t>(h)}, transpose, pointer<void>(y),
            M, n, num_threads});
}

GroupValues group_values(Address scales, Address zeros, const std::string& dtype) {
  return {pointer<void>(scales), pointer<void>(zeros), parse_dtype(dtype, "values_dtype")};
}

void multiply(const TiledWeight& weight, Address x, int64_t x_row_stride,
              const std::string& x_dtype, Address packed, Address scales, Address zeros,
              const std::string& values_dtype, Address sv, Address bias,
              const std::string& bias_dtype, Address h, int64_t factor, int64_t block, Address y,
              int64_t M, const std::string& precision, int num_threads) {
  tiled_matmul(weight, {pointer<void>(x), x_row_stride, parse_dtype(x_dtype, "x_dtype"),
                        pointer<uint8_t>(packed), group_values(scales, zeros, values_dtype),
                        pointer<float>(sv), pointer<void>(bias),
                        parse_dtype(bias_dtype, "bias_dtype"),
                        {factor, block, pointer<int8_t>(h)}, pointer<void>(y), M,
                        parse_precision(precision), num_threads});
}

void decode(const TiledWeight& weight, Address packed, Address scales, Address zeros,
            const std::string& values_dtype, Address out, int64_t out_row_stride,
            const std::string& out_dtype, int64_t row_begin, int64_t row_end, int num_threads) {
  tiled_decode(weight, {pointer<uint8_t>(packed), group_values(scales, zeros, values_dtype),
                        pointer<void>(out), out_row_stride, parse_dtype(out_dtype, "out_dtype"),
                        row_begin, row_end, num_threads});
}

void norm(Address x, int64_t x_stride, Address delta, int64_t delta_stride, Address weight,
          float eps, Address total, Address y, const std::string& dtype, int64_t M, int64_t N,
          int num_threads) {
  add_norm({{pointer<void>(x), x_stride}, {pointer<void>(delta), delta_stride},
            pointer<void>(weight), eps, pointer<void>(total), pointer<void>(y),
            parse_dtype(dtype, "dtype"), M, N, num_threads});
}

void attention(Address q, std::array<int64_t, 2> q_stride, Address key,
               std::array<int64_t, 2> key_stride, Address value,
               std::array<int64_t, 2> value_stride, Address cos, Address sin, Address ids,
               int64_t filled, Address keys, std::array<int64_t, 3> keys_stride, Address values,
               std::array<int64_t, 3> values_stride, Address mask, int64_t mask_stride,
               float scale, Address y, const std::string& dtype, std::array<int64_t, 5> sizes,
               int num_threads) {
  rope_attention({pointer<void>(q), pointer<void>(key), pointer<void>(value),
                  {q_stride[0], q_stride[1]}, {key_stride[0], key_stride[1]},
                  {value_stride[0], value_stride[1]}, pointer<void>(cos), pointer<void>(sin),
                  pointer<int64_t>(ids), filled, pointer<void>(keys), pointer<void>(values),
                  {keys_stride[0], keys_stride[1], keys_stride[2]},
                  {values_stride[0], values_stride[1], values_stride[2]}, pointer<bool>(mask),
                  mask_stride, scale, pointer<void>(y), parse_dtype(dtype, "dtype"), sizes[0],
                  sizes[1], sizes[2], sizes[3], sizes[4], num_threads});
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
    add("cpu.e8p", 2, 4, table->isa);
    add("cpu.scalar", 2, 8, table->isa);
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

  py::class_<AdditivePlan>(m, "AdditivePlan")
      .def(py::init(&make_plan), py::arg("partitions"), py::arg("K"), py::arg("num_codebooks"),
           py::arg("nbits"), py::arg("in_group_size"), py::arg("out_group_size"),
           py::arg("param_dtype"), py::arg("x_dtype"), py::arg("precision"))
      .def_property_readonly("packed_bytes", &AdditivePlan::packed_bytes)
      .def_property_readonly("prepared_bytes", &AdditivePlan::prepared_bytes)
      .def(
          "prepare",
          [](const AdditivePlan& plan, Address codebooks, Address prepared) {
            plan.prepare(pointer<void>(codebooks), pointer<uint8_t>(prepared));
          },
          ReleaseGil(), py::arg("codebooks"), py::arg("prepared"))
      .def("matmul", &matmul, ReleaseGil(), py::arg("x"), py::arg("x_row_stride"),
           py::arg("packed"), py::arg("codebooks"), py::arg("scales"), py::arg("bias"),
           py::arg("prepared"), py::arg("y"), py::arg("y_row_stride"), py::arg("M"),
           py::arg("num_threads"));
  m.def("additive_dequantize", &dequantize, ReleaseGil(), py::arg("packed"), py::arg("codebooks"),
        py::arg("scales"), py::arg("param_dtype"), py::arg("out"), py::arg("out_row_stride"),
        py::arg("out_dtype"), py::arg("N"), py::arg("K"), py::arg("num_codebooks"),
        py::arg("nbits"), py::arg("in_group_size"), py::arg("out_group_size"),
        py::arg("out_group_begin"), py::arg("out_group_end"), py::arg("apply_scales"),
        py::arg("num_threads"));
  py::class_<TiledWeight>(m, "TiledWeight")
      .def_static("e8p", &TiledWeight::e8p, py::arg("bits"), py::arg("residual"), py::arg("N"),
                  py::arg("K"))
      .def_static("scalar", &TiledWeight::scalar, py::arg("bits"), py::arg("group_size"),
                  py::arg("N"), py::arg("K"))
      .def_property_readonly("packed_bytes", &TiledWeight::packed_bytes)
      .def("matmul", &multiply, ReleaseGil(), py::arg("x"), py::arg("x_row_stride"),
           py::arg("x_dtype"), py::arg("packed"), py::arg("scales"), py::arg("zeros"),
           py::arg("values_dtype"), py::arg("sv"), py::arg("bias"), py::arg("bias_dtype"),
           py::arg("h"), py::arg("factor"), py::arg("block"), py::arg("y"), py::arg("M"),
           py::arg("precision"), py::arg("num_threads"))
      .def("decode", &decode, ReleaseGil(), py::arg("packed"), py::arg("scales"), py::arg("zeros"),
           py::arg("values_dtype"), py::arg("out"), py::arg("out_row_stride"),
           py::arg("out_dtype"), py::arg("row_begin"), py::arg("row_end"), py::arg("num_threads"));
  m.def(
      "e8p_pack",
      [](const TiledWeight& weight, Address words, Address rest, Address packed, int num_threads) {
        e8p_pack(weight, pointer<int64_t>(words), pointer<void>(rest), pointer<uint8_t>(packed),
                 num_threads);
      },
      ReleaseGil(), py::arg("weight"), py::arg("words"), py::arg("rest"), py::arg("packed"),
      py::arg("num_threads"));
  m.def(
      "e8p_unpack",
      [](const TiledWeight& weight, Address packed, Address words, Address rest, int num_threads) {
        e8p_unpack(weight, pointer<uint8_t>(packed), pointer<int64_t>(words), pointer<void>(rest),
                   num_threads);
      },
      ReleaseGil(), py::arg("weight"), py::arg("packed"), py::arg("words"), py::arg("rest"),
      py::arg("num_threads"));
  m.def(
      "scalar_pack",
      [](const TiledWeight& weight, Address qweight, Address packed, int num_threads) {
        scalar_pack(weight, pointer<uint8_t>(qweight), pointer<uint8_t>(packed), num_threads);
      },
      ReleaseGil(), py::arg("weight"), py::arg("qweight"), py::arg("packed"),
      py::arg("num_threads"));
  m.def(
      "scalar_unpack",
      [](const TiledWeight& weight, Address packed, Address qweight, int num_threads) {
        scalar_unpack(weight, pointer<uint8_t>(packed), pointer<uint8_t>(qweight), num_threads);
      },
      ReleaseGil(), py::arg("weight"), py::arg("packed"), py::arg("qweight"),
      py::arg("num_threads"));
  m.def("hadamard", &rotate, ReleaseGil(), py::arg("x"), py::arg("x_row_stride"), py::arg("dtype"),
        py::arg("pre"), py::arg("post"), py::arg("h"), py::arg("factor"), py::arg("block"),
        py::arg("transpose"), py::arg("y"), py::arg("M"), py::arg("n"), py::arg("num_threads"));

  m.def(
      "dense_matvec",
      [](Address x, Address weight, int64_t row_stride, Address bias, Address y,
         const std::string& dtype, int64_t N, int64_t K, int num_threads) {
        dense_matvec({pointer<void>(x), pointer<void>(weight), row_stride, pointer<void>(bias),
                      pointer<void>(y), parse_dtype(dtype, "dtype"), N, K, num_threads});
      },
      ReleaseGil(), py::arg("x"), py::arg("weight"), py::arg("row_stride"), py::arg("bias"),
      py::arg("y"), py::arg("dtype"), py::arg("N"), py::arg("K"), py::arg("num_threads"));

  m.def("add_norm", &norm, ReleaseGil(), py::arg("x"), py::arg("x_stride"), py::arg("delta"),
        py::arg("delta_stride"), py::arg("weight"), py::arg("eps"), py::arg("total"), py::arg("y"),
        py::arg("dtype"), py::arg("M"), py::arg("N"), py::arg("num_threads"));
  m.def(
      "swiglu",
      [](Address gate, int64_t gate_stride, Address up, int64_t up_stride, Address y,
         const std::string& dtype, int64_t M, int64_t N, int num_threads) {
        swiglu({{pointer<void>(gate), gate_stride}, {pointer<void>(up), up_stride},
                pointer<void>(y), parse_dtype(dtype, "dtype"), M, N, num_threads});
      },
      ReleaseGil(), py::arg("gate"), py::arg("gate_stride"), py::arg("up"), py::arg("up_stride"),
      py::arg("y"), py::arg("dtype"), py::arg("M"), py::arg("N"), py::arg("num_threads"));
  m.def(
      "argmax",
      [](Address scores, int64_t stride, const std::string& dtype, int64_t M, int64_t N,
         Address best) {
        argmax({pointer<void>(scores), stride}, parse_dtype(dtype, "dtype"), M, N,
               pointer<int64_t>(best));
      },
      ReleaseGil(), py::arg("scores"), py::arg("stride"), py::arg("dtype"), py::arg("M"),
      py::arg("N"), py::arg("best"));
  m.def("rope_attention", &attention, ReleaseGil(), py::arg("q"), py::arg("q_stride"),
        py::arg("key"), py::arg("key_stride"), py::arg("value"), py::arg("value_stride"),
        py::arg("cos"), py::arg("sin"), py::arg("ids"), py::arg("filled"), py::arg("keys"),
        py::arg("keys_stride"), py::arg("values"), py::arg("values_stride"), py::arg("mask"),
        py::arg("mask_stride"), py::arg("scale"), py::arg("y"), py::arg("dtype"), py::arg("sizes"),
        py::arg("num_threads"));
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
