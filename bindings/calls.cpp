// A whole loss call: its fields one by one, addresses for arrays, 0 for those that are not there.
#include "calls.h"

#include "addresses.h"

namespace py = pybind11;

namespace {

// Sets a field that is a pointer, from an address.
template <class T>
auto address_of(const T* irl::Call::* field) {
  return [field](irl::Call& call, Address at) { call.*field = pointer<const T>(at); };
}

void set_flags(irl::Flags& flags, Address at, bool by_row) {
  flags.at = pointer<const std::uint8_t>(at);
  flags.by_row = by_row;
}

void set_boundary(irl::Call& call, const std::string& name) {
  if (name != "terminal" && name != "bootstrap" && name != "drop")
    throw std::invalid_argument("boundary is '" + name +
                                "', accepted are terminal, bootstrap, drop");
  call.boundary = name == "terminal"    ? irl::Boundary::terminal
                  : name == "bootstrap" ? irl::Boundary::bootstrap
                                        : irl::Boundary::drop;
}

py::object loss_and_grad(Address logits, const std::string& dtype, const Axes& sizes, Axes strides,
                         std::int64_t vocab, const irl::Call& call, Address dlogits,
                         Axes dlogits_strides, Address dvalues, Address dnext_values,
                         std::int64_t threads, const std::string& isa) {
  const irl::Isa& chosen = irl::find_isa(isa);
  const irl::Rows rows = parse_rows(dtype, sizes, std::move(strides), vocab);
  const irl::Layout layout = parse_layout("dlogits_strides", sizes, std::move(dlogits_strides));
  const std::int64_t workers = parse_threads(threads);
  if (call.length < 1) throw std::invalid_argument("length is below 1");
  irl::Outcome out;
  {
    py::gil_scoped_release released;
    out = irl::loss_and_grad(chosen, workers, rows, pointer<const void>(logits), call,
                             pointer<void>(dlogits), layout, pointer<float>(dvalues),
                             pointer<float>(dnext_values));
  }
  if (out.bad_row >= 0) return py::int_(out.bad_row);
  return py::make_tuple(out.loss, out.nll, out.value, out.entropy, out.td, out.reward, out.tokens);
}

}  // namespace

void define_calls(py::module_& module) {
  using irl::Call;
  using py::arg;
  py::class_<Call>(module, "Call")
      .def(py::init<>())
      .def_readwrite("length", &Call::length)
      .def_property("labels", nullptr, address_of(&Call::labels))
      .def_readwrite("ignore_index", &Call::ignore_index)
      .def_property("where", nullptr, address_of(&Call::where))
      .def_readwrite("shift", &Call::shift)
      .def_property("segment_ids", nullptr, address_of(&Call::segment_ids))
      .def_property("position_ids", nullptr, address_of(&Call::position_ids))
      .def_readwrite("cu_seqlens", &Call::cu_seqlens)
      .def_readwrite("eos_token_ids", &Call::eos_token_ids)
      .def_property("boundary", nullptr, &set_boundary)
      .def(
          "set_truncated",
          [](Call& call, Address at, bool by_row) { set_flags(call.truncated, at, by_row); },
          arg("at"), arg("by_row"))
      .def_property("token_weights", nullptr, address_of(&Call::token_weights))
      .def_readwrite("td", &Call::td)
      .def(
          "set_is_expert",
          [](Call& call, Address at, bool by_row) { set_flags(call.is_expert, at, by_row); },
          arg("at"), arg("by_row"))
      .def_readwrite("lam", &Call::lam)
      .def_readwrite("gamma", &Call::gamma)
      .def_readwrite("alpha", &Call::alpha)
      .def_readwrite("entropy_coef", &Call::entropy_coef)
      .def_readwrite("entropy", &Call::entropy)
      .def_readwrite("mean", &Call::mean)
      .def_readwrite("counted", &Call::counted)
      .def_readwrite("expert_items", &Call::expert_items)
      .def_readwrite("agent_items", &Call::agent_items)
      .def_readwrite("detach_next", &Call::detach_next)
      .def_property("values", nullptr, address_of(&Call::values))
      .def_property("next_values", nullptr, address_of(&Call::next_values));
  module.def("loss_and_grad", &loss_and_grad, arg("logits"), arg("dtype"), arg("sizes"),
             arg("strides"), arg("vocab"), arg("call"), arg("dlogits"), arg("dlogits_strides"),
             arg("dvalues"), arg("dnext_values"), arg("threads"), arg("isa") = "");
}
