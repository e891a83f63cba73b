// After the pass: finish, head_gradients, total.
#include <algorithm>
#include <cmath>
#include <cstddef>

#include "stages.h"

namespace irl::algebra {

namespace {

// p - 1 of log p <= 0; where p is no longer near 1 nothing cancels, and exp takes half of expm1's
// time.
double expm1_of(double logprob) {
  return logprob < -1 ? std::exp(logprob) - 1 : std::expm1(logprob);
}

// p (A + B log p) + C; with p - 1 the A - A of a confident row cancels exactly. An infinite A
// stays.
double label_gradient(double a, double b, double c, double logprob) {
  if (a == 0 && b == 0) return c;
  if (std::isinf(a)) return a;
  const double finite = logprob > -HUGE_VAL ? logprob : 0.0;
  return a * expm1_of(logprob) + (a + c) + masked(b, b * std::exp(logprob) * finite);
}

double own_value(const Statistics& stats, std::size_t i) {
  return static_cast<double>(stats.row_max[i]) + static_cast<double>(stats.logsum[i]);
}

}  // namespace

double slope_of_value(const Coefficients& given, const Statistics& stats, std::size_t i) {
  if (given.alpha[i] == -HUGE_VALF) return 0.0;
  const double b = given.entropy_weight.empty() ? 0.0 : given.entropy_weight[i];
  const double h = b == 0 ? 0.0 : stats.entropy[i];
  const double beta = given.beta[i];
  return given.alpha[i] + beta * masked(beta, own_value(stats, i)) + b * h;
}

Finished finish(const Call& call, const Rows& rows, const Objective& loss,
                const Coefficients* given, const Statistics& stats) {
  const std::size_t n = rows.labels.size();
  const Heads& heads = call.heads;
  Finished done;
  for (auto* x : {&done.value, &done.logprob, &done.next_value, &done.reward, &done.slope})
    x->resize(n);
  if (given) done.element.resize(n);
  for (std::size_t i = 0; i < n; ++i)
    done.value[i] = heads.values ? static_cast<double>(heads.values[i]) : own_value(stats, i);
  for (std::size_t i = 0; i < n; ++i) {
    const Kind kind = rows.kind[i];
    if (kind == ignored) continue;
    const double q = stats.label_logit[i];
    done.logprob[i] = (q - stats.row_max[i]) - stats.logsum[i];
    if (kind == bootstrap)
      done.next_value[i] = heads.next_values ? heads.next_values[i] : done.value[i + 1];
    if (has_td(kind))
      done.reward[i] = (heads.values ? heads.values[i] + done.logprob[i] : q) -
                       call.terms.gamma * done.next_value[i];
    if (call.terms.has_td) done.slope[i] = 2 * loss.td[i] * masked(loss.td[i], done.reward[i]);
    if (!given) continue;
    const double a = slope_of_value(*given, stats, i);
    const double b = call.terms.has_entropy ? given->entropy_weight[i] : 0.0;
    done.element[i] =
        static_cast<float>(label_gradient(a, b, done.slope[i] - loss.mle[i], done.logprob[i]));
  }
  return done;
}

void head_gradients(const Call& call, const Rows& rows, const Finished& done, float* dvalues,
                    float* dnext_values) {
  if (!dvalues && !dnext_values) return;
  // What row i - 1 sends to row i through its next value. The last row of a sequence sends nothing.
  double back = 0;
  for (std::size_t i = 0; i < rows.labels.size(); ++i) {
    const double u = done.slope[i];
    if (dvalues) dvalues[i] = static_cast<float>(u + (call.heads.next_values ? 0.0 : back));
    back = rows.kind[i] == bootstrap && !call.heads.detach_next ? -call.terms.gamma * u : 0.0;
    if (dnext_values) dnext_values[i] = static_cast<float>(back);
  }
}

Total total(const Call& call, const Rows& rows, const Objective& loss, const Statistics& stats,
            const Finished& done, float* row_losses) {
  Total sums;
  double with_td = 0;
  for (std::size_t i = 0; i < rows.labels.size(); ++i) {
    if (row_losses) row_losses[i] = 0;
    if (rows.kind[i] == ignored) continue;
    const double m = loss.mle[i], h = call.terms.has_entropy ? stats.entropy[i] : 0.0;
    const double own = own_value(stats, i), reward = done.reward[i];
    double here = -masked(m, done.logprob[i]);
    if (call.terms.has_entropy) here -= call.terms.entropy_coef * masked(m, h);
    if (call.terms.has_z) here += call.terms.z_loss * masked(m, own * own);
    here *= m;
    if (call.terms.has_td) here += loss.td[i] * masked(loss.td[i], reward * reward);
    if (row_losses) row_losses[i] = static_cast<float>(here);
    sums.loss += here;
    sums.nll -= done.logprob[i];
    sums.value += done.value[i];
    sums.entropy += h;
    sums.accuracy += stats.label_logit[i] >= stats.row_max[i];
    sums.z += own * own;
    sums.tokens += 1;
    if (!has_td(rows.kind[i])) continue;
    sums.td += reward * reward;
    sums.reward += reward;
    with_td += 1;
  }
  for (double* sum : {&sums.nll, &sums.value, &sums.entropy, &sums.accuracy, &sums.z})
    *sum /= std::max(sums.tokens, 1.0);
  for (double* sum : {&sums.td, &sums.reward}) *sum /= std::max(with_td, 1.0);
  return sums;
}

}  // namespace irl::algebra
