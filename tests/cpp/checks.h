// What the files of these tests share.
#pragma once
#include <cstdint>
#include <vector>

#include "element.h"
#include "isa.h"
#include "rows.h"

// Prints what does not hold, and counts it.
void expect(bool holds, const char* what, const char* where, double x);

// The row measures, in test_measures.cpp.
void check_measures(const irl::Isa& isa);

// A heap block of 2 x 3 rows that ends where its last row ends.
struct Block {
  std::vector<char> bytes;
  irl::Layout layout;
  std::int64_t start, size;

  Block(irl::Dtype dtype, std::int64_t vocab, std::int64_t start, std::int64_t gap)
      : layout{{2, 3}, {3 * (vocab + gap), vocab + gap}}, start(start), size(irl::size_of(dtype)) {
    bytes.resize(static_cast<std::size_t>((start + 5 * (vocab + gap) + vocab) * size));
  }
  char* data() { return bytes.data() + start * size; }
  char* at(std::int64_t row, std::int64_t column) {
    return data() + (layout.offset(row) + column) * size;
  }
};
