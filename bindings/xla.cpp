// The row kernels as targets of XLA's custom calls on CPUs, with the threads of XLA's own pool. The
// only file that sees XLA's headers; without them it offers no targets.
//
// Logits and dlogits are [..., V], contiguous, of float32, bfloat16 or float16; labels [...] of
// int32 or int64; all other arrays float32 [...]. A gradient may take the place of its logits. The
// float32 attributes logit_scale and softcap may be left out: 1 and 0.
#include <cstdint>
#include <string>

#include "addresses.h"

namespace py = pybind11;

#ifdef IRL_OPS_XLA

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Array = ffi::AnyBuffer;
using Output = ffi::Result<Array>;

// Such as F32[2,3].
std::string described(ffi::DataType dtype, ffi::Span<const std::int64_t> sizes) {
  std::ostringstream text;
  text << dtype << "[";
  for (std::size_t axis = 0; axis < sizes.size(); ++axis) text << (axis ? "," : "") << sizes[axis];
  text << "]";
  return text.str();
}

[[noreturn]] void refuse(const char* name, const Array& given, const std::string& accepted) {
  throw std::invalid_argument(std::string(name) + " is " +
                              described(given.element_type(), given.dimensions()) +
                              ", accepted is " + accepted);
}

bool same_sizes(ffi::Span<const std::int64_t> one, ffi::Span<const std::int64_t> other) {
  return std::equal(one.begin(), one.end(), other.begin(), other.end());
}

// The checked arguments of one call, beside its logits.
class Call {
 public:
  explicit Call(Array logits, const char* name = "logits") : logits_(logits) {
    const auto sizes = logits.dimensions();
    if (sizes.size() == 0) refuse(name, logits, "[..., V]");
    std::int64_t count = 1;
    for (const std::int64_t size : row_sizes()) count *= size;
    rows_ = {dtype_of(logits, name), sizes.back(), {{count}, {sizes.back()}}};
  }

  const irl::Rows& rows() const { return rows_; }
  const void* logits() const { return logits_.untyped_data(); }

  float* vector(const char* name, const Array& given) const {
    if (given.element_type() != ffi::F32 || !same_sizes(given.dimensions(), row_sizes()))
      refuse(name, given, described(ffi::F32, row_sizes()));
    return static_cast<float*>(given.untyped_data());
  }

  // Labels as the kernels take them; those of 32 bits are copied.
  const std::int64_t* labels(const Array& given) {
    const bool wide = given.element_type() == ffi::S64;
    if ((!wide && given.element_type() != ffi::S32) || !same_sizes(given.dimensions(), row_sizes()))
      refuse("labels", given, described(ffi::S32, row_sizes()) + " or S64");
    if (wide) return static_cast<const std::int64_t*>(given.untyped_data());
    const auto* narrow = static_cast<const std::int32_t*>(given.untyped_data());
    labels_.assign(narrow, narrow + rows_.layout.rows());
    return labels_.data();
  }

  void* gradient(const Array& given) const {
    if (given.element_type() != logits_.element_type() ||
        !same_sizes(given.dimensions(), logits_.dimensions()))
      refuse("dlogits", given, described(logits_.element_type(), logits_.dimensions()));
    return given.untyped_data();
  }

 private:
  static irl::Dtype dtype_of(const Array& given, const char* name) {
    switch (given.element_type()) {
      case ffi::F32:
        return irl::Dtype::float32;
      case ffi::BF16:
        return irl::Dtype::bfloat16;
      case ffi::F16:
        return irl::Dtype::float16;
      default:
        refuse(name, given, "F32, BF16 or F16");
    }
  }

  ffi::Span<const std::int64_t> row_sizes() const {
    return logits_.dimensions().first(logits_.dimensions().size() - 1);
  }

  Array logits_;
  irl::Rows rows_;
  std::vector<std::int64_t> labels_;
};

irl::Team team_of(ffi::ThreadPool& pool) {
  return {pool.num_threads(), [&](irl::Team::Task task) { pool.Schedule(std::move(task)); }};
}

// No exception may pass through XLA.
template <class Work>
ffi::Error run(const Work& work) {
  try {
    work();
  } catch (const std::invalid_argument& error) {
    return ffi::Error::InvalidArgument(error.what());
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
  return ffi::Error::Success();
}

float number(const ffi::Dictionary& attributes, const char* name, float otherwise) {
  if (!attributes.contains(name)) return otherwise;
  const auto given = attributes.get<float>(name);
  if (!given.has_value()) throw std::invalid_argument(std::string(name) + " is no float32");
  return given.value();
}

irl::Readout readout_of(const ffi::Dictionary& attributes) {
  return parse_readout(number(attributes, "logit_scale", 1), number(attributes, "softcap", 0));
}

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
  for (const auto& [name, handler] : handlers)
    capsules[name] = py::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET");
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
