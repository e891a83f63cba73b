// The row measures: addresses for arrays, 0 for those that are not there.
#include "measures.h"

#include "addresses.h"

namespace py = pybind11;
using py::arg;

namespace {

// (scale, keep_mask, the strides of keep_mask, keep_above)
using View = std::tuple<Address, Address, Axes, Address>;

irl::RowView view_of(const View& given, const Axes& sizes) {
  const auto& [scale, mask, strides, above] = given;
  irl::RowView view;
  view.scale = pointer<const float>(scale);
  view.keep_mask = pointer<const std::uint8_t>(mask);
  if (mask) view.keep_layout = parse_layout("the strides of keep_mask", sizes, strides);
  view.keep_above = pointer<const float>(above);
  return view;
}

void row_measures(Address logits, const std::string& dtype, const Axes& sizes, Axes strides,
                  std::int64_t vocab, Address ids, std::int64_t count,
                  const std::vector<Address>& out, const View& view, std::int64_t threads,
                  const std::string& isa, double logit_scale, double softcap) {
  const irl::Isa& chosen = irl::find_isa(isa);
  const irl::Rows rows = parse_rows(dtype, sizes, std::move(strides), vocab);
  const std::int64_t workers = parse_threads(threads);
  const irl::Readout readout = parse_readout(logit_scale, softcap);
  const irl::RowView seen = view_of(view, sizes);
  const auto at = [&](std::size_t i) { return pointer<float>(out.at(i)); };
  const irl::RowMeasures to = {at(0), at(1), at(2), at(3), at(4), pointer<std::int64_t>(out.at(5)),
                               at(6), at(7)};
  py::gil_scoped_release released;
  irl::row_measures(chosen, workers, rows, pointer<const void>(logits),
                    pointer<const std::int64_t>(ids), count, to, readout, seen);
}

void row_measures_grad(Address logits, const std::string& dtype, const Axes& sizes, Axes strides,
                       std::int64_t vocab, Address ids, std::int64_t count, Address row_max,
                       Address logsum, const std::vector<Address>& slopes, Address dlogits,
                       Axes dlogits_strides, const View& view, std::int64_t threads,
                       const std::string& isa, double logit_scale, double softcap) {
  const irl::Isa& chosen = irl::find_isa(isa);
  const irl::Rows rows = parse_rows(dtype, sizes, std::move(strides), vocab);
  const irl::Layout layout = parse_layout("dlogits_strides", sizes, std::move(dlogits_strides));
  const std::int64_t workers = parse_threads(threads);
  const irl::Readout readout = parse_readout(logit_scale, softcap);
  const irl::RowView seen = view_of(view, sizes);
  const auto at = [&](std::size_t i) { return pointer<const float>(slopes.at(i)); };
  const irl::RowSlopes given = {at(0), at(1), at(2), at(3), at(4)};
  py::gil_scoped_release released;
  irl::row_measures_grad(chosen, workers, rows, pointer<const void>(logits),
                         pointer<const std::int64_t>(ids), count, pointer<const float>(row_max),
                         pointer<const float>(logsum), given, pointer<void>(dlogits), layout,
                         readout, seen);
}

}  // namespace

void define_measures(py::module_& module) {
  module.def("row_measures", &row_measures, arg("logits"), arg("dtype"), arg("sizes"),
             arg("strides"), arg("vocab"), arg("ids"), arg("count"), arg("out"), arg("view"),
             arg("threads"), arg("isa") = "", arg("logit_scale") = 1.0, arg("softcap") = 0.0);
  module.def("row_measures_grad", &row_measures_grad, arg("logits"), arg("dtype"), arg("sizes"),
             arg("strides"), arg("vocab"), arg("ids"), arg("count"), arg("row_max"), arg("logsum"),
             arg("slopes"), arg("dlogits"), arg("dlogits_strides"), arg("view"), arg("threads"),
             arg("isa") = "", arg("logit_scale") = 1.0, arg("softcap") = 0.0);
}
