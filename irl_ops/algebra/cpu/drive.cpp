#include "drive.h"

#include <algorithm>
#include <cstddef>
#include <vector>

namespace irl::algebra {

std::int64_t loss(const Isa& isa, const Team& team, const irl::Rows& shape, const void* logits,
                  const Readout& readout, const Call& call, const Kept& kept, const Outputs& out,
                  Total& sums) {
  const auto n = static_cast<std::size_t>(shape.layout.rows());
  const Rows rows = align(call, shape.layout.rows(), shape.vocab);
  if (rows.bad >= 0) return rows.bad;
  const Objective weights = weigh(call, rows);
  Statistics stats = {std::vector<float>(n), std::vector<float>(n), std::vector<float>(n),
                      std::vector<float>(call.terms.has_entropy ? n : 0)};
  float* entropy = call.terms.has_entropy ? stats.entropy.data() : nullptr;
  if (!out.dlogits) {
    row_stats(isa, team, shape, logits, rows.labels.data(), stats.row_max.data(),
              stats.logsum.data(), stats.label_logit.data(), entropy, readout);
    if (kept.row_max) std::copy(stats.row_max.begin(), stats.row_max.end(), kept.row_max);
    if (kept.logsum) std::copy(stats.logsum.begin(), stats.logsum.end(), kept.logsum);
    if (kept.entropy) std::copy(stats.entropy.begin(), stats.entropy.end(), kept.entropy);
    const Finished done = finish(call, rows, weights, nullptr, stats);
    sums = total(call, rows, weights, stats, done, out.row_losses);
    return -1;
  }
  label_logit(shape, logits, rows.labels.data(), stats.label_logit.data(), readout);
  const Coefficients given = coefficients(call, rows, weights, stats.label_logit);
  row_stats_grad(isa, team, shape, logits, given.alpha.data(), given.beta.data(),
                 call.terms.has_entropy ? given.entropy_weight.data() : nullptr,
                 stats.row_max.data(), stats.logsum.data(), entropy, out.dlogits, out.layout,
                 readout);
  const Finished done = finish(call, rows, weights, &given, stats);
  set_label({shape.dtype, shape.vocab, out.layout}, out.dlogits, rows.labels.data(),
            done.element.data(), stats.label_logit.data(), readout);
  head_gradients(call, rows, done, out.dvalues, out.dnext_values);
  sums = total(call, rows, weights, stats, done, out.row_losses);
  return -1;
}

void loss_grad(const Isa& isa, const Team& team, const irl::Rows& shape, const void* logits,
               const Readout& readout, const Call& call, const Kept& kept, const Outputs& out) {
  const auto n = static_cast<std::size_t>(shape.layout.rows());
  const Rows rows = align(call, shape.layout.rows(), shape.vocab);
  const Objective weights = weigh(call, rows);
  Statistics stats = {
      {kept.row_max, kept.row_max + n}, {kept.logsum, kept.logsum + n}, std::vector<float>(n), {}};
  if (kept.entropy) stats.entropy.assign(kept.entropy, kept.entropy + n);
  label_logit(shape, logits, rows.labels.data(), stats.label_logit.data(), readout);
  const Coefficients given = coefficients(call, rows, weights, stats.label_logit);
  const Finished done = finish(call, rows, weights, &given, stats);
  head_gradients(call, rows, done, out.dvalues, out.dnext_values);
  if (!out.dlogits) return;  // without rows
  std::vector<float> a(n), b = given.entropy_weight;
  for (std::size_t i = 0; i < n; ++i) a[i] = static_cast<float>(slope_of_value(given, stats, i));
  b.resize(n);
  row_grad(isa, team, shape, logits, nullptr, kept.row_max, kept.logsum, a.data(), b.data(),
           nullptr, out.dlogits, out.layout, readout);
  set_label({shape.dtype, shape.vocab, out.layout}, out.dlogits, rows.labels.data(),
            done.element.data(), stats.label_logit.data(), readout);
}

std::int64_t token_stats(const Isa& isa, const Team& team, const irl::Rows& shape,
                         const void* logits, const Readout& readout, const Call& call,
                         const TokenStats& out) {
  const auto n = static_cast<std::size_t>(shape.layout.rows());
  const Rows rows = align(call, shape.layout.rows(), shape.vocab);
  if (rows.bad >= 0) return rows.bad;
  Statistics stats = {std::vector<float>(n), std::vector<float>(n), std::vector<float>(n), {}};
  row_stats(isa, team, shape, logits, rows.labels.data(), stats.row_max.data(), stats.logsum.data(),
            stats.label_logit.data(), out.entropy, readout);
  const Finished done = finish(call, rows, {}, nullptr, stats);
  for (std::size_t i = 0; i < n; ++i) {
    const bool labelled = rows.kind[i] != ignored;
    out.value[i] = static_cast<float>(done.value[i]);
    out.logprob[i] = static_cast<float>(done.logprob[i]);
    out.reward[i] = static_cast<float>(done.reward[i]);
    out.next_value[i] = static_cast<float>(done.next_value[i]);
    out.kind[i] = rows.kind[i];
    out.correct[i] = labelled && stats.label_logit[i] >= stats.row_max[i];
  }
  if (out.row_max) std::copy(stats.row_max.begin(), stats.row_max.end(), out.row_max);
  if (out.logsum) std::copy(stats.logsum.begin(), stats.logsum.end(), out.logsum);
  if (out.labels) std::copy(rows.labels.begin(), rows.labels.end(), out.labels);
  return -1;
}

void token_stats_grad(const Isa& isa, const Team& team, const irl::Rows& shape, const void* logits,
                      const Readout& readout, const Call& call, const TokenStats& kept,
                      const TokenGradients& above, const Outputs& out) {
  const auto n = static_cast<std::size_t>(shape.layout.rows());
  const Heads& heads = call.heads;
  const auto from = [](const float* x, std::size_t i) {
    return x ? static_cast<double>(x[i]) : 0.0;
  };
  std::vector<float> a(n), b(n), c(n);
  // What row i - 1 sends to the value of row i. The last row of a sequence sends nothing.
  double back = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const auto kind = static_cast<Kind>(kept.kind[i]);
    const double reward = has_td(kind) ? from(above.reward, i) : 0.0;
    double logprob = kind != ignored ? from(above.logprob, i) : 0.0, picked = 0;
    (heads.values ? logprob : picked) += reward;
    const double behind = heads.next_values ? 0.0 : back;
    const double value = from(above.value, i) + behind;
    if (out.dvalues) out.dvalues[i] = static_cast<float>(value + reward);
    const double h = above.entropy ? from(above.entropy, i) : 0.0;
    a[i] = static_cast<float>((heads.values ? 0.0 : value) - logprob -
                              masked(h, h == 0 ? 0.0 : h * kept.entropy[i]));
    b[i] = static_cast<float>(-h);
    c[i] = static_cast<float>(picked + logprob);
    back = 0;
    if (kind == bootstrap && !heads.detach_next)
      back = from(above.next_value, i) - call.terms.gamma * from(above.reward, i);
    if (out.dnext_values) out.dnext_values[i] = static_cast<float>(back);
  }
  if (out.dlogits)
    row_grad(isa, team, shape, logits, kept.labels, kept.row_max, kept.logsum, a.data(), b.data(),
             c.data(), out.dlogits, out.layout, readout);
}

}  // namespace irl::algebra
