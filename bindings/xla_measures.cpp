// The row measures as targets of XLA's custom calls; see xla.cpp. What may be absent is told by
// attributes, strings of words: `given` names the arrays behind those that are always there, and
// `wanted` the results. ids and what is at them have an axis [..., K]; keep_mask is bool [..., V],
// top1 int32.
#ifdef IRL_OPS_XLA

#include <string_view>

#include "measures.h"
#include "xla_call.h"

namespace {

using namespace irl::xla_calls;

using Names = std::vector<std::string>;

// What the words of an attribute name, by their names.
template <class Remaining, class Item>
class Named {
 public:
  Named(Remaining items, const ffi::Dictionary& attributes, const char* attribute,
        const Names& accepted)
      : items_(items) {
    std::istringstream words(std::string(attributes.get<std::string_view>(attribute).value()));
    for (std::string word; words >> word;) {
      if (std::find(accepted.begin(), accepted.end(), word) == accepted.end())
        throw std::invalid_argument(std::string(attribute) + " names " + word);
      names_.push_back(word);
    }
    if (names_.size() != items.size())
      throw std::invalid_argument(std::string(attribute) + " has " + std::to_string(names_.size()) +
                                  " names for " + std::to_string(items.size()) + " arrays");
  }

  // What `as` makes of the array of that name, null where there is none.
  template <class As>
  auto get(const char* name, const As& as) const -> decltype(as(name, std::declval<Array&>())) {
    const auto at = std::find(names_.begin(), names_.end(), name);
    if (at == names_.end()) return nullptr;
    Item found = items_.template get<Array>(static_cast<std::size_t>(at - names_.begin())).value();
    if constexpr (std::is_same_v<Item, Output>)
      return as(name, *found);
    else
      return as(name, found);
  }

 private:
  Remaining items_;
  Names names_;
};

using Given = Named<ffi::RemainingArgs, Array>;
using Wanted = Named<ffi::RemainingRets, Output>;

auto vectors_of(const Call& call) {
  return [&](const char* name, const Array& array) { return call.vector(name, array); };
}

irl::RowView view_of(const Call& call, const Given& given) {
  irl::RowView view;
  view.scale = given.get("row_scale", vectors_of(call));
  view.keep_mask = given.get(
      "keep_mask", [&](const char* name, const Array& array) { return call.mask(name, array); });
  view.keep_layout = call.rows().layout;
  view.keep_above = given.get("keep_above", vectors_of(call));
  return view;
}

ffi::Error row_measures(ffi::ThreadPool pool, Array logits, Array ids, ffi::RemainingArgs rest,
                        Output row_max, Output logsum, Output picked, ffi::RemainingRets out,
                        ffi::Dictionary attributes) {
  return run([&] {
    Call call(logits);
    const std::int64_t* at = call.ids(ids);
    const Given given(rest, attributes, "given", {"row_scale", "keep_mask", "keep_above"});
    const Wanted wanted(out, attributes, "wanted",
                        {"entropy", "log_sum_sq", "top1", "mean_logit", "kept"});
    const auto vector = vectors_of(call);
    std::int32_t* top1 = wanted.get(
        "top1", [&](const char* name, const Array& array) { return call.integers(name, array); });
    std::vector<std::int64_t> top(top1 ? static_cast<std::size_t>(call.rows().layout.rows()) : 0);
    const irl::RowMeasures to = {vector("row_max", *row_max),      vector("logsum", *logsum),
                                 call.at_ids("picked", *picked),   wanted.get("entropy", vector),
                                 wanted.get("log_sum_sq", vector), top1 ? top.data() : nullptr,
                                 wanted.get("mean_logit", vector), wanted.get("kept", vector)};
    if (!to.mean_logit != !to.kept)
      throw std::invalid_argument("wanted has one of mean_logit and kept, accepted are both");
    irl::row_measures(irl::find_isa(""), team_of(pool), call.rows(), call.logits(), at,
                      call.count(), to, readout_of(attributes), view_of(call, given));
    for (std::size_t i = 0; i < top.size(); ++i) top1[i] = static_cast<std::int32_t>(top[i]);
  });
}

ffi::Error row_measures_grad(ffi::ThreadPool pool, Array logits, Array ids, Array row_max,
                             Array logsum, Array a, Array c, ffi::RemainingArgs rest,
                             Output dlogits, ffi::Dictionary attributes) {
  return run([&] {
    Call call(logits);
    const std::int64_t* at = call.ids(ids);
    const Given given(rest, attributes, "given",
                      {"b", "d", "e", "row_scale", "keep_mask", "keep_above"});
    const auto vector = vectors_of(call);
    const irl::RowSlopes slopes = {vector("a", a), given.get("b", vector), call.at_ids("c", c),
                                   given.get("d", vector), given.get("e", vector)};
    irl::row_measures_grad(irl::find_isa(""), team_of(pool), call.rows(), call.logits(), at,
                           call.count(), vector("row_max", row_max), vector("logsum", logsum),
                           slopes, call.gradient(*dlogits), call.rows().layout,
                           readout_of(attributes), view_of(call, given));
  });
}

XLA_FFI_DEFINE_HANDLER(kRowMeasures, row_measures,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Array>()
                           .Arg<Array>()
                           .RemainingArgs()
                           .Ret<Array>()
                           .Ret<Array>()
                           .Ret<Array>()
                           .RemainingRets()
                           .Attrs());
XLA_FFI_DEFINE_HANDLER(kRowMeasuresGrad, row_measures_grad,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Array>()
                           .Arg<Array>()
                           .Arg<Array>()
                           .Arg<Array>()
                           .Arg<Array>()
                           .Arg<Array>()
                           .RemainingArgs()
                           .Ret<Array>()
                           .Attrs());

}  // namespace

void irl::xla_calls::add_measures(pybind11::dict& targets) {
  targets["row_measures"] = target_of(kRowMeasures);
  targets["row_measures_grad"] = target_of(kRowMeasuresGrad);
}

#endif
