// Whole calls, of a loss and of token_stats: the options of a call one by one, addresses for
// arrays, 0 for those that are not there, so that calls of the same numbers share one record. And
// the stages of a call, for the test that holds all forms equal.
#include <algorithm>

#include "addresses.h"
#include "drive.h"

namespace py = pybind11;
using irl::algebra::Call;
using py::arg;

namespace {

void set_boundary(Call& call, const std::string& name) {
  using irl::algebra::Boundary;
  if (name != "terminal" && name != "bootstrap" && name != "drop")
    throw std::invalid_argument("boundary is '" + name +
                                "', accepted are terminal, bootstrap, drop");
  call.sequence.boundary = name == "terminal"    ? Boundary::terminal
                           : name == "bootstrap" ? Boundary::bootstrap
                                                 : Boundary::drop;
}

// Sets a field that is a pointer, from an address.
template <class Record, class T>
auto address_of(Record Call::* record, const T* Record::* field) {
  return [=](Call& call, Address at) { call.*record.*field = pointer<const T>(at); };
}

template <class Record, class T>
auto value_of(Record Call::* record, T Record::* field) {
  return [=](Call& call, T x) { call.*record.*field = std::move(x); };
}

template <class Record>
auto flags_of(Record Call::* record, irl::algebra::Flags Record::* field) {
  return [=](Call& call, Address at, bool by_row) {
    call.*record.*field = {pointer<const std::uint8_t>(at), by_row};
  };
}

auto numbers_of(irl::algebra::Numbers irl::algebra::Terms::* field) {
  return [=](Call& call, double number, Address at) {
    call.terms.*field = {number, pointer<const float>(at)};
  };
}

struct Shape {
  const irl::Isa& isa;
  irl::Rows rows;
  std::int64_t threads;
};

Shape shape_of(const std::string& dtype, const Axes& sizes, Axes strides, std::int64_t vocab,
               std::int64_t threads, const std::string& isa) {
  return {irl::find_isa(isa), parse_rows(dtype, sizes, std::move(strides), vocab),
          parse_threads(threads)};
}

// The options, and the labels of sequences that the last axis of `sizes` holds the rows of.
Call call_on(const Call& options, Address labels, const Axes& sizes) {
  if (sizes.empty()) throw std::invalid_argument("sizes has no entries, accepted are 1 or more");
  Call call = options;
  call.labels = pointer<const std::int64_t>(labels);
  call.length = std::max<std::int64_t>(sizes.back(), 1);
  return call;
}

irl::algebra::Outputs outputs(Address dlogits, const Axes& sizes, Axes strides, Address row_losses,
                              Address dvalues, Address dnext_values) {
  irl::algebra::Outputs out;
  out.dlogits = pointer<void>(dlogits);
  if (dlogits) out.layout = parse_layout("dlogits_strides", sizes, std::move(strides));
  out.row_losses = pointer<float>(row_losses);
  out.dvalues = pointer<float>(dvalues);
  out.dnext_values = pointer<float>(dnext_values);
  return out;
}

irl::algebra::Kept kept_at(const std::vector<Address>& at) {
  return {pointer<float>(at.at(0)), pointer<float>(at.at(1)), pointer<float>(at.at(2))};
}

py::object loss(Address logits, const std::string& dtype, const Axes& sizes, Axes strides,
                std::int64_t vocab, const Call& options, Address labels, double above,
                Address above_rows, const std::vector<Address>& kept, Address dlogits,
                Axes dlogits_strides, Address row_losses, Address dvalues, Address dnext_values,
                std::int64_t threads, double logit_scale, double softcap, const std::string& isa) {
  const Shape shape = shape_of(dtype, sizes, std::move(strides), vocab, threads, isa);
  Call call = call_on(options, labels, sizes);
  call.above = {above, pointer<const float>(above_rows)};
  const irl::Readout readout = parse_readout(logit_scale, softcap);
  const auto out =
      outputs(dlogits, sizes, std::move(dlogits_strides), row_losses, dvalues, dnext_values);
  irl::algebra::Total sums;
  std::int64_t bad;
  {
    py::gil_scoped_release released;
    bad = irl::algebra::loss(shape.isa, shape.threads, shape.rows, pointer<const void>(logits),
                             readout, call, kept_at(kept), out, sums);
  }
  if (bad >= 0) return py::int_(bad);
  return py::make_tuple(sums.loss, sums.nll, sums.value, sums.entropy, sums.td, sums.reward,
                        sums.accuracy, sums.z, sums.tokens);
}

void loss_grad(Address logits, const std::string& dtype, const Axes& sizes, Axes strides,
               std::int64_t vocab, const Call& options, Address labels, double above,
               Address above_rows, const std::vector<Address>& kept, Address dlogits,
               Axes dlogits_strides, Address dvalues, Address dnext_values, std::int64_t threads,
               double logit_scale, double softcap, const std::string& isa) {
  const Shape shape = shape_of(dtype, sizes, std::move(strides), vocab, threads, isa);
  Call call = call_on(options, labels, sizes);
  call.above = {above, pointer<const float>(above_rows)};
  const irl::Readout readout = parse_readout(logit_scale, softcap);
  const auto out = outputs(dlogits, sizes, std::move(dlogits_strides), 0, dvalues, dnext_values);
  py::gil_scoped_release released;
  irl::algebra::loss_grad(shape.isa, shape.threads, shape.rows, pointer<const void>(logits),
                          readout, call, kept_at(kept), out);
}

irl::algebra::TokenStats stats_at(const std::vector<Address>& at) {
  return {pointer<float>(at.at(0)),        pointer<float>(at.at(1)), pointer<float>(at.at(2)),
          pointer<float>(at.at(3)),        pointer<float>(at.at(4)), pointer<std::int8_t>(at.at(5)),
          pointer<std::uint8_t>(at.at(6)), pointer<float>(at.at(7)), pointer<float>(at.at(8)),
          pointer<std::int64_t>(at.at(9))};
}

std::int64_t token_stats(Address logits, const std::string& dtype, const Axes& sizes, Axes strides,
                         std::int64_t vocab, const Call& options, Address labels,
                         const std::vector<Address>& out, std::int64_t threads, double logit_scale,
                         double softcap, const std::string& isa) {
  const Shape shape = shape_of(dtype, sizes, std::move(strides), vocab, threads, isa);
  const Call call = call_on(options, labels, sizes);
  const irl::Readout readout = parse_readout(logit_scale, softcap);
  const auto to = stats_at(out);
  py::gil_scoped_release released;
  return irl::algebra::token_stats(shape.isa, shape.threads, shape.rows,
                                   pointer<const void>(logits), readout, call, to);
}

void token_stats_grad(Address logits, const std::string& dtype, const Axes& sizes, Axes strides,
                      std::int64_t vocab, const Call& call, const std::vector<Address>& kept,
                      const std::vector<Address>& above, Address dlogits, Axes dlogits_strides,
                      Address dvalues, Address dnext_values, std::int64_t threads,
                      double logit_scale, double softcap, const std::string& isa) {
  const Shape shape = shape_of(dtype, sizes, std::move(strides), vocab, threads, isa);
  const irl::Readout readout = parse_readout(logit_scale, softcap);
  const auto from = stats_at(kept);
  const auto given = [&](std::size_t i) { return pointer<const float>(above.at(i)); };
  const irl::algebra::TokenGradients gradients = {given(0), given(1), given(2), given(3), given(4)};
  const auto out = outputs(dlogits, sizes, std::move(dlogits_strides), 0, dvalues, dnext_values);
  py::gil_scoped_release released;
  irl::algebra::token_stats_grad(shape.isa, shape.threads, shape.rows, pointer<const void>(logits),
                                 readout, call, from, gradients, out);
}

// Every stage on row statistics that are given: what it returns, by name.
py::dict stages(const Call& options, Address labels, const Axes& sizes, double above,
                Address above_rows, std::int64_t vocab, const std::vector<float>& row_max,
                const std::vector<float>& logsum, const std::vector<float>& label_logit,
                const std::vector<float>& entropy) {
  using namespace irl::algebra;
  Call call = call_on(options, labels, sizes);
  call.above = {above, pointer<const float>(above_rows)};
  py::dict out;
  const auto n = static_cast<std::int64_t>(row_max.size());
  const Rows rows = align(call, n, vocab);
  out["labels"] = rows.labels;
  out["kind"] = std::vector<int>(rows.kind.begin(), rows.kind.end());
  const Objective weights = weigh(call, rows);
  out["mle"] = weights.mle;
  out["td"] = weights.td;
  const Coefficients given = coefficients(call, rows, weights, label_logit);
  out["alpha"] = given.alpha;
  out["beta"] = given.beta;
  out["entropy_weight"] = given.entropy_weight;
  const Statistics stats = {row_max, logsum, label_logit, entropy};
  const Finished done = finish(call, rows, weights, &given, stats);
  out["value"] = done.value;
  out["logprob"] = done.logprob;
  out["next_value"] = done.next_value;
  out["reward"] = done.reward;
  out["slope"] = done.slope;
  out["element"] = done.element;
  std::vector<float> dvalues(row_max.size()), dnext_values(row_max.size()), per_row(row_max.size());
  head_gradients(call, rows, done, dvalues.data(), dnext_values.data());
  out["dvalues"] = dvalues;
  out["dnext_values"] = dnext_values;
  const Total sums = total(call, rows, weights, stats, done, per_row.data());
  out["row_losses"] = per_row;
  out["total"] = std::vector<double>{sums.loss,   sums.nll,      sums.value, sums.entropy, sums.td,
                                     sums.reward, sums.accuracy, sums.z,     sums.tokens};
  return out;
}

}  // namespace

void define_calls(py::module_& module) {
  using irl::algebra::Heads;
  using irl::algebra::Sequence;
  using irl::algebra::Terms;
  using irl::algebra::Weighting;
  const auto sequence = &Call::sequence;
  const auto weighting = &Call::weighting;
  const auto terms = &Call::terms;
  const auto heads = &Call::heads;
  py::class_<Call>(module, "Call")
      .def(py::init<>())
      .def_property("ignore_index", nullptr, value_of(sequence, &Sequence::ignore_index))
      .def_property("shift", nullptr, value_of(sequence, &Sequence::shift))
      .def_property("eos_token_id", nullptr, value_of(sequence, &Sequence::eos_token_id))
      .def_property("boundary", nullptr, &set_boundary)
      .def_property("where", nullptr, address_of(sequence, &Sequence::where))
      .def_property("segment_ids", nullptr, address_of(sequence, &Sequence::segment_ids))
      .def_property("position_ids", nullptr, address_of(sequence, &Sequence::position_ids))
      .def_property("cu_seqlens", nullptr, value_of(sequence, &Sequence::cu_seqlens))
      .def("set_truncated", flags_of(sequence, &Sequence::truncated), arg("at"), arg("by_row"))
      .def_property("token_weights", nullptr, address_of(weighting, &Weighting::token_weights))
      .def(
          "set_num_items",
          [](Call& call, double expert, double agent) {
            call.weighting.counted = true;
            call.weighting.num_items[0] = expert;
            call.weighting.num_items[1] = agent;
          },
          arg("expert"), arg("agent"))
      .def_property("mean", nullptr, value_of(weighting, &Weighting::mean))
      .def("set_mle", numbers_of(&Terms::mle), arg("number"), arg("at"))
      .def("set_td", numbers_of(&Terms::td), arg("number"), arg("at"))
      .def("set_agent_td", numbers_of(&Terms::agent_td), arg("number"), arg("at"))
      .def_property("has_td", nullptr, value_of(terms, &Terms::has_td))
      .def("set_is_expert", flags_of(terms, &Terms::is_expert), arg("at"), arg("by_row"))
      .def_property("gamma", nullptr, value_of(terms, &Terms::gamma))
      .def("set_entropy_coef",
           [](Call& call, double x) {
             call.terms.has_entropy = true;
             call.terms.entropy_coef = x;
           })
      .def("set_z_loss",
           [](Call& call, double x) {
             call.terms.has_z = true;
             call.terms.z_loss = x;
           })
      .def_property("values", nullptr, address_of(heads, &Heads::values))
      .def_property("next_values", nullptr, address_of(heads, &Heads::next_values))
      .def_property("detach_next", nullptr, value_of(heads, &Heads::detach_next));
  module.def("loss", &loss, arg("logits"), arg("dtype"), arg("sizes"), arg("strides"), arg("vocab"),
             arg("call"), arg("labels"), arg("above"), arg("above_rows"), arg("kept"),
             arg("dlogits"), arg("dlogits_strides"), arg("row_losses"), arg("dvalues"),
             arg("dnext_values"), arg("threads"), arg("logit_scale") = 1.0, arg("softcap") = 0.0,
             arg("isa") = "");
  module.def("loss_grad", &loss_grad, arg("logits"), arg("dtype"), arg("sizes"), arg("strides"),
             arg("vocab"), arg("call"), arg("labels"), arg("above"), arg("above_rows"), arg("kept"),
             arg("dlogits"), arg("dlogits_strides"), arg("dvalues"), arg("dnext_values"),
             arg("threads"), arg("logit_scale") = 1.0, arg("softcap") = 0.0, arg("isa") = "");
  module.def("token_stats", &token_stats, arg("logits"), arg("dtype"), arg("sizes"), arg("strides"),
             arg("vocab"), arg("call"), arg("labels"), arg("out"), arg("threads"),
             arg("logit_scale") = 1.0, arg("softcap") = 0.0, arg("isa") = "");
  module.def("token_stats_grad", &token_stats_grad, arg("logits"), arg("dtype"), arg("sizes"),
             arg("strides"), arg("vocab"), arg("call"), arg("kept"), arg("above"), arg("dlogits"),
             arg("dlogits_strides"), arg("dvalues"), arg("dnext_values"), arg("threads"),
             arg("logit_scale") = 1.0, arg("softcap") = 0.0, arg("isa") = "");
  module.def("stages", &stages, arg("call"), arg("labels"), arg("sizes"), arg("above"),
             arg("above_rows"), arg("vocab"), arg("row_max"), arg("logsum"), arg("label_logit"),
             arg("entropy"));
}
