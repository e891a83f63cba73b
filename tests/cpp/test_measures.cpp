// The row measures and their gradient in exactly sized heap blocks, against sums in double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <utility>
#include <vector>

#include "checks.h"
#include "measures.h"

namespace {

constexpr std::int64_t kRows = 6;
constexpr double kInf = std::numeric_limits<double>::infinity();

// One row in double: z, and what is said of it.
struct Exact {
  std::vector<double> z, p, slope;
  double max = -kInf, logsum = -kInf, entropy = 0, squares = 0, mean = -kInf;
  std::int64_t kept = 0;
};

struct Case {
  const irl::Isa& isa;
  irl::Dtype dtype;
  std::int64_t vocab;
  irl::Readout readout;
  bool scaled, masked, bounded;
};

std::vector<std::int64_t> ids_for(std::int64_t vocab) {
  using Limits = std::numeric_limits<std::int64_t>;
  const std::int64_t of_a_row[] = {0,  vocab - 1,     vocab / 2,     vocab / 2, vocab,
                                   -1, Limits::min(), Limits::max(), 0};
  std::vector<std::int64_t> ids;
  for (std::int64_t i = 0; i < kRows; ++i)
    ids.insert(ids.end(), std::begin(of_a_row), std::end(of_a_row));
  return ids;
}

// What every row has of its own. Of row 0 the mask leaves nothing, of row 1 the threshold.
struct Own {
  std::vector<float> scale, above;
  std::vector<std::uint8_t> mask;
  irl::Layout layout;

  explicit Own(std::int64_t vocab)
      : above{-HUGE_VALF, HUGE_VALF, -1.0f, std::nanf(""), 0.5f, -HUGE_VALF},
        mask(static_cast<std::size_t>(kRows * vocab)),
        layout{{2, 3}, {-3 * vocab, vocab}} {
    for (std::int64_t i = 0; i < kRows; ++i) {
      scale.push_back(0.4f + 0.3f * static_cast<float>(i));
      for (std::int64_t j = 0; j < vocab; ++j)
        mask[static_cast<std::size_t>(3 * vocab + layout.offset(i) + j)] =
            i != 0 && (i * vocab + j) % 5 != 3;
    }
  }
  // Of row 0, which does not come first.
  const std::uint8_t* rows() const { return mask.data() + 3 * layout.strides[1]; }
};

Exact exact(const Case& c, const Own& own, Block& x, std::int64_t row) {
  Exact e;
  const double scale = c.scaled ? own.scale[static_cast<std::size_t>(row)] : 1.0;
  const float above = own.above[static_cast<std::size_t>(row)];
  const double cap = c.readout.softcap;
  for (std::int64_t j = 0; j < c.vocab; ++j) {
    const double u = c.readout.logit_scale * irl::read_element(c.dtype, x.at(row, j));
    const double t = cap != 0 ? std::tanh(u / cap) : 0.0, q = cap != 0 ? cap * t : u;
    const bool there =
        (!c.bounded || !(q < above)) && (!c.masked || own.rows()[own.layout.offset(row) + j] != 0);
    e.z.push_back(there ? scale * q : -kInf);
    e.slope.push_back(there ? scale * c.readout.logit_scale * (1 - t * t) : 0.0);
    e.max = std::max(e.max, e.z.back());
    e.kept += there;
  }
  double sum = 0, total = 0;
  for (const double z : e.z) sum += z == -kInf ? 0.0 : std::exp(z - e.max);
  e.logsum = std::log(sum);
  for (const double z : e.z) {
    e.p.push_back(z == -kInf ? 0.0 : std::exp(z - e.max - e.logsum));
    if (z == -kInf) continue;
    total += z;
    e.squares += e.p.back() * e.p.back();
    e.entropy -= e.p.back() * (z - e.max - e.logsum);
  }
  if (e.kept) e.mean = total / static_cast<double>(e.kept);
  return e;
}

bool near(double got, double wanted, double error) {
  return got == wanted || (std::isnan(got) && std::isnan(wanted)) ||
         std::fabs(got - wanted) <= error * (1 + std::fabs(wanted));
}

// Rows that rise, so that in a long one the maximum moves.
void fill(const Case& c, Block& x) {
  for (std::int64_t i = 0; i < kRows; ++i)
    for (std::int64_t j = 0; j < c.vocab; ++j) {
      const double wave = std::sin(static_cast<double>(i * c.vocab + j));
      irl::write_element(c.dtype, x.at(i, j),
                         static_cast<float>(5 * wave + static_cast<double>(j) / 600));
    }
}

// Numbers of a row, as many of them as there are rows.
std::vector<float> numbers(float first, float step) {
  std::vector<float> x;
  for (std::int64_t i = 0; i < kRows; ++i) x.push_back(first + step * static_cast<float>(i));
  return x;
}

void check(const Case& c, std::int64_t start) {
  Block x(c.dtype, c.vocab, start, 3), y(c.dtype, c.vocab, 3, start);
  fill(c, x);
  const Own own(c.vocab);
  irl::RowView view;
  if (c.scaled) view.scale = own.scale.data();
  if (c.masked) view.keep_mask = own.rows(), view.keep_layout = own.layout;
  if (c.bounded) view.keep_above = own.above.data();
  const irl::Rows rows = {c.dtype, c.vocab, x.layout};
  const std::vector<std::int64_t> ids = ids_for(c.vocab);
  const std::int64_t count = static_cast<std::int64_t>(ids.size()) / kRows;

  std::vector<float> row_max(kRows), logsum(kRows), picked(ids.size()), entropy(kRows);
  std::vector<float> squares(kRows), mean(kRows), kept(kRows);
  std::vector<std::int64_t> top(kRows);
  const irl::RowMeasures all = {row_max.data(), logsum.data(), picked.data(), entropy.data(),
                                squares.data(), top.data(),    mean.data(),   kept.data()};
  const irl::RowMeasures few = {row_max.data(), logsum.data(), nullptr, nullptr,
                                nullptr,        nullptr,       nullptr, nullptr};
  irl::row_measures(c.isa, 2, rows, x.data(), nullptr, 0, few, c.readout, view);
  irl::row_measures(c.isa, 2, rows, x.data(), ids.data(), count, all, c.readout, view);

  const std::vector<float> a = numbers(1, -0.25f), b = numbers(-0.5f, 0.25f), d = numbers(0, 0.5f);
  const std::vector<float> e = numbers(0.25f, -0.125f), zero(kRows);
  std::vector<float> at_ids;
  for (std::size_t k = 0; k < ids.size(); ++k) at_ids.push_back(0.1f * static_cast<float>(k % 7));
  const irl::RowSlopes nothing = {zero.data(), nullptr, nullptr, nullptr, nullptr};
  const irl::RowSlopes silent = {zero.data(), nullptr, at_ids.data(), nullptr, nullptr};
  const irl::RowSlopes plain = {a.data(), b.data(), at_ids.data(), nullptr, nullptr};
  const irl::RowSlopes whole = {a.data(), b.data(), at_ids.data(), d.data(), e.data()};
  const auto grad = [&](const irl::RowSlopes& slopes, Block& to, std::int64_t n) {
    irl::row_measures_grad(c.isa, 2, rows, x.data(), n ? ids.data() : nullptr, n, row_max.data(),
                           logsum.data(), slopes, to.data(), to.layout, c.readout, view);
  };
  grad(nothing, y, 0);
  grad(silent, y, count);
  grad(plain, y, count);
  grad(whole, y, count);
  grad(whole, x, count);  // in place: read from here on is the gradient

  // Half of a unit in the last place, and float32's rounding of what was summed.
  const double step = c.dtype == irl::Dtype::float32   ? 0
                      : c.dtype == irl::Dtype::float16 ? 1e-3
                                                       : 4e-3;
  Block again(c.dtype, c.vocab, start, 3);
  fill(c, again);
  for (std::int64_t i = 0; i < kRows; ++i) {
    const auto at = static_cast<std::size_t>(i);
    const Exact r = exact(c, own, again, i);
    const auto say = [&](bool holds, const char* what) {
      expect(holds, what, c.isa.name, static_cast<double>(c.vocab));
    };
    say(near(row_max[at], r.max, 1e-5), "row_max");
    say(near(logsum[at], r.logsum, 1e-5), "logsum");
    say(near(entropy[at], r.entropy, 1e-4), "entropy");
    say(near(squares[at], std::log(r.squares), 1e-4), "log_sum_sq");
    say(near(mean[at], r.mean, 1e-4), "mean_logit");
    say(kept[at] == static_cast<float>(r.kept), "kept");
    say(top[at] >= 0 && top[at] < c.vocab, "top1 is no column");
    say(near(r.z[static_cast<std::size_t>(top[at])], r.max, 1e-5), "top1");
    std::vector<double> wanted;
    for (std::size_t j = 0; j < r.z.size(); ++j) {
      const double log_p = r.z[j] == -kInf ? 0.0 : r.z[j] - r.max - r.logsum;
      wanted.push_back(r.p[j] * (a[at] + b[at] * log_p + d[at] * r.p[j]) + e[at]);
    }
    for (std::int64_t k = 0; k < count; ++k) {
      const auto here = static_cast<std::size_t>(i * count + k);
      const std::int64_t id = ids[here];
      const bool good = id >= 0 && id < c.vocab;
      const double z = good ? r.z[static_cast<std::size_t>(id)] : id < 0 ? 0.0 : std::nan("");
      say(near(picked[here], z, 1e-5), "picked");
      if (good) wanted[static_cast<std::size_t>(id)] += at_ids[here];
    }
    for (std::int64_t j = 0; j < c.vocab; ++j) {
      const auto column = static_cast<std::size_t>(j);
      const bool gone = r.z[column] == -kInf;
      const double g = gone ? 0.0 : wanted[column] * r.slope[column];
      say(near(irl::read_element(c.dtype, y.at(i, j)), g, step + 1e-4), "gradient");
      say(near(irl::read_element(c.dtype, x.at(i, j)), g, step + 1e-4), "gradient in place");
    }
  }
}

// Rows of NaN: a top that is a column, and no trace of them where their coefficients are 0.
void check_nan(const irl::Isa& isa) {
  constexpr std::int64_t vocab = 17;
  std::vector<float> x(kRows * vocab, std::nanf("")), y(x.size());
  const irl::Rows rows = {irl::Dtype::float32, vocab, {{kRows}, {vocab}}};
  std::vector<float> row_max(kRows), logsum(kRows), mean(kRows), kept(kRows), zero(kRows);
  std::vector<std::int64_t> top(kRows, -1);
  const irl::RowMeasures out = {row_max.data(), logsum.data(), nullptr,     nullptr,
                                nullptr,        top.data(),    mean.data(), kept.data()};
  irl::row_measures(isa, 2, rows, x.data(), nullptr, 0, out, {}, {});
  irl::row_measures_grad(isa, 2, rows, x.data(), nullptr, 0, row_max.data(), logsum.data(),
                         {zero.data(), zero.data(), nullptr, zero.data(), zero.data()}, y.data(),
                         rows.layout, {}, {});
  for (std::size_t i = 0; i < kRows; ++i)
    expect(top[i] >= 0 && top[i] < vocab && std::isnan(mean[i]), "a row of NaN", isa.name,
           static_cast<double>(top[i]));
  for (const float g : y) expect(g == 0, "the gradient of a silent row", isa.name, g);
}

}  // namespace

void check_measures(const irl::Isa& isa) {
  for (const auto dtype : {irl::Dtype::float32, irl::Dtype::bfloat16, irl::Dtype::float16})
    for (const std::int64_t vocab : {1, 2, 15, 17, 64, 67, 4129})
      for (const irl::Readout readout : {irl::Readout{}, irl::Readout{1.5f, 3}})
        for (int own = 0; own < 8; own += vocab < 100 ? 1 : 7)  // of long rows all or nothing
          check({isa, dtype, vocab, readout, (own & 1) != 0, (own & 2) != 0, (own & 4) != 0},
                own % 3);
  check_nan(isa);
}
