// What the functions of the module are given: addresses, names and sizes, checked.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "rows.h"

using Address = std::uintptr_t;
using Axes = std::vector<std::int64_t>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline irl::Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return irl::Dtype::float32;
  if (name == "bfloat16") return irl::Dtype::bfloat16;
  if (name == "float16") return irl::Dtype::float16;
  throw std::invalid_argument("dtype is '" + name + "', accepted are float32, bfloat16, float16");
}

inline irl::Layout parse_layout(const char* name, const Axes& sizes, Axes strides) {
  if (strides.size() != sizes.size())
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(strides.size()) +
                                " entries, sizes has " + std::to_string(sizes.size()));
  for (const std::int64_t size : sizes)
    if (size < 0)
      throw std::invalid_argument("sizes holds " + std::to_string(size) + ", accepted are >= 0");
  return irl::collapsed({sizes, std::move(strides)});
}

inline std::int64_t parse_threads(std::int64_t threads) {
  if (threads < 1)
    throw std::invalid_argument("threads is " + std::to_string(threads) + ", accepted are >= 1");
  return threads;
}

inline irl::Rows parse_rows(const std::string& dtype, const Axes& sizes, Axes strides,
                            std::int64_t vocab) {
  if (vocab < 0)
    throw std::invalid_argument("vocab is " + std::to_string(vocab) + ", accepted are >= 0");
  return {parse_dtype(dtype), vocab, parse_layout("strides", sizes, std::move(strides))};
}

inline irl::Readout parse_readout(double logit_scale, double softcap) {
  if (!(logit_scale > 0) || !std::isfinite(static_cast<float>(logit_scale)))
    throw std::invalid_argument("logit_scale is " + std::to_string(logit_scale) +
                                ", accepted are finite numbers > 0");
  if (!(softcap >= 0) || !std::isfinite(static_cast<float>(softcap)))
    throw std::invalid_argument("softcap is " + std::to_string(softcap) +
                                ", accepted are finite numbers > 0, and 0 for none");
  return {static_cast<float>(logit_scale), static_cast<float>(softcap)};
}

// Adds Call and loss_and_grad to the module.
void define_calls(pybind11::module_& module);

// Adds row_measures and row_measures_grad to the module.
void define_measures(pybind11::module_& module);

// Adds xla_targets and xla_api to the module.
void define_xla(pybind11::module_& module);

// Adds pool_empty and the other pool_ functions to the module.
void define_pool(pybind11::module_& module);
