// The loops over one row (isa.h), compiled once for every instruction set. The file that
// includes this one names IRL_ISA (the namespace), IRL_SUPPORTED and IRL_LANES. No function of the
// standard library is instantiated here.
//
// Sums run in sixteen lanes, four accumulators each, over blocks of kBlock elements, and from block
// to block in double: the order depends on nothing but the row's length.
#define IRL_INLINE static inline __attribute__((always_inline))
#define IRL_INLINE_MEMBER inline __attribute__((always_inline))

namespace irl {
namespace IRL_ISA {
namespace {

#include IRL_LANES

#include "exp.h"
#include "readout.h"

constexpr float kInfinity = __builtin_inff();
constexpr std::int64_t kAhead = 4096;  // bytes between the element read and the one prefetched

// The first n < kLanes elements into sixteen lanes, `fill` into the others. Out of line: it serves
// only the ends of a row, and would be most of the code.
template <class T>
__attribute__((noinline)) void copy_in(float* lanes, const T* p, std::int64_t n, float fill) {
  T elements[kLanes];
  store(elements, splat(fill));
  __builtin_memcpy(elements, p, static_cast<std::size_t>(n) * sizeof(T));
  store(lanes, load(elements));
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

// The first n as q, -inf in the other lanes.
template <class T, class Read>
IRL_INLINE Lanes read_some(const T* p, std::int64_t n, const Read& how) {
  return read_one(load_some(p, n, -kInfinity), how);
}

// Where no lane holds a NaN but the one that arithmetic makes.
template <class T>
IRL_INLINE void store_numbers(T* p, Lanes a) {
  store(p, a);
}
template <class T>
IRL_INLINE void stream_numbers(T* p, Lanes a) {
  stream(p, a);
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

#include "fill.h"
#include "scan.h"
#include "survey.h"

// The entries of the table.

template <class T, class Read>
RowSums scan_as(const void* x, std::int64_t vocab, bool entropy, bool sloped, float* exps,
                Segment* segments, const Read& how) {
  const T* row = static_cast<const T*>(x);
  if (exps)
    return entropy ? scan<T, true, true>(row, vocab, sloped, exps, segments, how)
                   : scan<T, false, true>(row, vocab, sloped, exps, segments, how);
  return entropy ? scan<T, true, false>(row, vocab, sloped, exps, segments, how)
                 : scan<T, false, false>(row, vocab, sloped, exps, segments, how);
}

template <class T>
RowSums scan_row(const void* x, std::int64_t vocab, bool entropy, bool sloped, float* exps,
                 Segment* segments, const Readout& readout) {
  IRL_WITH_READOUT(scan_as<T>, x, vocab, entropy, sloped, exps, segments);
}

// Traffic: one write of y; exps and x come from the cache.
template <class T, class Read>
void write_segments(const T* x, T* y, std::int64_t vocab, const float* exps,
                    const Segment* segments, const RowSums& sums, double log_sum, double a,
                    double b, Stores stores, const Read& how) {
  const Lanes max = splat(sums.max), log_s = splat(static_cast<float>(log_sum));
  const Lanes wide_a = splat(static_cast<float>(a)), wide_b = splat(static_cast<float>(b));
  for (std::int64_t s = 0; s < sums.segments; ++s) {
    const std::int64_t begin = segments[s].begin;
    const std::int64_t end = s + 1 < sums.segments ? segments[s + 1].begin : vocab;
    // exp(q - max) / sum = exp(q - reference) exp(reference - max) / sum
    const double change =
        static_cast<double>(segments[s].reference) - static_cast<double>(sums.max);
    const double share = kScanUnit * __builtin_exp(change) / sums.sum;
    const double factor = b == 0 ? a * share : share;
    const Lanes c = splat(static_cast<float>(factor));
    if (factor < 0x1p-100 && -factor < 0x1p-100)  // c would be subnormal, where p need not be
      fill(y, x, begin, end, Direct<Read>{max, log_s, wide_a, wide_b, how}, Stores::cached);
    else if (b == 0)
      fill_grouped(y, x, begin, end, Scaled{exps, c}, stores);
    else
      fill_grouped(y, x, begin, end, ScaledEntropy<Read>{exps, c, max, log_s, wide_a, wide_b, how},
                   stores);
  }
}

template <class T>
void write_scanned(const void* x, void* y, std::int64_t vocab, const float* exps,
                   const Segment* segments, const RowSums& sums, double log_sum, double a, float b,
                   Stores stores, const Readout& readout) {
  const double slope = readout.logit_scale;
  IRL_WITH_READOUT(write_segments, static_cast<const T*>(x), static_cast<T*>(y), vocab, exps,
                   segments, sums, log_sum, slope * a, slope * b, stores);
}

template <class T, class Read>
void write_as(const T* x, T* y, std::int64_t vocab, float max, float log_sum, float a, float b,
              Stores stores, const Read& how) {
  fill(y, x, 0, vocab, Direct<Read>{splat(max), splat(log_sum), splat(a), splat(b), how}, stores);
}

// Traffic: one read of x, one write of y.
template <class T>
void write(const void* x, void* y, std::int64_t vocab, float max, float log_sum, float a, float b,
           Stores stores, const Readout& readout) {
  const float slope = readout.logit_scale;
  IRL_WITH_READOUT(write_as, static_cast<const T*>(x), static_cast<T*>(y), vocab, max, log_sum,
                   slope * a, slope * b, stores);
}

template <class Read>
float read_as(float x, const Read& how) {
  float lanes[kLanes];
  store(lanes, read_one(splat(x), how));
  return lanes[0];
}
float read_x(float x, const Readout& readout) { IRL_WITH_READOUT(read_as, x); }

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
constexpr RowLoops kLoops = {read_x,           scan_row<T>,   write_scanned<T>, write<T>,
                             write_further<T>, filter_row<T>, survey_row<T>,    squares_of,
                             clear<T>,         scale_row<T>};

bool supported() { return IRL_SUPPORTED; }

}  // namespace

#define IRL_TEXT(name) #name
#define IRL_NAME(name) IRL_TEXT(name)
extern const Isa isa;
const Isa isa = {IRL_NAME(IRL_ISA), supported, {kLoops<float>, kLoops<BFloat16>, kLoops<Float16>}};

}  // namespace IRL_ISA
}  // namespace irl
