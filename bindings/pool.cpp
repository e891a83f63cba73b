// Blocks of the pool as DLPack tensors: a framework that takes one calls its deleter when the last
// tensor on it is gone, and the block goes back.
#include "pool.h"

#include <memory>

#include "addresses.h"

namespace py = pybind11;

namespace {

// DLPack's structures, as every version up to 1 lays them out in a capsule named "dltensor".
struct Device {
  std::int32_t type, index;
};
struct Element {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  std::int32_t axes;
  Element element;
  std::int64_t *shape, *strides;
  std::uint64_t offset;
};
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

constexpr std::int32_t kCpu = 1;

// What a tensor needs until its deleter is called.
struct Loan {
  irl::Block block;
  Axes shape, strides;
  Managed managed;
};

// Called by any thread, with Python's lock or without it, and after Python has ended.
void end_loan(Managed* managed) {
  auto* loan = static_cast<Loan*>(managed->context);
  irl::Pool::instance().give_back(loan->block);
  delete loan;
}

// A capsule that nobody has taken still has its name.
void drop(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor"))
    end_loan(static_cast<Managed*>(PyCapsule_GetPointer(capsule, "dltensor")));
}

Element element_of(const std::string& dtype) {
  if (dtype == "float64") return {2, 64, 1};
  switch (parse_dtype(dtype)) {
    case irl::Dtype::float32:
      return {2, 32, 1};
    case irl::Dtype::float16:
      return {2, 16, 1};
    default:
      return {4, 16, 1};
  }
}

py::object empty(Axes shape, Axes strides, const std::string& dtype) {
  const Element element = element_of(dtype);
  const irl::Layout layout = parse_layout("strides", shape, strides);
  for (const std::int64_t stride : strides)
    if (stride < 0)
      throw std::invalid_argument("strides holds " + std::to_string(stride) +
                                  ", accepted are >= 0");
  const std::int64_t count = layout.rows() == 0 ? 0 : layout.span().second + 1;
  auto loan = std::make_unique<Loan>();
  loan->shape = std::move(shape);
  loan->strides = std::move(strides);
  loan->block = irl::Pool::instance().take(count * (element.bits / 8));
  loan->managed = {{loan->block.at,
                    {kCpu, 0},
                    static_cast<std::int32_t>(loan->shape.size()),
                    element,
                    loan->shape.data(),
                    loan->strides.data(),
                    0},
                   loan.get(),
                   &end_loan};
  PyObject* capsule = PyCapsule_New(&loan->managed, "dltensor", &drop);
  if (!capsule) {
    irl::Pool::instance().give_back(loan->block);
    throw py::error_already_set();
  }
  (void)loan.release();
  return py::reinterpret_steal<py::object>(capsule);
}

void set_limit(std::int64_t bytes) {
  if (bytes < 0)
    throw std::invalid_argument("bytes is " + std::to_string(bytes) + ", accepted are >= 0");
  py::gil_scoped_release released;
  irl::Pool::instance().set_limit(bytes);
}

}  // namespace

void define_pool(py::module_& module) {
  using py::arg;
  module.def("pool_empty", &empty, arg("shape"), arg("strides"), arg("dtype"));
  module.def("pool_set_limit", &set_limit, arg("bytes"));
  module.def("pool_limit", [] { return irl::Pool::instance().limit(); });
  module.def("pool_idle", [] { return irl::Pool::instance().idle(); });
  module.def(
      "pool_release", [] { return irl::Pool::instance().release(); },
      py::call_guard<py::gil_scoped_release>());
}
