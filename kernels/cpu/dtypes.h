// The element types of logits and gradients. The 16-bit ones are bit patterns: conversions live
// with the lanes of each instruction set, and for single elements in element.h.
#pragma once
#include <cstdint>

namespace irl {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

enum class Dtype { float32, bfloat16, float16 };

inline constexpr int kDtypes = 3;

}  // namespace irl
