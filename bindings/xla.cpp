// The row kernels as targets of XLA's custom calls on CPUs, with the threads of XLA's own pool. The
// files named xla are all that see XLA's headers; without them they offer no targets.
//
// Logits and dlogits are [..., V], contiguous, of float32, bfloat16 or float16; labels [...] of
// int32 or int64; all other arrays float32 [...]. A gradient may take the place of its logits. The
// float32 attributes logit_scale and softcap may be left out: 1 and 0.
#include "addresses.h"

namespace py = pybind11;

#ifdef IRL_OPS_XLA

#include "xla_call.h"

namespace {

using namespace irl::xla_calls;

ffi::Error row_stats(ffi::ThreadPool pool, Array logits, Array labels, Output row_max,
                     Output logsum, Output label_logit, std::optional<Output> entropy,
                     ffi::Dictionary attributes) {
  return run([&] {
    Call call(logits);
    irl::row_stats(irl::find_isa(""), team_of(pool), call.rows(), call.logits(),
                   call.labels(labels), call.vector("row_max", *row_max),
                   call.vector("logsum", *logsum), call.vector("label_logit", *label_logit),
                   entropy ? call.vector("entropy", **entropy) : nullptr, readout_of(attributes));
  });
}

ffi::Error row_grad(ffi::ThreadPool pool, Array logits, Array labels, Array row_max, Array logsum,
                    Array a, Array b, Array c, Output dlogits, ffi::Dictionary attributes) {
  return run([&] {
    Call call(logits);
    irl::row_grad(irl::find_isa(""), team_of(pool), call.rows(), call.logits(), call.labels(labels),
                  call.vector("row_max", row_max), call.vector("logsum", logsum),
                  call.vector("a", a), call.vector("b", b), call.vector("c", c),
                  call.gradient(*dlogits), call.rows().layout, readout_of(attributes));
  });
}

ffi::Error row_stats_grad(ffi::ThreadPool pool, Array logits, Array alpha, Array beta,
                          std::optional<Array> entropy_weight, Output row_max, Output logsum,
                          Output dlogits, std::optional<Output> entropy,
                          ffi::Dictionary attributes) {
  return run([&] {
    Call call(logits);
    irl::row_stats_grad(irl::find_isa(""), team_of(pool), call.rows(), call.logits(),
                        call.vector("alpha", alpha), call.vector("beta", beta),
                        entropy_weight ? call.vector("entropy_weight", *entropy_weight) : nullptr,
                        call.vector("row_max", *row_max), call.vector("logsum", *logsum),
                        entropy ? call.vector("entropy", **entropy) : nullptr,
                        call.gradient(*dlogits), call.rows().layout, readout_of(attributes));
  });
}

ffi::Error label_logit(Array logits, Array labels, Output picked, ffi::Dictionary attributes) {
  return run([&] {
    Call call(logits);
    irl::label_logit(call.rows(), call.logits(), call.labels(labels),
                     call.vector("label_logit", *picked), readout_of(attributes));
  });
}

// Only in place: the other elements are there already.
ffi::Error set_label(Array dlogits, Array labels, Array elements, std::optional<Array> label_logit,
                     Output written, ffi::Dictionary attributes) {
  return run([&] {
    Call call(dlogits, "dlogits");
    if (call.gradient(*written) != call.logits())
      throw std::invalid_argument("dlogits has to be the memory of the result");
    const irl::Readout readout = readout_of(attributes);
    if (readout.softcap != 0 && !label_logit)
      throw std::invalid_argument("label_logit is absent, a softcap needs it");
    irl::set_label(call.rows(), call.gradient(*written), call.labels(labels),
                   call.vector("elements", elements),
                   label_logit ? call.vector("label_logit", *label_logit) : nullptr, readout);
  });
}

XLA_FFI_DEFINE_HANDLER(kRowStats, row_stats,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Array>()
                           .Arg<Array>()
                           .Ret<Array>()
                           .Ret<Array>()
                           .Ret<Array>()
                           .OptionalRet<Array>()
                           .Attrs());
XLA_FFI_DEFINE_HANDLER(kRowGrad, row_grad,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Array>()
                           .Arg<Array>()
                           .Arg<Array>()
                           .Arg<Array>()
                           .Arg<Array>()
                           .Arg<Array>()
                           .Arg<Array>()
                           .Ret<Array>()
                           .Attrs());
XLA_FFI_DEFINE_HANDLER(kRowStatsGrad, row_stats_grad,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Array>()
                           .Arg<Array>()
                           .Arg<Array>()
                           .OptionalArg<Array>()
                           .Ret<Array>()
                           .Ret<Array>()
                           .Ret<Array>()
                           .OptionalRet<Array>()
                           .Attrs());
XLA_FFI_DEFINE_HANDLER(kLabelLogit, label_logit,
                       ffi::Ffi::Bind().Arg<Array>().Arg<Array>().Ret<Array>().Attrs());
XLA_FFI_DEFINE_HANDLER(kSetLabel, set_label,
                       ffi::Ffi::Bind()
                           .Arg<Array>()
                           .Arg<Array>()
                           .Arg<Array>()
                           .OptionalArg<Array>()
                           .Ret<Array>()
                           .Attrs());

py::dict targets() {
  const std::pair<const char*, XLA_FFI_Handler*> handlers[] = {
      {"row_stats", kRowStats},     {"row_grad", kRowGrad},   {"row_stats_grad", kRowStatsGrad},
      {"label_logit", kLabelLogit}, {"set_label", kSetLabel},
  };
  py::dict capsules;
  for (const auto& [name, handler] : handlers) capsules[name] = target_of(handler);
  add_measures(capsules);
  return capsules;
}

py::object api() { return py::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); }

}  // namespace

#else

namespace {

py::dict targets() { return {}; }
py::object api() { return py::none(); }

}  // namespace

#endif

void define_xla(py::module_& module) {
  module.def("xla_targets", &targets);
  module.attr("xla_api") = api();
}
