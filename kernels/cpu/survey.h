// What else is found out about a row, most of it while it lies in the cache. Included by loops.h.

template <class Read>
struct Further {
  static constexpr Source kSource = Source::memory;
  static constexpr bool kScratch = false, kNumbers = false;
  Lanes max, log_sum, a, b, d, e;
  const Read& how;
  template <int kCount>
  __attribute__((always_inline)) void apply(std::int64_t, Lanes (&x)[kCount]) const {
    Lanes log_p[kCount], p[kCount];
    how.read(x);
    for (int k = 0; k < kCount; ++k) log_p[k] = sub(sub(x[k], max), log_sum);
    for (int k = 0; k < kCount; ++k) p[k] = exp_range(log_p[k]);
    exp_ranged(p);
    for (int k = 0; k < kCount; ++k) {
      const Lanes y = add(muladd(mul(d, p[k]), p[k], weigh(p[k], log_p[k], a, b)), e);
      x[k] = zero_at_minus_inf(how.times_slope(y, x[k]), x[k]);
    }
  }
};

template <class T, class Read>
void write_further_as(const T* x, T* y, std::int64_t vocab, float max, float log_sum, float a,
                      float b, float d, float e, Stores stores, const Read& how) {
  fill(y, x, 0, vocab,
       Further<Read>{splat(max), splat(log_sum), splat(a), splat(b), splat(d), splat(e), how},
       stores);
}

// Traffic: one read of x, one write of y.
template <class T>
void write_further(const void* x, void* y, std::int64_t vocab, float max, float log_sum, float a,
                   float b, float d, float e, Stores stores, const Readout& readout) {
  const float slope = readout.logit_scale;
  IRL_WITH_READOUT(write_further_as, static_cast<const T*>(x), static_cast<T*>(y), vocab, max,
                   log_sum, slope * a, slope * b, slope * d, slope * e, stores);
}

// The lane that holds element e of a register; interleaved ones have the even elements first.
IRL_INLINE int lane_of(const void*, int e) { return e; }
#ifdef IRL_INTERLEAVED
IRL_INLINE int lane_of(const IRL_INTERLEAVED*, int e) { return e % 2 * (kLanes / 2) + e / 2; }
#endif

// The q of the elements from j on in their own order, -inf behind the row.
template <class T, class Read>
IRL_INLINE void read_lanes(float* q, const T* x, std::int64_t j, std::int64_t vocab,
                           const Read& how) {
  float lanes[kLanes];
  store(lanes, vocab - j < kLanes ? read_some(x + j, vocab - j, how) : read_one(load(x + j), how));
  for (int e = 0; e < kLanes; ++e) q[e] = lanes[lane_of(x, e)];
}

template <class T, class Read>
void filter_as(const T* x, T* y, std::int64_t vocab, const std::uint8_t* keep, float above,
               const Read& how) {
  T nothing[kLanes];
  store(nothing, splat(-kInfinity));
  for (std::int64_t j = 0; j < vocab; j += kLanes) {
    const std::int64_t n = vocab - j < kLanes ? vocab - j : kLanes;
    float q[kLanes];
    if (above > -kInfinity) read_lanes(q, x, j, vocab, how);
    for (std::int64_t l = 0; l < n; ++l) {
      const bool low = above > -kInfinity && q[l] < above;
      y[j + l] = low || (keep && !keep[j + l]) ? nothing[l] : x[j + l];
    }
  }
}

// Traffic: one read of x and keep; y stays in the cache.
template <class T>
void filter_row(const void* x, void* y, std::int64_t vocab, const std::uint8_t* keep, float above,
                const Readout& readout) {
  IRL_WITH_READOUT(filter_as, static_cast<const T*>(x), static_cast<T*>(y), vocab, keep, above);
}

template <class T, class Read>
Survey survey_as(const T* x, std::int64_t vocab, float max, const Read& how) {
  Survey found = {-1, 0.0, 0};
  for (std::int64_t begin = 0; begin < vocab; begin += kBlock) {
    const std::int64_t end = vocab - begin < kBlock ? vocab : begin + kBlock;
    float sums[kLanes], counts[kLanes];
    store(sums, splat(0.0f));
    store(counts, splat(0.0f));
    for (std::int64_t j = begin; j < end; j += kLanes) {
      float q[kLanes];
      read_lanes(q, x, j, vocab, how);
      for (int l = 0; l < kLanes; ++l) {
        const bool present = q[l] != -kInfinity;
        sums[l] += present ? q[l] : 0.0f;
        counts[l] += present ? 1.0f : 0.0f;
      }
      for (std::int64_t l = 0; found.top < 0 && l < kLanes && j + l < vocab; ++l)
        if (q[l] == max) found.top = j + l;
    }
    for (int l = 0; l < kLanes; ++l) {
      found.total += static_cast<double>(sums[l]);
      found.kept += static_cast<std::int64_t>(counts[l]);
    }
  }
  if (found.top < 0) found.top = 0;
  return found;
}

template <class T>
Survey survey_row(const void* x, std::int64_t vocab, float max, const Readout& readout) {
  IRL_WITH_READOUT(survey_as, static_cast<const T*>(x), vocab, max);
}

inline double squares_of(std::int64_t vocab, const float* exps, const Segment* segments,
                         const RowSums& sums) {
  double sum = 0;
  for (std::int64_t s = 0; s < sums.segments; ++s) {
    const std::int64_t end = s + 1 < sums.segments ? segments[s + 1].begin : vocab;
    double totals[kLanes] = {};
    for (std::int64_t begin = segments[s].begin; begin < end; begin += kBlock) {
      const std::int64_t stop = end - begin < kBlock ? end : begin + kBlock;
      Lanes some = splat(0.0f);
      for (std::int64_t j = begin; j < stop; j += kLanes) {  // the scratch is padded by kLanes
        const Lanes e = load(exps + j);
        some = muladd(e, e, some);
      }
      add_to(totals, some);
    }
    const double change =
        static_cast<double>(segments[s].reference) - static_cast<double>(sums.max);
    const double unit = kScanUnit * __builtin_exp(change);
    sum += total(totals) * unit * unit;
  }
  return sum;
}
