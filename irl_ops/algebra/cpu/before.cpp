// Before the pass: align, weigh, coefficients.
#include <algorithm>
#include <cmath>
#include <cstddef>

#include "stages.h"

namespace irl::algebra {

namespace {

std::vector<std::uint8_t> next_row_exists(const Call& call, std::int64_t count) {
  const Sequence& given = call.sequence;
  std::vector<std::uint8_t> exists(static_cast<std::size_t>(count), 1);
  for (std::int64_t end = call.length; end <= count; end += call.length)
    exists[static_cast<std::size_t>(end - 1)] = 0;
  if (const std::int64_t* id = given.segment_ids)
    for (std::int64_t i = 0; i + 1 < count; ++i)
      exists[static_cast<std::size_t>(i)] &= id[i + 1] == id[i];
  if (const std::int64_t* position = given.position_ids)
    for (std::int64_t i = 0; i + 1 < count; ++i)
      exists[static_cast<std::size_t>(i)] &= position[i + 1] == position[i] + 1;
  for (const std::int64_t begin : given.cu_seqlens)
    if (begin > 0 && begin < count) exists[static_cast<std::size_t>(begin - 1)] = 0;
  return exists;
}

Kind kind_of(const Call& call, std::int64_t i, std::int64_t label, bool next, bool next_labelled) {
  const Kind onward = next ? bootstrap : no_td;
  const auto& ends = call.sequence.eos_token_id;
  if (std::find(ends.begin(), ends.end(), label) != ends.end()) return terminal;
  if (next && next_labelled) return bootstrap;
  if (call.sequence.truncated.at && call.sequence.truncated(i, call.length)) return onward;
  if (!ends.empty() || call.sequence.boundary == Boundary::bootstrap) return onward;
  return call.sequence.boundary == Boundary::terminal ? terminal : no_td;
}

double share(double weight, double total) { return total == 0 ? 0.0 : weight / total; }

}  // namespace

Rows align(const Call& call, std::int64_t count, std::int64_t vocab) {
  const Sequence& given = call.sequence;
  const auto n = static_cast<std::size_t>(count);
  Rows rows = {std::vector<std::int64_t>(n, kNoLabel), std::vector<Kind>(n, ignored), -1};
  const std::vector<std::uint8_t> exists = next_row_exists(call, count);
  std::vector<std::uint8_t> labelled(n);
  for (std::size_t i = 0; i < n; ++i) {
    const std::int64_t* here = call.labels + i;
    const std::int64_t label = !given.shift ? here[0] : exists[i] ? here[1] : given.ignore_index;
    labelled[i] = label != given.ignore_index && (!given.where || given.where[i]);
    if (labelled[i]) rows.labels[i] = label;
  }
  for (std::size_t i = 0; i < n; ++i) {
    if (!labelled[i]) continue;
    const std::int64_t label = rows.labels[i];
    const bool next = exists[i];
    rows.kind[i] =
        kind_of(call, static_cast<std::int64_t>(i), label, next, next && labelled[i + 1]);
    if (rows.bad < 0 && (label < 0 || label >= vocab)) rows.bad = static_cast<std::int64_t>(i);
  }
  return rows;
}

Objective weigh(const Call& call, const Rows& rows) {
  const std::size_t n = rows.labels.size();
  const Terms& terms = call.terms;
  const Weighting& given = call.weighting;
  const auto expert = [&](std::size_t i) {
    return !terms.is_expert.at || terms.is_expert(static_cast<std::int64_t>(i), call.length);
  };
  const auto weight = [&](std::size_t i) {
    if (rows.kind[i] == ignored) return 0.0;
    return given.token_weights ? static_cast<double>(given.token_weights[i]) : 1.0;
  };
  double experts = 1, agents = 1;
  if (given.mean && given.counted) {
    experts = given.num_items[0];
    agents = given.num_items[1];
  } else if (given.mean) {
    experts = agents = 0;
    for (std::size_t i = 0; i < n; ++i) (expert(i) ? experts : agents) += weight(i);
  }
  Objective loss = {std::vector<double>(n), std::vector<double>(terms.has_td ? n : 0)};
  for (std::size_t i = 0; i < n; ++i) {
    const bool of_expert = expert(i);
    const double part =
        masked(weight(i), call.above[i] * share(weight(i), of_expert ? experts : agents));
    loss.mle[i] = of_expert ? terms.mle[i] * part : 0.0;
    if (terms.has_td)
      loss.td[i] =
          has_td(rows.kind[i]) ? (of_expert ? terms.td[i] : terms.agent_td[i]) * part : 0.0;
  }
  return loss;
}

Coefficients coefficients(const Call& call, const Rows& rows, const Objective& loss,
                          const std::vector<float>& label_logit) {
  const std::size_t n = rows.labels.size();
  const Heads& heads = call.heads;
  const double gamma = call.terms.gamma;
  Coefficients out = {std::vector<float>(n), std::vector<float>(n), {}};
  if (call.terms.has_entropy) out.entropy_weight.resize(n);
  for (std::size_t i = 0; i < n; ++i) {
    const bool onto = i > 0 && rows.kind[i - 1] == bootstrap;  // row i - 1 bootstraps from row i
    double alpha = loss.mle[i], beta = 0;
    if (call.terms.has_z) beta = 2 * call.terms.z_loss * loss.mle[i];
    if (call.terms.has_td && heads.values) {
      double ahead = 0;
      if (rows.kind[i] == bootstrap)
        ahead = heads.next_values ? heads.next_values[i] : heads.values[i + 1];
      const double q = heads.values[i] - gamma * ahead + label_logit[i];
      alpha -= 2 * loss.td[i] * masked(loss.td[i], q);
      beta += 2 * loss.td[i];
    } else if (call.terms.has_td && onto && !heads.next_values && !heads.detach_next) {
      const double d = loss.td[i - 1];
      alpha -= 2 * gamma * d * masked(d, label_logit[i - 1]);
      beta += 2 * gamma * gamma * d;
    }
    const bool needed = rows.kind[i] != ignored || onto;
    out.alpha[i] = needed ? static_cast<float>(alpha) : -HUGE_VALF;
    out.beta[i] = static_cast<float>(beta);
    if (call.terms.has_entropy)
      out.entropy_weight[i] = static_cast<float>(call.terms.entropy_coef * loss.mle[i]);
  }
  return out;
}

}  // namespace irl::algebra
