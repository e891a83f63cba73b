// Where the rows of a strided array begin: leading axes of any strides, the last axis contiguous.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

namespace irl {

// Strides count elements. Rows are numbered in C order over the axes.
struct Layout {
  std::vector<std::int64_t> sizes;
  std::vector<std::int64_t> strides;

  std::int64_t rows() const {
    std::int64_t n = 1;
    for (const std::int64_t size : sizes) n *= size;
    return n;
  }

  // Elements from the array's address to the row's first element. Divides once for each axis but
  // the first: see collapsed.
  std::int64_t offset(std::int64_t row) const {
    if (sizes.empty()) return 0;
    std::int64_t elements = 0;
    for (std::size_t axis = sizes.size(); axis-- > 1;) {
      elements += row % sizes[axis] * strides[axis];
      row /= sizes[axis];
    }
    return elements + row * strides[0];
  }

  // The lowest and the highest offset of a row. There must be rows.
  std::pair<std::int64_t, std::int64_t> span() const {
    std::int64_t low = 0, high = 0;
    for (std::size_t axis = 0; axis < sizes.size(); ++axis) {
      const std::int64_t reach = (sizes[axis] - 1) * strides[axis];
      (reach < 0 ? low : high) += reach;
    }
    return {low, high};
  }
};

// The same rows over as few axes as describe them: one, where they are equally far apart.
inline Layout collapsed(const Layout& given) {
  Layout out;
  for (std::size_t axis = 0; axis < given.sizes.size(); ++axis) {
    const std::int64_t size = given.sizes[axis], stride = given.strides[axis];
    if (size == 1) continue;
    if (!out.sizes.empty() && out.strides.back() == size * stride) {
      out.sizes.back() *= size;
      out.strides.back() = stride;
    } else {
      out.sizes.push_back(size);
      out.strides.push_back(stride);
    }
  }
  return out;
}

}  // namespace irl
