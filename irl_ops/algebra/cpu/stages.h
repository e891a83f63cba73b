// The stages of a call, those of irl_ops/algebra under the same names: scalar algebra on one number
// per row, in double. They know no kernel and no logits.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "options.h"

namespace irl::algebra {

// The last row of a sequence never bootstraps: row i + 1 of one that does is its next row.
enum Kind : std::int8_t { ignored, terminal, bootstrap, no_td };

constexpr std::int64_t kNoLabel = -1;

inline bool has_td(Kind kind) { return kind == terminal || kind == bootstrap; }

// x, but 0 where its weight is 0, even if x is NaN.
inline double masked(double weight, double x) { return weight == 0 ? 0.0 : x; }

struct Rows {
  std::vector<std::int64_t> labels;  // kNoLabel in ignored rows
  std::vector<Kind> kind;
  std::int64_t bad = -1;  // the first row whose label is out of range
};

struct Objective {
  std::vector<double> mle, td;  // td is empty where the loss has no TD term
};

// What the row kernel is given.
struct Coefficients {
  std::vector<float> alpha, beta, entropy_weight;  // the last empty without an entropy term
};

// What the row kernel returns, and what was read before it.
struct Statistics {
  std::vector<float> row_max, logsum, label_logit, entropy;  // the last empty without it
};

struct Finished {
  std::vector<double> value, logprob, next_value, reward, slope;
  std::vector<float> element;
};

struct Total {
  double loss = 0, nll = 0, value = 0, entropy = 0, td = 0, reward = 0, accuracy = 0, z = 0,
         tokens = 0;
};

// --- Before the pass ---

Rows align(const Call& call, std::int64_t count, std::int64_t vocab);
Objective weigh(const Call& call, const Rows& rows);
Coefficients coefficients(const Call& call, const Rows& rows, const Objective& loss,
                          const std::vector<float>& label_logit);

// --- After the pass ---

// Without coefficients, the elements at the labels are left out: nobody asks for a gradient.
Finished finish(const Call& call, const Rows& rows, const Objective& loss,
                const Coefficients* given, const Statistics& stats);
// A of row i, from what was known before the pass and what the pass found; 0 in a row that nobody
// needs.
double slope_of_value(const Coefficients& given, const Statistics& stats, std::size_t i);
void head_gradients(const Call& call, const Rows& rows, const Finished& done, float* dvalues,
                    float* dnext_values);
// row_losses may be null.
Total total(const Call& call, const Rows& rows, const Objective& loss, const Statistics& stats,
            const Finished& done, float* row_losses);

}  // namespace irl::algebra
