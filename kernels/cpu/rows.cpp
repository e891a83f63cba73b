// The row kernels: the rules for labels and coefficients, around the loops of isa.h.
#include "rows.h"

#include <cmath>

#include "row.h"

namespace irl {

namespace {

// visit(i, row i) for all rows, some of whose labels' elements are on their way to the cache
// already: each lies on a line, and mostly a page, of its own.
template <class Visit>
void for_each_label(const Rows& rows, const void* logits, const std::int64_t* labels,
                    const Visit& visit) {
  constexpr std::int64_t kAhead = 64;
  const std::int64_t count = rows.layout.rows(), size = size_of(rows.dtype);
  const auto prefetch = [&](std::int64_t i) {
    if (i < count && labels[i] >= 0 && labels[i] < rows.vocab)
      __builtin_prefetch(row_at(logits, rows, i) + labels[i] * size);
  };
  for (std::int64_t i = 0; i < kAhead; ++i) prefetch(i);
  for (std::int64_t i = 0; i < count; ++i) {
    prefetch(i + kAhead);
    visit(i, row_at(logits, rows, i));
  }
}

// coefficient * x, a zero coefficient giving 0 whatever x is.
double term(float coefficient, double x) {
  return coefficient == 0 ? 0.0 : static_cast<double>(coefficient) * x;
}

}  // namespace

void row_stats(const Isa& isa, const Team& team, const Rows& rows, const void* logits,
               const std::int64_t* labels, float* row_max, float* logsum, float* label_logit,
               float* entropy, const Readout& readout) {
  const RowLoops& loops = isa.loops[static_cast<int>(rows.dtype)];
  const std::int64_t count = rows.layout.rows();
  over_rows(count, rows.vocab, team, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const char* q = row_at(logits, rows, i);
      const RowSums sums =
          loops.scan(q, rows.vocab, entropy != nullptr, false, nullptr, nullptr, readout);
      const double log_s = log_sum(sums);
      row_max[i] = sums.max;
      logsum[i] = static_cast<float>(log_s);
      label_logit[i] = label_logit_of(isa, rows, q, labels[i], readout);
      if (entropy) entropy[i] = static_cast<float>(entropy_of(sums, log_s));
    }
  });
}

void row_grad(const Isa& isa, const Team& team, const Rows& rows, const void* logits,
              const std::int64_t* labels, const float* row_max, const float* logsum, const float* a,
              const float* b, const float* c, void* dlogits, const Layout& dlogits_layout,
              const Readout& readout) {
  const RowLoops& loops = isa.loops[static_cast<int>(rows.dtype)];
  const std::int64_t count = rows.layout.rows(), size = size_of(rows.dtype);
  const Stores stores = choose_stores(logits, dlogits, rows, dlogits_layout);
  over_rows(count, rows.vocab, team, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const char* q = row_at(logits, rows, i);
      char* y = row_at(dlogits, rows, dlogits_layout, i);
      const bool labelled = labels && labels[i] >= 0 && labels[i] < rows.vocab;
      const bool empty = a[i] == 0 && b[i] == 0;
      // Read before y, which may be q, is written.
      const float picked = labelled && (!empty || readout.softcap != 0)
                               ? label_logit_of(isa, rows, q, labels[i], readout)
                               : 0.0f;
      if (empty)
        loops.clear(y, rows.vocab, stores);
      else
        loops.write(q, y, rows.vocab, row_max[i], logsum[i], a[i], b[i], stores, readout);
      if (!labelled) continue;
      double value = c[i];
      if (!empty && !(picked == -HUGE_VALF)) {
        const double log_p = (static_cast<double>(picked) - row_max[i]) - logsum[i];
        value += std::exp(log_p) * (a[i] + b[i] * log_p);
      }
      write_element(rows.dtype, y + labels[i] * size,
                    static_cast<float>(through_cap(readout, value, picked)));
    }
  });
}

void row_stats_grad(const Isa& isa, const Team& team, const Rows& rows, const void* logits,
                    const float* alpha, const float* beta, const float* entropy_weight,
                    float* row_max, float* logsum, float* entropy, void* dlogits,
                    const Layout& dlogits_layout, const Readout& readout) {
  const RowLoops& loops = isa.loops[static_cast<int>(rows.dtype)];
  const std::int64_t count = rows.layout.rows();
  const Stores stores = choose_stores(logits, dlogits, rows, dlogits_layout);
  over_rows(count, rows.vocab, team, [&](std::int64_t begin, std::int64_t end) {
    Scratch scratch(rows.vocab);
    for (std::int64_t i = begin; i < end; ++i) {
      const char* q = row_at(logits, rows, i);
      char* y = row_at(dlogits, rows, dlogits_layout, i);
      if (alpha[i] == -HUGE_VALF) {
        row_max[i] = logsum[i] = 0;
        if (entropy) entropy[i] = 0;
        loops.clear(y, rows.vocab, stores);
        continue;
      }
      const float b = entropy_weight ? entropy_weight[i] : 0.0f;
      const bool empty = alpha[i] == 0 && beta[i] == 0 && b == 0;
      const RowSums sums =
          loops.scan(q, rows.vocab, entropy || b != 0, true, empty ? nullptr : scratch.exps(),
                     scratch.segments(), readout);
      const double log_s = log_sum(sums), h = entropy || b != 0 ? entropy_of(sums, log_s) : 0.0;
      const double a = alpha[i] + term(beta[i], sums.max + log_s) + term(b, h);
      row_max[i] = sums.max;
      logsum[i] = static_cast<float>(log_s);
      if (entropy) entropy[i] = static_cast<float>(h);

      if (static_cast<float>(a) == 0 && b == 0)
        loops.clear(y, rows.vocab, stores);
      else if (std::isfinite(a / sums.sum))
        loops.write_scanned(q, y, rows.vocab, scratch.exps(), scratch.segments(), sums, log_s, a, b,
                            stores, readout);
      else  // NaN, inf or no mass: the slow way keeps 0 where q is -inf
        loops.write(q, y, rows.vocab, sums.max, static_cast<float>(log_s), static_cast<float>(a), b,
                    stores, readout);
    }
  });
}

void label_logit(const Rows& rows, const void* logits, const std::int64_t* labels, float* picked,
                 const Readout& readout, const Isa* isa) {
  const Isa& chosen = isa ? *isa : find_isa("");
  for_each_label(rows, logits, labels, [&](std::int64_t i, const char* q) {
    picked[i] = label_logit_of(chosen, rows, q, labels[i], readout);
  });
}

void set_label(const Rows& rows, void* dlogits, const std::int64_t* labels, const float* elements,
               const float* label_logit, const Readout& readout) {
  for_each_label(rows, dlogits, labels, [&](std::int64_t i, const char*) {
    if (labels[i] >= 0 && labels[i] < rows.vocab)
      write_element(rows.dtype,
                    row_at(dlogits, rows, rows.layout, i) + labels[i] * size_of(rows.dtype),
                    static_cast<float>(
                        through_cap(readout, elements[i], label_logit ? label_logit[i] : 0.0f)));
  });
}

void scale(const Isa& isa, const Team& team, const Rows& rows, void* dlogits, float factor) {
  if (factor == 1) return;
  const RowLoops& loops = isa.loops[static_cast<int>(rows.dtype)];
  const std::int64_t count = rows.layout.rows();
  over_rows(count, rows.vocab, team, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      loops.scale(row_at(dlogits, rows, rows.layout, i), rows.vocab, factor);
  });
}

}  // namespace irl
