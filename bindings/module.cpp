// irl_ops._native: the row kernels behind raw addresses. Links no framework.
#include <string>
#include <utility>

#include "addresses.h"
#include "threads.h"

namespace py = pybind11;

namespace {

void row_stats(Address logits, const std::string& dtype, const Axes& sizes, Axes strides,
               std::int64_t vocab, Address labels, Address row_max, Address logsum,
               Address label_logit, Address entropy, std::int64_t threads, const std::string& isa,
               double logit_scale, double softcap) {
  const irl::Isa& chosen = irl::find_isa(isa);
  const irl::Rows rows = parse_rows(dtype, sizes, std::move(strides), vocab);
  const std::int64_t workers = parse_threads(threads);
  const irl::Readout readout = parse_readout(logit_scale, softcap);
  py::gil_scoped_release released;
  irl::row_stats(chosen, workers, rows, pointer<const void>(logits),
                 pointer<const std::int64_t>(labels), pointer<float>(row_max),
                 pointer<float>(logsum), pointer<float>(label_logit), pointer<float>(entropy),
                 readout);
}

void row_grad(Address logits, const std::string& dtype, const Axes& sizes, Axes strides,
              std::int64_t vocab, Address labels, Address row_max, Address logsum, Address a,
              Address b, Address c, Address dlogits, Axes dlogits_strides, std::int64_t threads,
              const std::string& isa, double logit_scale, double softcap) {
  const irl::Isa& chosen = irl::find_isa(isa);
  const irl::Rows rows = parse_rows(dtype, sizes, std::move(strides), vocab);
  const irl::Layout layout = parse_layout("dlogits_strides", sizes, std::move(dlogits_strides));
  const std::int64_t workers = parse_threads(threads);
  const irl::Readout readout = parse_readout(logit_scale, softcap);
  py::gil_scoped_release released;
  irl::row_grad(chosen, workers, rows, pointer<const void>(logits),
                pointer<const std::int64_t>(labels), pointer<const float>(row_max),
                pointer<const float>(logsum), pointer<const float>(a), pointer<const float>(b),
                pointer<const float>(c), pointer<void>(dlogits), layout, readout);
}

void row_stats_grad(Address logits, const std::string& dtype, const Axes& sizes, Axes strides,
                    std::int64_t vocab, Address alpha, Address beta, Address entropy_weight,
                    Address row_max, Address logsum, Address entropy, Address dlogits,
                    Axes dlogits_strides, std::int64_t threads, const std::string& isa,
                    double logit_scale, double softcap) {
  const irl::Isa& chosen = irl::find_isa(isa);
  const irl::Rows rows = parse_rows(dtype, sizes, std::move(strides), vocab);
  const irl::Layout layout = parse_layout("dlogits_strides", sizes, std::move(dlogits_strides));
  const std::int64_t workers = parse_threads(threads);
  const irl::Readout readout = parse_readout(logit_scale, softcap);
  py::gil_scoped_release released;
  irl::row_stats_grad(
      chosen, workers, rows, pointer<const void>(logits), pointer<const float>(alpha),
      pointer<const float>(beta), pointer<const float>(entropy_weight), pointer<float>(row_max),
      pointer<float>(logsum), pointer<float>(entropy), pointer<void>(dlogits), layout, readout);
}

void label_logit(Address logits, const std::string& dtype, const Axes& sizes, Axes strides,
                 std::int64_t vocab, Address labels, Address picked, const std::string& isa,
                 double logit_scale, double softcap) {
  const irl::Isa& chosen = irl::find_isa(isa);
  const irl::Rows rows = parse_rows(dtype, sizes, std::move(strides), vocab);
  const irl::Readout readout = parse_readout(logit_scale, softcap);
  py::gil_scoped_release released;
  irl::label_logit(rows, pointer<const void>(logits), pointer<const std::int64_t>(labels),
                   pointer<float>(picked), readout, &chosen);
}

void set_label(Address dlogits, const std::string& dtype, const Axes& sizes, Axes strides,
               std::int64_t vocab, Address labels, Address elements, Address label_logit,
               double logit_scale, double softcap) {
  const irl::Rows rows = parse_rows(dtype, sizes, std::move(strides), vocab);
  const irl::Readout readout = parse_readout(logit_scale, softcap);
  if (softcap != 0 && !label_logit)
    throw std::invalid_argument("label_logit is 0, a softcap needs it");
  py::gil_scoped_release released;
  irl::set_label(rows, pointer<void>(dlogits), pointer<const std::int64_t>(labels),
                 pointer<const float>(elements), pointer<const float>(label_logit), readout);
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
             arg("entropy"), arg("threads"), arg("isa") = "", arg("logit_scale") = 1.0,
             arg("softcap") = 0.0);
  module.def("row_grad", &row_grad, arg("logits"), arg("dtype"), arg("sizes"), arg("strides"),
             arg("vocab"), arg("labels"), arg("row_max"), arg("logsum"), arg("a"), arg("b"),
             arg("c"), arg("dlogits"), arg("dlogits_strides"), arg("threads"), arg("isa") = "",
             arg("logit_scale") = 1.0, arg("softcap") = 0.0);
  module.def("row_stats_grad", &row_stats_grad, arg("logits"), arg("dtype"), arg("sizes"),
             arg("strides"), arg("vocab"), arg("alpha"), arg("beta"), arg("entropy_weight"),
             arg("row_max"), arg("logsum"), arg("entropy"), arg("dlogits"), arg("dlogits_strides"),
             arg("threads"), arg("isa") = "", arg("logit_scale") = 1.0, arg("softcap") = 0.0);
  module.def("label_logit", &label_logit, arg("logits"), arg("dtype"), arg("sizes"), arg("strides"),
             arg("vocab"), arg("labels"), arg("label_logit"), arg("isa") = "",
             arg("logit_scale") = 1.0, arg("softcap") = 0.0);
  module.def("set_label", &set_label, arg("dlogits"), arg("dtype"), arg("sizes"), arg("strides"),
             arg("vocab"), arg("labels"), arg("elements"), arg("label_logit") = 0,
             arg("logit_scale") = 1.0, arg("softcap") = 0.0);
  module.def("scale", &scale, arg("dlogits"), arg("dtype"), arg("sizes"), arg("strides"),
             arg("vocab"), arg("factor"), arg("threads"), arg("isa") = "");
  module.def(
      "use_openmp",
      [](Address parallel) { irl::use_openmp(reinterpret_cast<irl::GompParallel>(parallel)); },
      arg("parallel"));
  define_calls(module);
  define_measures(module);
  define_xla(module);
  define_pool(module);
  module.def("isa", [] { return irl::find_isa("").name; });
  module.def("isas", &isas);
}
