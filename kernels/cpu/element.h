// One element at a time: reads and writes of single logits, rounded to nearest even.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "dtypes.h"

namespace irl {

inline std::int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline float read_element(Dtype dtype, const void* at) {
  if (dtype == Dtype::float32) {
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  std::uint16_t half;
  std::memcpy(&half, at, sizeof half);
  if (dtype == Dtype::bfloat16) {
    const std::uint32_t bits = std::uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  float value = exponent ? std::ldexp(1024.0f + static_cast<float>(fraction), exponent - 25)
                         : std::ldexp(static_cast<float>(fraction), -24);
  if (exponent == 31) value = fraction ? std::nanf("") : HUGE_VALF;
  return half >> 15 ? -value : value;
}

inline void write_element(Dtype dtype, void* at, float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (dtype == Dtype::float32) {
    std::memcpy(at, &bits, sizeof bits);
    return;
  }
  std::uint32_t half;
  if (dtype == Dtype::bfloat16) {
    half = (std::isnan(value) ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  } else {
    const float magnitude = std::fabs(value);
    // A half counts in steps of 2^-24 below 2^-14, and of 2^-10 of its power of two above.
    const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
    if (std::isnan(value)) {
      half = 0x7e00u;
    } else if (magnitude >= 65520.0f) {
      half = 0x7c00u;
    } else {
      const auto steps = static_cast<std::uint32_t>(
          std::lrint(std::ldexp(static_cast<double>(magnitude), 10 - exponent)));
      half = steps + (static_cast<std::uint32_t>(exponent + 14) << 10);
    }
    half |= bits >> 16 & 0x8000u;
  }
  const auto stored = static_cast<std::uint16_t>(half);
  std::memcpy(at, &stored, sizeof stored);
}

}  // namespace irl
