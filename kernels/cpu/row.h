// One row of a strided array, and what its sums say: shared by the row kernels.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "element.h"
#include "isa.h"
#include "pages.h"
#include "rows.h"

namespace irl {

inline constexpr std::int64_t kStreamedRow =
    4096;  // bytes; shorter rows leave too many partial lines

inline const char* row_at(const void* base, const Rows& rows, std::int64_t row) {
  return static_cast<const char*>(base) + rows.layout.offset(row) * size_of(rows.dtype);
}

inline char* row_at(void* base, const Rows& rows, const Layout& layout, std::int64_t row) {
  return static_cast<char*>(base) + layout.offset(row) * size_of(rows.dtype);
}

// In place the lines are in the cache already, and streaming would only evict them early.
inline Stores choose_stores(const void* logits, void* dlogits, const Rows& rows,
                            const Layout& layout) {
  const std::int64_t count = rows.layout.rows(), bytes = rows.vocab * size_of(rows.dtype);
  if (count == 0 || bytes < kStreamedRow || logits == dlogits) return Stores::cached;
  const auto [low, high] = layout.span();
  char* begin = static_cast<char*>(dlogits) + low * size_of(rows.dtype);
  const std::int64_t span = (high - low) * size_of(rows.dtype) + bytes;
  if (span > 2 * count * bytes) return Stores::cached;  // mostly gaps, which are not ours
  return prepare_output(begin, span) ? Stores::streamed : Stores::cached;
}

// What scan leaves for the write of the same row: private to a thread, kept in its L2.
class Scratch {
 public:
  explicit Scratch(std::int64_t vocab)
      : exps_(static_cast<float*>(::operator new(
            static_cast<std::size_t>(vocab + kLanes) * sizeof(float), std::align_val_t{64}))),
        segments_(static_cast<std::size_t>(vocab / kBlock + 2)) {}
  ~Scratch() { ::operator delete(exps_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* exps() { return exps_; }
  Segment* segments() { return segments_.data(); }

 private:
  float* exps_;
  std::vector<Segment> segments_;
};

inline double log_sum(const RowSums& sums) { return std::log(sums.sum); }

// No mass, as in a row of -inf: the empty sum of p log p.
inline double entropy_of(const RowSums& sums, double log_s) {
  return sums.sum == 0 ? 0.0 : log_s - sums.weighted / sums.sum;
}

inline float label_logit_of(const Isa& isa, const Rows& rows, const char* x, std::int64_t label,
                            const Readout& readout) {
  if (label < 0) return 0.0f;
  if (label >= rows.vocab) return std::numeric_limits<float>::quiet_NaN();
  const float picked = read_element(rows.dtype, x + label * size_of(rows.dtype));
  if (readout.logit_scale == 1 && readout.softcap == 0) return picked;
  return isa.loops[static_cast<int>(rows.dtype)].read(picked, readout);
}

// The derivative by x of what has the derivative `by_q`, where the logit is q. A 0 stays one, where
// q is NaN too.
inline double through_cap(const Readout& readout, double by_q, double q) {
  if (by_q == 0) return 0.0;
  if (readout.softcap == 0) return readout.logit_scale * by_q;
  if (q == -HUGE_VAL) return 0.0;
  const double t = q / readout.softcap;
  return readout.logit_scale * (1 - t) * (1 + t) * by_q;
}

}  // namespace irl
