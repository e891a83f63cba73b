// The four loops over one row (isa.h), compiled once for every instruction set. The file that
// includes this one names IRL_ISA (the namespace), IRL_SUPPORTED and IRL_LANES. No function of the
// standard library is instantiated here.
//
// Sums run in sixteen lanes, four accumulators each, over blocks of kBlock elements, and from block
// to block in double: the order depends on nothing but the row's length.
#define IRL_INLINE static inline __attribute__((always_inline))

namespace irl {
namespace IRL_ISA {
namespace {

#include IRL_LANES

#include "exp.h"

constexpr float kInfinity = __builtin_inff();
constexpr std::int64_t kAhead = 4096;  // bytes between the element read and the one prefetched

// The first n < kLanes elements into sixteen lanes, `fill` into the others. Out of line: it serves
// only the ends of a row, and would be most of the code.
template <class T>
__attribute__((noinline)) void copy_in(float* lanes, const T* p, std::int64_t n, float fill) {
  T elements[kLanes] = {};
  __builtin_memcpy(elements, p, static_cast<std::size_t>(n) * sizeof(T));
  store(lanes, load(elements));
  for (std::int64_t l = n; l < kLanes; ++l) lanes[l] = fill;
}

template <class T>
__attribute__((noinline)) void copy_out(T* p, const float* lanes, std::int64_t n) {
  T elements[kLanes];
  store(elements, load(lanes));
  __builtin_memcpy(p, elements, static_cast<std::size_t>(n) * sizeof(T));
}

template <class T>
IRL_INLINE Lanes load_some(const T* p, std::int64_t n, float fill) {
  float lanes[kLanes];
  copy_in(lanes, p, n, fill);
  return load(lanes);
}

template <class T>
IRL_INLINE void store_some(T* p, std::int64_t n, Lanes a) {
  float lanes[kLanes];
  store(lanes, a);
  copy_out(p, lanes, n);
}

// Two registers' worth, for which an instruction set may have a shorter way.
template <class T>
IRL_INLINE void load_two(const T* p, Lanes& a, Lanes& b) {
  a = load(p);
  b = load(p + kLanes);
}

template <class T>
IRL_INLINE void store_two(T* p, Lanes a, Lanes b) {
  store(p, a);
  store(p + kLanes, b);
}

template <class T>
IRL_INLINE void stream_two(T* p, Lanes a, Lanes b) {
  stream(p, a);
  stream(p + kLanes, b);
}

// The lines that four registers of elements will come from.
template <class T>
IRL_INLINE void prefetch_four(const T* p) {
  for (std::size_t byte = 0; byte < 4 * kLanes * sizeof(T); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + byte);
}

IRL_INLINE float largest(Lanes a) {
  float lanes[kLanes];
  store(lanes, a);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l)
      lanes[l] = lanes[l + half] > lanes[l] ? lanes[l + half] : lanes[l];
  return lanes[0];
}

IRL_INLINE void add_to(double* totals, Lanes a) {
  float lanes[kLanes];
  store(lanes, a);
  for (int l = 0; l < kLanes; ++l) totals[l] += static_cast<double>(lanes[l]);
}

IRL_INLINE double total(const double* totals) {
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += totals[l];
  return sum;
}

// The largest of the first n elements that is a number, -inf if there is none.
template <class T>
IRL_INLINE float largest_of(const T* q, std::int64_t n) {
  Lanes m = splat(-kInfinity);
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) m = max_or_second(load(q + j), m);
  if (j < n) m = max_or_second(load_some(q + j, n - j, -kInfinity), m);
  return largest(m);
}

struct Accumulator {
  Lanes max, sum, weighted;
};

// Adds exp(q - reference), and its product with q - reference; keeps the exponentials where asked.
// Above the range of exp they mean nothing, and the block is redone.
template <bool kEntropy, bool kKeep, int kCount>
IRL_INLINE void accumulate(Accumulator* to, const Lanes (&q)[kCount], Lanes reference,
                           float* keep) {
  Lanes d[kCount], e[kCount];
  for (int k = 0; k < kCount; ++k)
    e[k] = d[k] = max_or_second(splat(kExpZero), sub(q[k], reference));
  for (int k = 0; k < kCount; ++k) to[k].max = max_or_second(q[k], to[k].max);
  exp_ranged(e);
  for (int k = 0; k < kCount; ++k) {
    to[k].sum = add(to[k].sum, e[k]);
    if (kEntropy) to[k].weighted = muladd(e[k], d[k], to[k].weighted);
    if (kKeep) store(keep + k * kLanes, e[k]);
  }
}

struct BlockSums {
  Lanes sum, weighted;
  float max;
};

template <class T, bool kEntropy, bool kKeep>
IRL_INLINE BlockSums block_sums(const T* q, std::int64_t n, float reference, float* exps) {
  const Lanes r = splat(reference), zero = splat(0.0f), low = splat(-kInfinity);
  Accumulator a[4] = {{low, zero, zero}, {low, zero, zero}, {low, zero, zero}, {low, zero, zero}};
  std::int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
    prefetch_four(q + j);
    Lanes x[4];
    load_two(q + j, x[0], x[1]);
    load_two(q + j + 2 * kLanes, x[2], x[3]);
    accumulate<kEntropy, kKeep>(a, x, r, exps + j);
  }
  for (; j < n; j += kLanes) {
    const Lanes x[1] = {n - j < kLanes ? load_some(q + j, n - j, -kInfinity) : load(q + j)};
    accumulate<kEntropy, kKeep>(a, x, r, exps + j);
  }
  const Lanes max =
      max_or_second(max_or_second(a[0].max, a[1].max), max_or_second(a[2].max, a[3].max));
  return {add(add(a[0].sum, a[1].sum), add(a[2].sum, a[3].sum)),
          add(add(a[0].weighted, a[1].weighted), add(a[2].weighted, a[3].weighted)), largest(max)};
}

// sum_j exp(q_j - reference), and the same weighted by q_j - reference, in sixteen lanes.
struct Totals {
  double sum[kLanes], weighted[kLanes];

  // The same sums measured from another reference: by the factor exp(change).
  void move(double change) {
    const double factor = __builtin_exp(change);
    for (int l = 0; l < kLanes; ++l) {
      weighted[l] = factor * (weighted[l] + change * sum[l]);
      sum[l] *= factor;
    }
  }
};

// Traffic: one read of q. exps stay in the cache.
//
// One look at each element: the reference is not the row's maximum, which is known at the end only,
// but at most kSlack below the largest element so far. A block that rises above that is redone.
template <class T, bool kEntropy, bool kKeep>
RowSums scan(const T* q, std::int64_t vocab, float* exps, Segment* segments) {
  constexpr float kSlack = 1.0f;
  RowSums row = {-kInfinity, 0.0, 0.0, 0};
  Totals totals = {};
  float reference = largest_of(q, vocab < kBlock ? vocab : kBlock);
  if (reference == -kInfinity) reference = 0.0f;
  if (kKeep) segments[row.segments++] = {0, reference};
  for (std::int64_t begin = 0; begin < vocab; begin += kBlock) {
    const std::int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
    float* keep = exps + (kKeep ? begin : 0);
    BlockSums block = block_sums<T, kEntropy, kKeep>(q + begin, n, reference, keep);
    const bool first_number = row.max == -kInfinity && block.max > -kInfinity;
    if (block.max > reference + kSlack || (first_number && block.max != reference)) {
      if (!first_number)
        totals.move(static_cast<double>(reference) - static_cast<double>(block.max));
      reference = block.max;
      if (kKeep) segments[row.segments++] = {begin, reference};
      block = block_sums<T, kEntropy, kKeep>(q + begin, n, reference, keep);
    }
    if (block.max > row.max) row.max = block.max;
    add_to(totals.sum, block.sum);
    if (kEntropy) add_to(totals.weighted, block.weighted);
  }
  if (row.max > -kInfinity && row.max != reference)
    totals.move(static_cast<double>(reference) - static_cast<double>(row.max));
  row.sum = total(totals.sum);
  row.weighted = total(totals.weighted);
  return row;
}

// What a row is filled with: apply turns the sources of the elements from j on, registers of
// kLanes, into their values. kSource says whether there are sources at all, and where they come
// from.
enum class Source { none, cache, memory };

struct Zero {
  static constexpr Source kSource = Source::none;
  template <int kCount>
  __attribute__((always_inline)) void apply(std::int64_t, Lanes (&x)[kCount]) const {
    for (int k = 0; k < kCount; ++k) x[k] = splat(0.0f);
  }
};

// c exps_j, the scratch being padded by kLanes.
struct Scaled {
  static constexpr Source kSource = Source::none;
  const float* exps;
  Lanes c;
  template <int kCount>
  __attribute__((always_inline)) void apply(std::int64_t j, Lanes (&x)[kCount]) const {
    for (int k = 0; k < kCount; ++k) x[k] = mul(c, load(exps + j + k * kLanes));
  }
};

// p (a + b log p); where p is 0 for q = -inf, log p is held finite.
IRL_INLINE Lanes weigh(Lanes p, Lanes log_p, Lanes a, Lanes b) {
  return mul(p, muladd(b, max_or_second(splat(kExpZero), log_p), a));
}

struct ScaledEntropy {
  static constexpr Source kSource = Source::cache;
  const float* exps;
  Lanes c, max, log_sum, a, b;
  template <int kCount>
  __attribute__((always_inline)) void apply(std::int64_t j, Lanes (&q)[kCount]) const {
    for (int k = 0; k < kCount; ++k)
      q[k] = weigh(mul(c, load(exps + j + k * kLanes)), sub(sub(q[k], max), log_sum), a, b);
  }
};

struct Direct {
  static constexpr Source kSource = Source::memory;
  Lanes max, log_sum, a, b;
  template <int kCount>
  __attribute__((always_inline)) void apply(std::int64_t, Lanes (&q)[kCount]) const {
    Lanes log_p[kCount], p[kCount];
    for (int k = 0; k < kCount; ++k) log_p[k] = sub(sub(q[k], max), log_sum);
    for (int k = 0; k < kCount; ++k) p[k] = exp_range(log_p[k]);
    exp_ranged(p);
    for (int k = 0; k < kCount; ++k) q[k] = zero_at_minus_inf(weigh(p[k], log_p[k], a, b), q[k]);
  }
};

struct Multiplied {
  static constexpr Source kSource = Source::memory;
  Lanes factor;
  template <int kCount>
  __attribute__((always_inline)) void apply(std::int64_t, Lanes (&y)[kCount]) const {
    for (int k = 0; k < kCount; ++k) y[k] = mul(factor, y[k]);
  }
};

template <class T, class Row>
IRL_INLINE void four(const T* source, std::int64_t j, const Row& row, Lanes (&x)[4]) {
  if (Row::kSource == Source::memory) prefetch_four(source + j);
  if (Row::kSource != Source::none) {
    load_two(source + j, x[0], x[1]);
    load_two(source + j + 2 * kLanes, x[2], x[3]);
  }
  row.apply(j, x);
}

// y_j = row_j for begin <= j < end, of source_j. Each element is read before it is written, so y
// may be the source.
template <class T, class Row>
IRL_INLINE void fill(T* y, const T* source, std::int64_t begin, std::int64_t end, const Row& row,
                     Stores stores) {
  std::int64_t j = begin;
  Lanes x[4], last[1];
  // The elements from j on, a register of them or as many as there are before `stop`; the new j.
  const auto some = [&](std::int64_t stop) __attribute__((always_inline)) {
    const std::int64_t n = stop - j < kLanes ? stop - j : kLanes;
    if (Row::kSource != Source::none) last[0] = load_some(source + j, n, 0.0f);
    row.apply(j, last);
    store_some(y + j, n, last[0]);
    return j + n;
  };
  if (stores == Stores::streamed) {
    constexpr std::int64_t kLine = 64 / sizeof(T);
    std::int64_t head = -(reinterpret_cast<std::intptr_t>(y + j) / std::intptr_t{sizeof(T)});
    head &= kLine - 1;
    if (head > end - j) head = end - j;
    for (const std::int64_t aligned = j + head; j < aligned;) j = some(aligned);
    for (; j + 4 * kLanes <= end; j += 4 * kLanes) {
      four(source, j, row, x);
      stream_two(y + j, x[0], x[1]);
      stream_two(y + j + 2 * kLanes, x[2], x[3]);
    }
    end_streams();
  }
  for (; j + 4 * kLanes <= end; j += 4 * kLanes) {
    four(source, j, row, x);
    store_two(y + j, x[0], x[1]);
    store_two(y + j + 2 * kLanes, x[2], x[3]);
  }
  while (j < end) j = some(end);
}

// The entries of the table.

template <class T>
RowSums scan_row(const void* q, std::int64_t vocab, bool entropy, float* exps, Segment* segments) {
  const T* x = static_cast<const T*>(q);
  if (exps)
    return entropy ? scan<T, true, true>(x, vocab, exps, segments)
                   : scan<T, false, true>(x, vocab, exps, segments);
  return entropy ? scan<T, true, false>(x, vocab, exps, segments)
                 : scan<T, false, false>(x, vocab, exps, segments);
}

// Traffic: one write of y; exps and q come from the cache.
template <class T>
void write_scanned(const void* q, void* y, std::int64_t vocab, const float* exps,
                   const Segment* segments, const RowSums& sums, double log_sum, double a, float b,
                   Stores stores) {
  for (std::int64_t s = 0; s < sums.segments; ++s) {
    const std::int64_t begin = segments[s].begin;
    const std::int64_t end = s + 1 < sums.segments ? segments[s + 1].begin : vocab;
    // exp(q - max) / sum = exp(q - reference) exp(reference - max) / sum
    const double change =
        static_cast<double>(segments[s].reference) - static_cast<double>(sums.max);
    const double share = __builtin_exp(change) / sums.sum;
    const Lanes c = splat(static_cast<float>(b == 0.0f ? a * share : share));
    if (b == 0.0f) {
      fill(static_cast<T*>(y), static_cast<const T*>(q), begin, end, Scaled{exps, c}, stores);
    } else {
      const ScaledEntropy row = {exps,
                                 c,
                                 splat(sums.max),
                                 splat(static_cast<float>(log_sum)),
                                 splat(static_cast<float>(a)),
                                 splat(b)};
      fill(static_cast<T*>(y), static_cast<const T*>(q), begin, end, row, stores);
    }
  }
}

// Traffic: one read of q, one write of y.
template <class T>
void write(const void* q, void* y, std::int64_t vocab, float max, float log_sum, float a, float b,
           Stores stores) {
  const Direct row = {splat(max), splat(log_sum), splat(a), splat(b)};
  fill(static_cast<T*>(y), static_cast<const T*>(q), 0, vocab, row, stores);
}

// Traffic: one write of y.
template <class T>
void clear(void* y, std::int64_t vocab, Stores stores) {
  fill(static_cast<T*>(y), static_cast<const T*>(y), 0, vocab, Zero{}, stores);
}

// Traffic: one read and one write of y; cached stores, because the read has brought the lines in.
template <class T>
void scale_row(void* y, std::int64_t vocab, float factor) {
  fill(static_cast<T*>(y), static_cast<const T*>(y), 0, vocab, Multiplied{splat(factor)},
       Stores::cached);
}

template <class T>
constexpr RowLoops kLoops = {scan_row<T>, write_scanned<T>, write<T>, clear<T>, scale_row<T>};

bool supported() { return IRL_SUPPORTED; }

}  // namespace

#define IRL_TEXT(name) #name
#define IRL_NAME(name) IRL_TEXT(name)
extern const Isa isa;
const Isa isa = {IRL_NAME(IRL_ISA), supported, {kLoops<float>, kLoops<BFloat16>, kLoops<Float16>}};

}  // namespace IRL_ISA
}  // namespace irl
