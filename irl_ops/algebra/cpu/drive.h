// Before -> pass -> after, as irl_ops/algebra/drive.py: a whole call of a loss, or of token_stats,
// for callers whose caches the logits have emptied, where sixty array operations take longer than
// their arithmetic. The row kernels know nothing of these files.
#pragma once
#include <cstdint>

#include "options.h"
#include "rows.h"
#include "stages.h"

namespace irl::algebra {

// Where a call writes; null for what nobody asks for.
struct Outputs {
  void* dlogits = nullptr;  // may be the logits
  Layout layout;            // of dlogits
  float* row_losses = nullptr;
  float* dvalues = nullptr;
  float* dnext_values = nullptr;
};

// Row statistics that a loss without a gradient leaves for loss_grad: null where there will be
// none, entropy without an entropy term.
struct Kept {
  float *row_max = nullptr, *logsum = nullptr, *entropy = nullptr;
};

// The loss and its metrics; the gradients of `above` times the loss. Returns the first row whose
// label is out of range, -1 where there is none: then nothing was computed.
// Traffic: that of row_stats_grad, without dlogits that of row_stats; and O(rows).
std::int64_t loss(const Isa& isa, const Team& team, const irl::Rows& shape, const void* logits,
                  const Readout& readout, const Call& call, const Kept& kept, const Outputs& out,
                  Total& total);
// The gradients alone, of a call whose loss left what was `kept`. Traffic: that of row_grad.
void loss_grad(const Isa& isa, const Team& team, const irl::Rows& shape, const void* logits,
               const Readout& readout, const Call& call, const Kept& kept, const Outputs& out);

// One number per row each; entropy may be null. row_max, logsum and labels are what the gradient
// needs, null where there will be none.
struct TokenStats {
  float *value, *logprob, *entropy, *reward, *next_value;
  std::int8_t* kind;
  std::uint8_t* correct;
  float *row_max, *logsum;
  std::int64_t* labels;
};

// Gradients from above of the outputs of token_stats; null for 0.
struct TokenGradients {
  const float *value, *logprob, *entropy, *reward, *next_value;
};

std::int64_t token_stats(const Isa& isa, const Team& team, const irl::Rows& shape,
                         const void* logits, const Readout& readout, const Call& call,
                         const TokenStats& out);
// dlogits of the layout of `out`; `kept` is what token_stats wrote.
void token_stats_grad(const Isa& isa, const Team& team, const irl::Rows& shape, const void* logits,
                      const Readout& readout, const Call& call, const TokenStats& kept,
                      const TokenGradients& above, const Outputs& out);

}  // namespace irl::algebra
