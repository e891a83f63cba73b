// What the targets of XLA's custom calls share: the checked arguments of a call. Included by
// xla.cpp and xla_measures.cpp alone, where XLA's headers are at hand.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "addresses.h"
#include "xla/ffi/api/ffi.h"

namespace irl::xla_calls {

namespace ffi = xla::ffi;

using Array = ffi::AnyBuffer;
using Output = ffi::Result<Array>;

// Such as F32[2,3].
inline std::string described(ffi::DataType dtype, ffi::Span<const std::int64_t> sizes) {
  std::ostringstream text;
  text << dtype << "[";
  for (std::size_t axis = 0; axis < sizes.size(); ++axis) text << (axis ? "," : "") << sizes[axis];
  text << "]";
  return text.str();
}

[[noreturn]] inline void refuse(const char* name, const Array& given, const std::string& accepted) {
  throw std::invalid_argument(std::string(name) + " is " +
                              described(given.element_type(), given.dimensions()) +
                              ", accepted is " + accepted);
}

inline bool same_sizes(ffi::Span<const std::int64_t> one, ffi::Span<const std::int64_t> other) {
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

  const Rows& rows() const { return rows_; }
  const void* logits() const { return logits_.untyped_data(); }

  float* vector(const char* name, const Array& given) const {
    if (given.element_type() != ffi::F32 || !same_sizes(given.dimensions(), row_sizes()))
      refuse(name, given, described(ffi::F32, row_sizes()));
    return static_cast<float*>(given.untyped_data());
  }

  // Labels as the kernels take them; those of 32 bits are copied.
  const std::int64_t* labels(const Array& given) {
    if (!is_integer(given) || !same_sizes(given.dimensions(), row_sizes()))
      refuse("labels", given, described(ffi::S32, row_sizes()) + " or S64");
    return widened(given);
  }

  // Likewise `count` of them a row.
  const std::int64_t* ids(const Array& given) {
    if (!is_integer(given) || !is_rows_of_some(given))
      refuse("ids", given, described(ffi::S32, row_sizes()) + " or S64 with one axis more");
    count_ = given.dimensions().back();
    return widened(given);
  }

  std::int64_t count() const { return count_; }

  // Numbers at the ids, which are known by then.
  float* at_ids(const char* name, const Array& given) const {
    if (given.element_type() != ffi::F32 || !is_rows_of_some(given) ||
        given.dimensions().back() != count_)
      refuse(name, given, "F32 of the sizes of ids");
    return static_cast<float*>(given.untyped_data());
  }

  const std::uint8_t* mask(const char* name, const Array& given) const {
    if (given.element_type() != ffi::PRED || !same_sizes(given.dimensions(), logits_.dimensions()))
      refuse(name, given, described(ffi::PRED, logits_.dimensions()));
    return static_cast<const std::uint8_t*>(given.untyped_data());
  }

  std::int32_t* integers(const char* name, const Array& given) const {
    if (given.element_type() != ffi::S32 || !same_sizes(given.dimensions(), row_sizes()))
      refuse(name, given, described(ffi::S32, row_sizes()));
    return static_cast<std::int32_t*>(given.untyped_data());
  }

  void* gradient(const Array& given) const {
    if (given.element_type() != logits_.element_type() ||
        !same_sizes(given.dimensions(), logits_.dimensions()))
      refuse("dlogits", given, described(logits_.element_type(), logits_.dimensions()));
    return given.untyped_data();
  }

 private:
  static Dtype dtype_of(const Array& given, const char* name) {
    switch (given.element_type()) {
      case ffi::F32:
        return Dtype::float32;
      case ffi::BF16:
        return Dtype::bfloat16;
      case ffi::F16:
        return Dtype::float16;
      default:
        refuse(name, given, "F32, BF16 or F16");
    }
  }

  static bool is_integer(const Array& given) {
    return given.element_type() == ffi::S32 || given.element_type() == ffi::S64;
  }

  bool is_rows_of_some(const Array& given) const {
    const auto sizes = given.dimensions();
    return sizes.size() == logits_.dimensions().size() &&
           same_sizes(sizes.first(sizes.size() - 1), row_sizes());
  }

  const std::int64_t* widened(const Array& given) {
    if (given.element_type() == ffi::S64)
      return static_cast<const std::int64_t*>(given.untyped_data());
    const auto* narrow = static_cast<const std::int32_t*>(given.untyped_data());
    labels_.assign(narrow, narrow + given.element_count());
    return labels_.data();
  }

  ffi::Span<const std::int64_t> row_sizes() const {
    return logits_.dimensions().first(logits_.dimensions().size() - 1);
  }

  Array logits_;
  Rows rows_;
  std::vector<std::int64_t> labels_;
  std::int64_t count_ = 0;
};

inline Team team_of(ffi::ThreadPool& pool) {
  return {pool.num_threads(), [&](Team::Task task) { pool.Schedule(std::move(task)); }};
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

inline float number(const ffi::Dictionary& attributes, const char* name, float otherwise) {
  if (!attributes.contains(name)) return otherwise;
  const auto given = attributes.get<float>(name);
  if (!given.has_value()) throw std::invalid_argument(std::string(name) + " is no float32");
  return given.value();
}

inline Readout readout_of(const ffi::Dictionary& attributes) {
  return parse_readout(number(attributes, "logit_scale", 1), number(attributes, "softcap", 0));
}

// As JAX takes it.
inline pybind11::capsule target_of(XLA_FFI_Handler* handler) {
  return pybind11::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET");
}

// Adds row_measures and row_measures_grad.
void add_measures(pybind11::dict& targets);

}  // namespace irl::xla_calls
