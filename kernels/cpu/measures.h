// What else a read of a row can tell, and its gradient: statistics of z, which each row makes of
// its q (rows.h). z_j = q_j scale where column j is kept, else -inf. As
// irl_ops.kernels.reference.measures.
#pragma once
#include <cstdint>

#include "isa.h"
#include "layout.h"
#include "rows.h"
#include "threads.h"

namespace irl {

// What each row has of its own when it is read; null where it has not. A column is kept where
// keep_mask is not 0 and q_j is not below keep_above.
struct RowView {
  const float* scale = nullptr;
  const std::uint8_t* keep_mask = nullptr;
  Layout keep_layout;  // of keep_mask: as that of logits, in bytes
  const float* keep_above = nullptr;
};

// One number per row, `picked` and the ids `count` of them. Null for what nobody asks for, other
// than row_max, logsum and picked.
struct RowMeasures {
  float *row_max, *logsum;
  float* picked;  // z at the ids: 0 below 0, NaN at vocab and above
  float* entropy;
  float* log_sum_sq;   // log sum_j p_j^2, at most 0
  std::int64_t* top1;  // the first of the largest
  float* mean_logit;   // of those above -inf; -inf without any
  float* kept;         // how many those are
};

// The coefficients of row_measures_grad; null for 0, other than a and c.
struct RowSlopes {
  const float *a, *b;
  const float* c;  // `count` per row
  const float *d, *e;
};

// Traffic: one read of the logits, and of keep_mask; what is kept of a row stays in the cache.
void row_measures(const Isa& isa, const Team& team, const Rows& rows, const void* logits,
                  const std::int64_t* ids, std::int64_t count, const RowMeasures& out,
                  const Readout& readout, const RowView& view);

// dlogits_j = (p_j (a + b log p_j + d p_j) + e + sum_k c_k [j = id_k]) dz_j/dx_j, and 0 where z_j
// is -inf. Ids outside the row count nothing. dlogits may be the logits. Traffic: one read of the
// logits, and of keep_mask, and one write of dlogits.
void row_measures_grad(const Isa& isa, const Team& team, const Rows& rows, const void* logits,
                       const std::int64_t* ids, std::int64_t count, const float* row_max,
                       const float* logsum, const RowSlopes& slopes, void* dlogits,
                       const Layout& dlogits_layout, const Readout& readout, const RowView& view);

}  // namespace irl
