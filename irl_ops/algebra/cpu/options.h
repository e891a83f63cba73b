// The options of a call: irl_ops/algebra/options.py in C++, the same records with the same fields.
// Arrays are addresses of contiguous rows, null where there are none.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace irl::algebra {

enum class Boundary { terminal, bootstrap, drop };

// One flag per row, or one per sequence; null where there are none.
struct Flags {
  const std::uint8_t* at = nullptr;
  bool by_row = false;

  bool operator()(std::int64_t row, std::int64_t length) const {
    return at[by_row ? row : row / length] != 0;
  }
};

// One number for all rows, or one per row.
struct Numbers {
  double number = 0;
  const float* at = nullptr;

  double operator[](std::size_t row) const { return at ? static_cast<double>(at[row]) : number; }
};

struct Sequence {
  std::int64_t ignore_index = -100;
  bool shift = false;
  std::vector<std::int64_t> eos_token_id;  // empty: none was given
  Boundary boundary = Boundary::terminal;
  const std::uint8_t* where = nullptr;
  const std::int64_t* segment_ids = nullptr;
  const std::int64_t* position_ids = nullptr;
  std::vector<std::int64_t> cu_seqlens;  // offsets, checked by the caller; empty: none were given
  Flags truncated;
};

struct Weighting {
  const float* token_weights = nullptr;
  bool counted = false;  // whether num_items is given
  double num_items[2] = {0, 0};
  bool mean = true;
};

struct Terms {
  Numbers mle{1}, td, agent_td;
  bool has_td = false;
  Flags is_expert;  // null: all rows are the expert's
  double gamma = 1;
  bool has_entropy = false,
       has_z = false;  // whether there is such a term, its weight being 0 or not
  double entropy_coef = 0, z_loss = 0;
};

struct Heads {
  const float* values = nullptr;
  const float* next_values = nullptr;
  bool detach_next = false;
};

struct Call {
  std::int64_t length = 1;  // rows of a sequence
  const std::int64_t* labels = nullptr;
  Sequence sequence;
  Weighting weighting;
  Terms terms;
  Heads heads;
  Numbers above{1};  // the gradient from above, a factor on the weights
};

}  // namespace irl::algebra
