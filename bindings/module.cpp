// irl_ops._native: the row kernels behind raw addresses. Neither includes nor links a framework.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "rows.h"
#include "threads.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Axes = std::vector<std::int64_t>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

irl::Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return irl::Dtype::float32;
  if (name == "bfloat16") return irl::Dtype::bfloat16;
  if (name == "float16") return irl::Dtype::float16;
  throw std::invalid_argument("dtype is '" + name + "', accepted are float32, bfloat16, float16");
}

irl::Layout parse_layout(const char* name, const Axes& sizes, Axes strides) {
  if (strides.size() != sizes.size())
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(strides.size()) +
                                " entries, sizes has " + std::to_string(sizes.size()));
  for (const std::int64_t size : sizes)
    if (size < 0)
      throw std::invalid_argument("sizes holds " + std::to_string(size) + ", accepted are >= 0");
  return {sizes, std::move(strides)};
}

std::int64_t parse_threads(std::int64_t threads) {
  if (threads < 1)
    throw std::invalid_argument("threads is " + std::to_string(threads) + ", accepted are >= 1");
  return threads;
}

irl::Rows parse_rows(const std::string& dtype, const Axes& sizes, Axes strides,
                     std::int64_t vocab) {
  if (vocab < 0)
    throw std::invalid_argument("vocab is " + std::to_string(vocab) + ", accepted are >= 0");
  return {parse_dtype(dtype), vocab, parse_layout("strides", sizes, std::move(strides))};
}

void row_stats(Address logits, const std::string& dtype, const Axes& sizes, Axes strides,
               std::int64_t vocab, Address labels, Address row_max, Address logsum,
               Address label_logit, Address entropy, std::int64_t threads, const std::string& isa) {
  const irl::Isa& chosen = irl::find_isa(isa);
  const irl::Rows rows = parse_rows(dtype, sizes, std::move(strides), vocab);
  const std::int64_t workers = parse_threads(threads);
  py::gil_scoped_release released;
  irl::row_stats(chosen, workers, rows, pointer<const void>(logits),
                 pointer<const std::int64_t>(labels), pointer<float>(row_max),
                 pointer<float>(logsum), pointer<float>(label_logit), pointer<float>(entropy));
}

void row_grad(Address logits, const std::string& dtype, const Axes& sizes, Axes strides,
              std::int64_t vocab, Address labels, Address row_max, Address logsum, Address a,
              Address b, Address c, Address dlogits, Axes dlogits_strides, std::int64_t threads,
              const std::string& isa) {
  const irl::Isa& chosen = irl::find_isa(isa);
  const irl::Rows rows = parse_rows(dtype, sizes, std::move(strides), vocab);
  const irl::Layout layout = parse_layout("dlogits_strides", sizes, std::move(dlogits_strides));
  const std::int64_t workers = parse_threads(threads);
  py::gil_scoped_release released;
  irl::row_grad(chosen, workers, rows, pointer<const void>(logits),
                pointer<const std::int64_t>(labels), pointer<const float>(row_max),
                pointer<const float>(logsum), pointer<const float>(a), pointer<const float>(b),
                pointer<const float>(c), pointer<void>(dlogits), layout);
}

void row_stats_grad(Address logits, const std::string& dtype, const Axes& sizes, Axes strides,
                    std::int64_t vocab, Address alpha, Address beta, Address entropy_weight,
                    Address row_max, Address logsum, Address entropy, Address dlogits,
                    Axes dlogits_strides, std::int64_t threads, const std::string& isa) {
  const irl::Isa& chosen = irl::find_isa(isa);
  const irl::Rows rows = parse_rows(dtype, sizes, std::move(strides), vocab);
  const irl::Layout layout = parse_layout("dlogits_strides", sizes, std::move(dlogits_strides));
  const std::int64_t workers = parse_threads(threads);
  py::gil_scoped_release released;
  irl::row_stats_grad(
      chosen, workers, rows, pointer<const void>(logits), pointer<const float>(alpha),
      pointer<const float>(beta), pointer<const float>(entropy_weight), pointer<float>(row_max),
      pointer<float>(logsum), pointer<float>(entropy), pointer<void>(dlogits), layout);
}

void label_logit(Address logits, const std::string& dtype, const Axes& sizes, Axes strides,
                 std::int64_t vocab, Address labels, Address picked) {
  const irl::Rows rows = parse_rows(dtype, sizes, std::move(strides), vocab);
  py::gil_scoped_release released;
  irl::label_logit(rows, pointer<const void>(logits), pointer<const std::int64_t>(labels),
                   pointer<float>(picked));
}

void set_label(Address dlogits, const std::string& dtype, const Axes& sizes, Axes strides,
               std::int64_t vocab, Address labels, Address elements) {
  const irl::Rows rows = parse_rows(dtype, sizes, std::move(strides), vocab);
  py::gil_scoped_release released;
  irl::set_label(rows, pointer<void>(dlogits), pointer<const std::int64_t>(labels),
                 pointer<const float>(elements));
}

void scale(Address dlogits, const std::string& dtype, const Axes& sizes, Axes strides,
           std::int64_t vocab, float factor, std::int64_t threads, const std::string& isa) {
  const irl::Isa& chosen = irl::find_isa(isa);
  const irl::Rows rows = parse_rows(dtype, sizes, std::move(strides), vocab);
  const std::int64_t workers = parse_threads(threads);
  py::gil_scoped_release released;
  irl::scale(chosen, workers, rows, pointer<void>(dlogits), factor);
}

py::tuple isas() {
  py::list names;
  for (const irl::Isa* isa : irl::isas()) names.append(isa->name);
  return py::tuple(names);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  using py::arg;
  module.doc() = "The C++ row kernels behind raw addresses; callers own every check and buffer.";
  module.def("row_stats", &row_stats, arg("logits"), arg("dtype"), arg("sizes"), arg("strides"),
             arg("vocab"), arg("labels"), arg("row_max"), arg("logsum"), arg("label_logit"),
             arg("entropy"), arg("threads"), arg("isa") = "");
  module.def("row_grad", &row_grad, arg("logits"), arg("dtype"), arg("sizes"), arg("strides"),
             arg("vocab"), arg("labels"), arg("row_max"), arg("logsum"), arg("a"), arg("b"),
             arg("c"), arg("dlogits"), arg("dlogits_strides"), arg("threads"), arg("isa") = "");
  module.def("row_stats_grad", &row_stats_grad, arg("logits"), arg("dtype"), arg("sizes"),
             arg("strides"), arg("vocab"), arg("alpha"), arg("beta"), arg("entropy_weight"),
             arg("row_max"), arg("logsum"), arg("entropy"), arg("dlogits"), arg("dlogits_strides"),
             arg("threads"), arg("isa") = "");
  module.def("label_logit", &label_logit, arg("logits"), arg("dtype"), arg("sizes"), arg("strides"),
             arg("vocab"), arg("labels"), arg("label_logit"));
  module.def("set_label", &set_label, arg("dlogits"), arg("dtype"), arg("sizes"), arg("strides"),
             arg("vocab"), arg("labels"), arg("elements"));
  module.def("scale", &scale, arg("dlogits"), arg("dtype"), arg("sizes"), arg("strides"),
             arg("vocab"), arg("factor"), arg("threads"), arg("isa") = "");
  module.def(
      "use_openmp",
      [](Address parallel) { irl::use_openmp(reinterpret_cast<irl::GompParallel>(parallel)); },
      arg("parallel"));
  module.def("isa", [] { return irl::find_isa("").name; });
  module.def("isas", &isas);
}
