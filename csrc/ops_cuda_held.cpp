// Module aqlm_infer._cuda: its operators register themselves when it is loaded; its functions are
// calls of held layers (ops_cuda_held.h), for aqlm_infer/backends/held.py.
//
// Tensors go to and from Python as handles in capsules (torch._C._aoti), which costs 0.2 us a call.
#include <Python.h>

#include "ops_cuda_held.h"

#include <exception>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace aqlm_ops;
using Layer = std::unique_ptr<const HeldLayer>;

struct Table {
  std::mutex mutex;
  std::map<int64_t, Layer> layers;
  int64_t last = 0;
};

Table& table() {
  static Table* const made = new Table;  // never destroyed: its tensors would outlive CUDA
  return *made;
}

// References to objects of Python, which the GIL guards.
class Objects {
 public:
  explicit Objects(PyObject* list) {
    for (Py_ssize_t i = 0; i < PyList_Size(list); ++i) {
      found_.push_back(PyList_GetItem(list, i));
      Py_INCREF(found_.back());
    }
  }
  Objects(const Objects&) = delete;
  ~Objects() {
    for (PyObject* o : found_) Py_DECREF(o);
  }

  const std::vector<PyObject*>& all() const { return found_; }

  // Whether these are the very values of the dict, in its order.
  bool are_values_of(PyObject* dict) const {
    if (PyDict_Size(dict) != static_cast<Py_ssize_t>(found_.size())) return false;
    Py_ssize_t at = 0;
    PyObject *key, *value;
    for (PyObject* o : found_)
      if (!PyDict_Next(dict, &at, &key, &value) || value != o) return false;
    return true;
  }

 private:
  std::vector<PyObject*> found_;
};

// A layer, and what it was made of.
struct Held {
  Layer layer;
  int device;
  Objects parameters, buffers;  // of the module, in the order of its dicts
  Objects versioned;            // values that buffers derive from, those that count changes
  std::vector<long> versions;
  std::vector<Tensor> values;   // all that buffers derive from
  std::vector<const void*> addresses;
};

constexpr const char* kHeld = "aqlm_infer.held";

const Held& held_of(PyObject* capsule) {
  const void* held = PyCapsule_GetPointer(capsule, kHeld);
  CHECK(held, "expected a held layer");
  return *static_cast<const Held*>(held);
}

// -1 and an exception of Python for a tensor without versions.
long version_of(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("_version");
  PyObject* found = PyObject_GetAttr(tensor, name);
  if (!found) return -1;
  const long version = PyLong_AsLong(found);
  Py_DECREF(found);
  return version;
}

bool is_as_held(const Held& held, PyObject* parameters, PyObject* buffers) {
  if (!held.parameters.are_values_of(parameters) || !held.buffers.are_values_of(buffers))
    return false;
  for (size_t i = 0; i < held.values.size(); ++i)
    if (held.values[i].const_data_ptr() != held.addresses[i]) return false;
  for (size_t i = 0; i < held.versions.size(); ++i)
    if (version_of(held.versioned.all()[i]) != held.versions[i]) return false;
  return true;
}

// The tensor that a handle of torch._C._aoti stands for; the handle goes with it.
Tensor tensor_of(PyObject* capsule) {
  void* handle = PyCapsule_GetPointer(capsule, nullptr);
  CHECK(handle, "expected the handle of a tensor");
  return Tensor(static_cast<AtenTensorHandle>(handle));
}

void delete_handle(PyObject* capsule) {
  aoti_torch_delete_tensor_object(
      static_cast<AtenTensorHandle>(PyCapsule_GetPointer(capsule, nullptr)));
}

// compute() without the GIL, its exceptions as Python's.
template <typename Compute>
std::optional<Tensor> without_gil(const Compute& compute) {
  std::optional<Tensor> y;
  std::string error;
  PyThreadState* const state = PyEval_SaveThread();
  try {
    y = compute();
  } catch (const std::exception& e) {
    error = e.what();
  }
  PyEval_RestoreThread(state);
  if (!y) PyErr_SetString(PyExc_RuntimeError, error.c_str());
  return y;
}

// torch copies the tensor, the capsule owns this handle.
PyObject* capsule_of(AtenTensorHandle handle) {
  return PyCapsule_New(handle, nullptr, delete_handle);
}

PyObject* capsule_of(const std::optional<Tensor>& y) {
  AtenTensorHandle made;
  if (!y) return nullptr;
  if (aoti_torch_new_tensor_handle(y->get(), &made) == 0) return capsule_of(made);
  PyErr_SetString(PyExc_RuntimeError, "no handle of the result");
  return nullptr;
}

// `size` columns of y from `start`, as a tensor of its own over the same memory: 0.2 us, where the
// dispatcher's split takes 2 for three.
PyObject* columns_of(const Tensor& y, int64_t start, int64_t size) {
  std::vector<int64_t> sizes, strides;
  for (int64_t i = 0; i < y.dim(); ++i) {
    sizes.push_back(y.size(i));
    strides.push_back(y.stride(i));
  }
  sizes.back() = size;
  AtenTensorHandle made;
  if (aoti_torch__reinterpret_tensor(y.get(), y.dim(), sizes.data(), strides.data(), start,
                                     &made) == 0)
    return capsule_of(made);
  PyErr_SetString(PyExc_RuntimeError, "no view of the result");
  return nullptr;
}

Tensor rotated(const InputRotation& r, const Tensor& x) {
  return hadamard(x, r.su, std::nullopt, r.h, r.factor, r.block, true);
}

Tensor whole(const HeldLayer& layer, const Tensor& x) {
  return layer.product(layer.input ? rotated(*layer.input, x) : x);
}

PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

bool expects(Py_ssize_t given, Py_ssize_t wanted) {
  if (given == wanted) return true;
  PyErr_Format(PyExc_TypeError, "%zd arguments, expected %zd", given, wanted);
  return false;
}

using Call = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

// A call whose C++ exceptions become Python's.
template <Call call>
PyObject* guarded(PyObject* module, PyObject* const* args, Py_ssize_t count) {
  try {
    return call(module, args, count);
  } catch (const std::exception& e) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, e.what());
    return nullptr;
  }
}

template <Call call>
PyMethodDef method(const char* name) {
  const Call safe = guarded<call>;
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(safe)), METH_FASTCALL,
          nullptr};
}

// take(number, parameters, buffers, versioned: lists, handles of the values: list)
PyObject* take(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expects(count, 5)) return nullptr;
  Layer layer;
  {
    Table& t = table();
    const std::lock_guard<std::mutex> lock(t.mutex);
    const auto found = t.layers.find(PyLong_AsLongLong(args[0]));
    if (found == t.layers.end()) {
      PyErr_SetString(PyExc_ValueError, "no layer is held under this number");
      return nullptr;
    }
    layer = std::move(found->second);
    t.layers.erase(found);
  }
  std::vector<Tensor> values;
  std::vector<const void*> addresses;
  for (Py_ssize_t i = 0; i < PyList_Size(args[4]); ++i) {
    values.push_back(tensor_of(PyList_GetItem(args[4], i)));
    addresses.push_back(values.back().const_data_ptr());
  }
  const int device = layer->device();
  Held* held = new Held{std::move(layer), device, Objects(args[1]), Objects(args[2]),
                        Objects(args[3]), {}, std::move(values), std::move(addresses)};
  for (PyObject* value : held->versioned.all()) held->versions.push_back(version_of(value));
  PyObject* capsule = PyErr_Occurred() ? nullptr : PyCapsule_New(held, kHeld, [](PyObject* c) {
    delete static_cast<Held*>(PyCapsule_GetPointer(c, kHeld));
  });
  if (!capsule) delete held;
  return capsule;
}

// The held layer of args (held, parameters, buffers: dicts), if they are what was held and x is on
// its device; else null, perhaps with an exception.
const HeldLayer* valid(PyObject* const* args, const Tensor& x) {
  const Held& held = held_of(args[0]);
  const bool same =
      x.get_device_index() == held.device && is_as_held(held, args[1], args[2]);
  return same && !PyErr_Occurred() ? held.layer.get() : nullptr;
}

// linear(held, parameters, buffers, x) -> y, or None where they are not what was held
PyObject* linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expects(count, 4)) return nullptr;
  const Tensor x = tensor_of(args[3]);
  const HeldLayer* layer = valid(args, x);
  if (!layer) return PyErr_Occurred() ? nullptr : none();
  return capsule_of(without_gil([&] { return whole(*layer, x); }));
}

// parts(held, parameters, buffers, x, sizes: list) -> [y of each part], or None
PyObject* parts(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expects(count, 5)) return nullptr;
  const Tensor x = tensor_of(args[3]);
  const HeldLayer* layer = valid(args, x);
  if (!layer) return PyErr_Occurred() ? nullptr : none();
  const std::optional<Tensor> y = without_gil([&] { return whole(*layer, x); });
  PyObject* found = y ? PyList_New(0) : nullptr;
  int64_t start = 0;
  for (Py_ssize_t i = 0; found && i < PyList_Size(args[4]); ++i) {
    const int64_t size = PyLong_AsLongLong(PyList_GetItem(args[4], i));
    PyObject* part = columns_of(*y, start, size);
    if (!part || PyList_Append(found, part) != 0) {
      Py_DECREF(found);
      found = nullptr;
    }
    Py_XDECREF(part);
    start += size;
  }
  return found;
}

// is_valid(held, parameters, buffers, x) -> bool
PyObject* is_valid(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expects(count, 4)) return nullptr;
  const bool same = valid(args, tensor_of(args[3])) != nullptr;
  return PyErr_Occurred() ? nullptr : PyBool_FromLong(same);
}

// Both halves of linear, for layers that share a rotation of their input: rotation(held, x),
// product(held, z).
PyObject* rotation(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expects(count, 2)) return nullptr;
  const Tensor x = tensor_of(args[1]);
  const HeldLayer& layer = *held_of(args[0]).layer;
  CHECK(layer.input, "this layer does not rotate its input");
  return capsule_of(without_gil([&] { return rotated(*layer.input, x); }));
}

PyObject* product(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expects(count, 2)) return nullptr;
  const Tensor z = tensor_of(args[1]);
  const HeldLayer& layer = *held_of(args[0]).layer;
  return capsule_of(without_gil([&] { return layer.product(z); }));
}

}  // namespace

namespace aqlm_ops {

int64_t hold(std::unique_ptr<const HeldLayer> layer) {
  Table& t = table();
  const std::lock_guard<std::mutex> lock(t.mutex);
  t.layers.emplace(++t.last, std::move(layer));
  return t.last;
}

}  // namespace aqlm_ops

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cuda() {
  static PyMethodDef methods[] = {
      method<take>("take_held"),
      method<linear>("held_linear"),
      method<parts>("held_parts"),
      method<is_valid>("held_is_valid"),
      method<rotation>("held_rotation"),
      method<product>("held_product"),
      {nullptr, nullptr, 0, nullptr},
  };
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods,
                               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
