// The scalar algebra of a loss in the order of irl_ops/algebra.py, row by row and in double.
#include "calls.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace irl {

namespace {

constexpr std::int64_t kNoLabel = -1;

enum Kind : std::uint8_t { ignored, terminal, bootstrap, no_td };

// What is known of a row before the logits are read.
struct Before {
  std::vector<std::int64_t> labels;
  std::vector<Kind> kinds;
  std::vector<double> mle, td;
};

bool has_td(Kind kind) { return kind == terminal || kind == bootstrap; }

// x, but 0 where its weight is 0, even if x is NaN.
double masked(double weight, double x) { return weight == 0 ? 0.0 : x; }

std::vector<std::uint8_t> next_row_exists(const Call& call, std::int64_t count) {
  std::vector<std::uint8_t> exists(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    bool next = i % call.length + 1 < call.length;
    if (call.segment_ids) next = next && call.segment_ids[i + 1] == call.segment_ids[i];
    if (call.position_ids) next = next && call.position_ids[i + 1] == call.position_ids[i] + 1;
    exists[static_cast<std::size_t>(i)] = next;
  }
  for (const std::int64_t begin : call.cu_seqlens)
    if (begin > 0 && begin < count) exists[static_cast<std::size_t>(begin - 1)] = 0;
  return exists;
}

Kind kind_of(const Call& call, std::int64_t i, std::int64_t label, bool next, bool next_labelled) {
  const Kind onward = next ? bootstrap : no_td;
  const auto& eos = call.eos_token_ids;
  if (std::find(eos.begin(), eos.end(), label) != eos.end()) return terminal;
  if (next && next_labelled) return bootstrap;
  if (call.truncated.at && call.truncated(i, call.length)) return onward;
  if (!eos.empty() || call.boundary == Boundary::bootstrap) return onward;
  return call.boundary == Boundary::terminal ? terminal : no_td;
}

double share(double weight, double total) { return total == 0 ? 0.0 : weight / total; }

// Fills labels and kinds; the first row whose label is out of range, or -1.
std::int64_t align(const Call& call, std::int64_t vocab, Before& rows) {
  const auto count = static_cast<std::int64_t>(rows.labels.size());
  const std::vector<std::uint8_t> exists = next_row_exists(call, count);
  std::vector<std::uint8_t> labelled(rows.labels.size());
  for (std::size_t i = 0; i < labelled.size(); ++i) {
    const std::int64_t* given = call.labels + i;
    rows.labels[i] = !call.shift ? given[0] : exists[i] ? given[1] : call.ignore_index;
    labelled[i] = rows.labels[i] != call.ignore_index && (!call.where || call.where[i]);
  }
  std::int64_t bad = -1;
  for (std::size_t i = 0; i < labelled.size(); ++i) {
    if (!labelled[i]) {
      rows.labels[i] = kNoLabel;
      rows.kinds[i] = ignored;
      continue;
    }
    const bool next = exists[i];
    rows.kinds[i] =
        kind_of(call, static_cast<std::int64_t>(i), rows.labels[i], next, next && labelled[i + 1]);
    if (bad < 0 && (rows.labels[i] < 0 || rows.labels[i] >= vocab))
      bad = static_cast<std::int64_t>(i);
  }
  return bad;
}

// Fills m and d.
void weigh(const Call& call, Before& rows) {
  const std::size_t count = rows.labels.size();
  const auto expert = [&](std::size_t i) {
    return !call.is_expert.at || call.is_expert(static_cast<std::int64_t>(i), call.length);
  };
  const auto weight = [&](std::size_t i) {
    if (rows.kinds[i] == ignored) return 0.0;
    return call.token_weights ? static_cast<double>(call.token_weights[i]) : 1.0;
  };
  double experts = 1, agents = 1;
  if (call.mean && call.counted) {
    experts = call.expert_items;
    agents = call.agent_items;
  } else if (call.mean) {
    experts = agents = 0;
    for (std::size_t i = 0; i < count; ++i) (expert(i) ? experts : agents) += weight(i);
  }
  const double rest = 1 - call.alpha;
  for (std::size_t i = 0; i < count; ++i) {
    const bool of_expert = expert(i);
    rows.mle[i] = of_expert ? share(weight(i), experts) : 0.0;
    double d = call.lam * rows.mle[i];
    if (call.is_expert.at)
      d = of_expert ? d / rest : call.lam * call.alpha / (rest * rest) * share(weight(i), agents);
    rows.td[i] = call.td && has_td(rows.kinds[i]) ? d : 0.0;
  }
}

// What the row kernel is given.
struct Coefficients {
  std::vector<float> alpha, beta, entropy_weight;
};

Coefficients affine(const Call& call, const Before& rows, const std::vector<float>& label_logit) {
  const std::size_t count = rows.labels.size();
  Coefficients out = {std::vector<float>(count), std::vector<float>(count), {}};
  if (call.entropy) out.entropy_weight.resize(count);
  for (std::size_t i = 0; i < count; ++i) {
    const bool first = static_cast<std::int64_t>(i) % call.length == 0;
    const bool onto = !first && rows.kinds[i - 1] == bootstrap;  // row i - 1 bootstraps from row i
    double alpha = rows.mle[i], beta = 0;
    if (call.values) {
      double ahead = 0;
      if (rows.kinds[i] == bootstrap)
        ahead = call.next_values ? call.next_values[i] : call.values[i + 1];
      const double q = call.values[i] - call.gamma * ahead + label_logit[i];
      alpha -= 2 * rows.td[i] * masked(rows.td[i], q);
      beta = 2 * rows.td[i];
    } else if (onto && !call.next_values && !call.detach_next) {
      const double d = rows.td[i - 1];
      alpha -= 2 * call.gamma * d * masked(d, label_logit[i - 1]);
      beta = 2 * call.gamma * call.gamma * d;
    }
    const bool needed = rows.kinds[i] != ignored || onto;
    out.alpha[i] = needed ? static_cast<float>(alpha) : -HUGE_VALF;
    out.beta[i] = static_cast<float>(beta);
    if (call.entropy) out.entropy_weight[i] = static_cast<float>(call.entropy_coef * rows.mle[i]);
  }
  return out;
}

// p (A + B log p) + C; with expm1 the A - A of a confident row cancels exactly.
double label_gradient(double a, double b, double c, double logprob) {
  if (a == 0 && b == 0) return c;
  const double finite = logprob > -HUGE_VAL ? logprob : 0.0;
  return a * std::expm1(logprob) + (a + c) + masked(b, b * std::exp(logprob) * finite);
}

}  // namespace

Outcome loss_and_grad(const Isa& isa, std::int64_t threads, const Rows& shape, const void* logits,
                      const Call& call, void* dlogits, const Layout& dlogits_layout, float* dvalues,
                      float* dnext_values) {
  const auto count = static_cast<std::size_t>(shape.layout.rows());
  Before rows = {std::vector<std::int64_t>(count), std::vector<Kind>(count),
                 std::vector<double>(count), std::vector<double>(count)};
  Outcome out;
  out.bad_row = align(call, shape.vocab, rows);
  if (out.bad_row >= 0) return out;
  weigh(call, rows);
  std::vector<float> label_logit(count), row_max(count), logsum(count);
  std::vector<float> entropy(call.entropy ? count : 0), elements(count);
  irl::label_logit(shape, logits, rows.labels.data(), label_logit.data());
  const Coefficients given = affine(call, rows, label_logit);
  row_stats_grad(isa, threads, shape, logits, given.alpha.data(), given.beta.data(),
                 call.entropy ? given.entropy_weight.data() : nullptr, row_max.data(),
                 logsum.data(), call.entropy ? entropy.data() : nullptr, dlogits, dlogits_layout);

  const auto value_of = [&](std::size_t i) {
    return call.values ? static_cast<double>(call.values[i])
                       : static_cast<double>(row_max[i]) + static_cast<double>(logsum[i]);
  };
  double with_td = 0, back = 0;  // back: what row i - 1 sends to row i through its next value
  for (std::size_t i = 0; i < count; ++i) {
    const Kind kind = rows.kinds[i];
    const double m = rows.mle[i], d = rows.td[i], h = call.entropy ? entropy[i] : 0.0;
    const double own = static_cast<double>(row_max[i]) + static_cast<double>(logsum[i]);
    double logprob = 0;
    if (kind != ignored) logprob = (static_cast<double>(label_logit[i]) - row_max[i]) - logsum[i];

    double reward = 0;
    if (call.td && has_td(kind)) {
      double ahead = 0;
      if (kind == bootstrap) ahead = call.next_values ? call.next_values[i] : value_of(i + 1);
      const double q = call.values ? call.values[i] + logprob : label_logit[i];
      reward = q - call.gamma * ahead;
    }
    const double u = 2 * d * masked(d, reward);
    const bool first = static_cast<std::int64_t>(i) % call.length == 0;
    if (dvalues) dvalues[i] = static_cast<float>(u + (first || call.next_values ? 0.0 : back));
    back = kind == bootstrap && !call.detach_next ? -call.gamma * u : 0.0;
    if (dnext_values) dnext_values[i] = static_cast<float>(back);
    if (kind == ignored) continue;

    const double b = call.entropy ? given.entropy_weight[i] : 0.0, beta = given.beta[i];
    const double a = given.alpha[i] + beta * masked(beta, own) + b * masked(b, h);
    elements[i] = static_cast<float>(label_gradient(a, b, u - m, logprob));
    out.loss -= m * masked(m, logprob + (call.entropy ? call.entropy_coef * masked(m, h) : 0.0));
    out.loss += d * masked(d, reward * reward);
    out.nll -= logprob;
    out.value += value_of(i);
    out.entropy += h;
    out.tokens += 1;
    if (!has_td(kind)) continue;
    out.td += reward * reward;
    out.reward += reward;
    with_td += 1;
  }
  const Rows written = {shape.dtype, shape.vocab, dlogits_layout};
  irl::set_label(written, dlogits, rows.labels.data(), elements.data());
  for (double* sum : {&out.nll, &out.value, &out.entropy}) *sum /= std::max(out.tokens, 1.0);
  for (double* sum : {&out.td, &out.reward}) *sum /= std::max(with_td, 1.0);
  return out;
}

}  // namespace irl
