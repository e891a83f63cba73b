// A whole loss call: the scalar algebra of irl_ops/algebra.py around row_stats_grad, for callers
// whose caches the logits have emptied, where sixty array operations take longer than their
// arithmetic. The row kernels know nothing of this file. What the fields mean is said where the
// Python function of the same arguments is: irl_ops.torch.online_iqlearn_loss, of which every loss
// is a part.
#pragma once
#include <cstdint>
#include <vector>

#include "isa.h"
#include "layout.h"
#include "rows.h"

namespace irl {

enum class Boundary { terminal, bootstrap, drop };

// A flag a row, or a flag a sequence; null where there are none.
struct Flags {
  const std::uint8_t* at = nullptr;
  bool by_row = false;

  bool operator()(std::int64_t row, std::int64_t length) const {
    return at[by_row ? row : row / length] != 0;
  }
};

struct Call {
  std::int64_t length = 1;  // rows of a sequence
  const std::int64_t* labels = nullptr;
  std::int64_t ignore_index = -100;
  const std::uint8_t* where = nullptr;
  bool shift = false;
  const std::int64_t* segment_ids = nullptr;
  const std::int64_t* position_ids = nullptr;
  std::vector<std::int64_t> cu_seqlens;
  std::vector<std::int64_t> eos_token_ids;
  Boundary boundary = Boundary::terminal;
  Flags truncated;
  const float* token_weights = nullptr;

  bool td = false;  // without it: MLE
  Flags is_expert;  // null: all rows are the expert's
  double lam = 0, gamma = 1, alpha = 0, entropy_coef = 0;
  bool entropy = false;  // whether there is an entropy term, its coefficient being 0 or not
  bool mean = true;
  bool counted = false;  // whether the two numbers of items are given
  double expert_items = 0, agent_items = 0;
  bool detach_next = false;
  const float* values = nullptr;
  const float* next_values = nullptr;
};

struct Outcome {
  double loss = 0, nll = 0, value = 0, entropy = 0, td = 0, reward = 0, tokens = 0;
  std::int64_t bad_row = -1;  // the first whose label is out of range; then nothing was computed
};

// The loss and its metrics; writes the gradient of the logits into dlogits, which may be the
// logits, and those of values and next_values where these are given. Traffic: that of
// row_stats_grad, and O(rows).
Outcome loss_and_grad(const Isa& isa, std::int64_t threads, const Rows& rows, const void* logits,
                      const Call& call, void* dlogits, const Layout& dlogits_layout, float* dvalues,
                      float* dnext_values);

}  // namespace irl
