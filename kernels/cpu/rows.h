// The row kernels: what every caller of the C++ side sees. No framework, no Python.
//
// logits and dlogits are arrays of rows by `vocab` columns, the last axis contiguous, the rows
// where their Layout says; both may be the same memory with the same layout. Row vectors hold one
// float per row, contiguous; labels one int64 per row: below 0 is "no label", vocab or above is bad
// and gives a NaN, nothing being read or written for it. Arithmetic is float32, sums end in double.
// The result is the same bits for any number of threads. Every output is written on every path.
//
// Where a Readout is given, logits are x and every q below is what it makes of them; dlogits is the
// gradient to x. Write q for a row, p = softmax(q). A row that is all -inf, or has no columns, has
// row_max = logsum = -inf, entropy 0, and gradient 0.
#pragma once
#include <cstdint>

#include "isa.h"
#include "layout.h"
#include "threads.h"

namespace irl {

struct Rows {
  Dtype dtype;
  std::int64_t vocab;
  Layout layout;
};

// row_max = max_j q_j, logsum = log sum_j exp(q_j - row_max), label_logit = q_label (0 without a
// label), and unless null entropy = logsum - sum_j p_j (q_j - row_max).
// Traffic: one read of the logits.
void row_stats(const Isa& isa, const Team& team, const Rows& rows, const void* logits,
               const std::int64_t* labels, float* row_max, float* logsum, float* label_logit,
               float* entropy, const Readout& readout = {});

// dlogits_j = p_j (a + b log p_j) + c [j = label], log p_j = (q_j - row_max) - logsum. Without a
// label there is no c; a bad label gets none either. labels and c are null where no row has one.
// Traffic: one read of the logits and one write of dlogits; rows of a = b = 0 are not read.
void row_grad(const Isa& isa, const Team& team, const Rows& rows, const void* logits,
              const std::int64_t* labels, const float* row_max, const float* logsum, const float* a,
              const float* b, const float* c, void* dlogits, const Layout& dlogits_layout,
              const Readout& readout = {});

// Statistics as in row_stats and dlogits_j = p_j (A + B log p_j), where
// A = alpha + beta (row_max + logsum) + entropy_weight entropy and B = entropy_weight; a term whose
// coefficient is 0 counts as 0. entropy_weight null means 0; entropy may be null. Where alpha =
// -inf nobody needs the row: its statistics and its gradient are 0. Traffic: one read of the
// logits, except in rows of alpha = -inf, and one write of dlogits.
void row_stats_grad(const Isa& isa, const Team& team, const Rows& rows, const void* logits,
                    const float* alpha, const float* beta, const float* entropy_weight,
                    float* row_max, float* logsum, float* entropy, void* dlogits,
                    const Layout& dlogits_layout, const Readout& readout = {});

// The two ends of a pass: what row_stats_grad leaves to its caller, one element per row.
// label_logit as in row_stats, in the arithmetic of the instruction set, null being the best one.
// set_label writes elements[i], the derivative by q, times dq/dx at the row's label, rounded once;
// in a row without a valid label it writes nothing. It computes dq/dx from q: with a softcap it
// needs label_logit, which is null without one.
void label_logit(const Rows& rows, const void* logits, const std::int64_t* labels, float* picked,
                 const Readout& readout = {}, const Isa* isa = nullptr);
void set_label(const Rows& rows, void* dlogits, const std::int64_t* labels, const float* elements,
               const float* label_logit = nullptr, const Readout& readout = {});

// dlogits *= factor. Traffic: one read and one write; none where factor is 1.
void scale(const Isa& isa, const Team& team, const Rows& rows, void* dlogits, float factor);

}  // namespace irl
