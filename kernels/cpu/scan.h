// The first half of a pass: what is read of a row. Included by loops.h.

IRL_INLINE void add_to(double* totals, Lanes a) {
  float lanes[kLanes];
  store(lanes, a);
  for (int l = 0; l < kLanes; ++l) totals[l] += static_cast<double>(lanes[l]);
}

IRL_INLINE void set_to(double* totals, Lanes a) {
  float lanes[kLanes];
  store(lanes, a);
  for (int l = 0; l < kLanes; ++l) totals[l] = static_cast<double>(lanes[l]);
}

// One half of the lanes added to the other, until one lane is left: a sum of one after the other
// would take longer than a short row.
template <int kHalf = kLanes / 2>
IRL_INLINE double total(const double* totals) {
  double folded[kHalf];
  for (int l = 0; l < kHalf; ++l) folded[l] = totals[l] + totals[l + kHalf];
  if constexpr (kHalf == 1)
    return folded[0];
  else
    return total<kHalf / 2>(folded);
}

// The largest of the first n elements that is a number, -inf if there is none.
template <class T, class Read>
IRL_INLINE float largest_of(const T* x, std::int64_t n, const Read& how) {
  Lanes m = splat(-kInfinity);
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) m = max_or_second(read_one(load(x + j), how), m);
  if (j < n) m = max_or_second(read_some(x + j, n - j, how), m);
  return largest(m);
}

struct Accumulator {
  Lanes max, sum, weighted;
};

// Adds exp(q - reference) 2^kScanShift, and its product with q - reference; keeps the exponentials
// where asked, times dq/dx with `sloped`. Above the range of exp they mean nothing, and the block
// is redone.
template <bool kEntropy, bool kKeep, class Read, int kCount>
IRL_INLINE void accumulate(Accumulator* to, const Lanes (&q)[kCount], Lanes reference, bool sloped,
                           float* keep, const Read& how) {
  Lanes d[kCount], e[kCount];
  for (int k = 0; k < kCount; ++k)
    e[k] = d[k] = max_or_second(splat(kExpZero), sub(q[k], reference));
  for (int k = 0; k < kCount; ++k) to[k].max = max_or_second(q[k], to[k].max);
  exp_scan(e);
  for (int k = 0; k < kCount; ++k) {
    to[k].sum = add(to[k].sum, e[k]);
    if (kEntropy) to[k].weighted = muladd(e[k], d[k], to[k].weighted);
    if (kKeep) store(keep + k * kLanes, sloped ? how.times_slope(e[k], q[k]) : e[k]);
  }
}

struct BlockSums {
  Lanes sum, weighted, max;
};

template <class T, bool kEntropy, bool kKeep, class Read>
IRL_INLINE BlockSums block_sums(const T* x, std::int64_t n, float reference, bool sloped,
                                float* exps, const Read& how) {
  const Lanes r = splat(reference), zero = splat(0.0f), low = splat(-kInfinity);
  Accumulator a[4] = {{low, zero, zero}, {low, zero, zero}, {low, zero, zero}, {low, zero, zero}};
  std::int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
    prefetch_four(x + j);
    Lanes q[4];
    load_two(x + j, q[0], q[1]);
    load_two(x + j + 2 * kLanes, q[2], q[3]);
    how.read(q);
    accumulate<kEntropy, kKeep>(a, q, r, sloped, exps + j, how);
  }
  for (; j < n; j += kLanes) {
    Lanes q[1] = {n - j < kLanes ? load_some(x + j, n - j, -kInfinity) : load(x + j)};
    how.read(q);
    accumulate<kEntropy, kKeep>(a, q, r, sloped, exps + j, how);
  }
  return {add(add(a[0].sum, a[1].sum), add(a[2].sum, a[3].sum)),
          add(add(a[0].weighted, a[1].weighted), add(a[2].weighted, a[3].weighted)),
          max_or_second(max_or_second(a[0].max, a[1].max), max_or_second(a[2].max, a[3].max))};
}

// sum_j exp(q_j - reference), and the same weighted by q_j - reference, in sixteen lanes.
template <bool kEntropy>
struct Totals {
  double sum[kLanes], weighted[kLanes];  // the second with kEntropy alone

  // The same sums measured from another reference: by the factor exp(change).
  void move(double change) {
    const double factor = __builtin_exp(change);
    for (int l = 0; l < kLanes; ++l) {
      if (kEntropy) weighted[l] = factor * (weighted[l] + change * sum[l]);
      sum[l] *= factor;
    }
  }

  // The first block is what the totals begin with.
  void add(const BlockSums& block, bool first) {
    first ? set_to(sum, block.sum) : add_to(sum, block.sum);
    if (kEntropy) first ? set_to(weighted, block.weighted) : add_to(weighted, block.weighted);
  }
};

constexpr double kScanUnit = 1.0 / static_cast<double>(std::int64_t{1} << kScanShift);

// Traffic: one read of x. exps stay in the cache.
//
// One look at each element: the reference is not the row's maximum, which is known at the end only,
// but at most kSlack below the largest element so far. A block that rises above that is redone.
template <class T, bool kEntropy, bool kKeep, class Read>
RowSums scan(const T* x, std::int64_t vocab, bool sloped, float* exps, Segment* segments,
             const Read& how) {
  constexpr float kSlack = 1.0f;
  RowSums row = {-kInfinity, 0.0, 0.0, 0};
  Totals<kEntropy> totals;
  const bool short_row = vocab <= kBlock;
  const float first_max = largest_of(x, short_row ? vocab : kBlock, how);
  float reference = first_max == -kInfinity ? 0.0f : first_max;
  if (kKeep) segments[row.segments++] = {0, reference};
  std::int64_t begin = 0;
  bool redone = false;
  do {
    const std::int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
    float* keep = exps + (kKeep ? begin : 0);
    const BlockSums block =
        block_sums<T, kEntropy, kKeep>(x + begin, n, reference, sloped, keep, how);
    if (short_row) {  // the reference is its maximum
      row.max = first_max;
      row.sum = kScanUnit * sum_of(block.sum);
      if (kEntropy) row.weighted = kScanUnit * sum_of(block.weighted);
      return row;
    }
    const float max = largest(block.max);
    const bool first_number = row.max == -kInfinity && max > -kInfinity;
    if (!redone && (max > reference + kSlack || (first_number && max != reference))) {
      if (!first_number) totals.move(static_cast<double>(reference) - static_cast<double>(max));
      reference = max;
      if (kKeep) segments[row.segments++] = {begin, reference};
      redone = true;
      continue;
    }
    redone = false;
    if (max > row.max) row.max = max;
    totals.add(block, begin == 0);
    begin += kBlock;
  } while (begin < vocab);
  if (row.max > -kInfinity && row.max != reference)
    totals.move(static_cast<double>(reference) - static_cast<double>(row.max));
  row.sum = kScanUnit * total(totals.sum);
  if (kEntropy) row.weighted = kScanUnit * total(totals.weighted);
  return row;
}
