// The second half of a pass: what is written of a row. Included by loops.h.

// What a row is filled with: apply turns the sources of the elements from j on, registers of
// kLanes, into their values. kSource says whether there are sources at all, and where they come
// from; kScratch whether the scratch is read as well, in whose groups of lanes it has to stay;
// kNumbers that a NaN can only be one that arithmetic makes.
enum class Source { none, cache, memory };

struct Zero {
  static constexpr Source kSource = Source::none;
  static constexpr bool kScratch = false, kNumbers = true;
  template <int kCount>
  __attribute__((always_inline)) void apply(std::int64_t, Lanes (&x)[kCount]) const {
    for (int k = 0; k < kCount; ++k) x[k] = splat(0.0f);
  }
};

// c exps_j, the scratch being padded by kLanes; dq/dx is in it.
struct Scaled {
  static constexpr Source kSource = Source::none;
  static constexpr bool kScratch = true, kNumbers = true;
  const float* exps;
  Lanes c;
  Scaled from(std::int64_t j) const { return {exps + j, c}; }
  template <int kCount>
  __attribute__((always_inline)) void apply(std::int64_t j, Lanes (&x)[kCount]) const {
    for (int k = 0; k < kCount; ++k) x[k] = mul(c, load(exps + j + k * kLanes));
  }
};

// p (a + b log p); where p is 0 for q = -inf, log p is held finite.
IRL_INLINE Lanes weigh(Lanes p, Lanes log_p, Lanes a, Lanes b) {
  return mul(p, muladd(b, max_or_second(splat(kExpZero), log_p), a));
}

template <class Read>
struct ScaledEntropy {
  static constexpr Source kSource = Source::cache;
  static constexpr bool kScratch = true, kNumbers = true;
  const float* exps;
  Lanes c, max, log_sum, a, b;
  const Read& how;
  ScaledEntropy from(std::int64_t j) const { return {exps + j, c, max, log_sum, a, b, how}; }
  template <int kCount>
  __attribute__((always_inline)) void apply(std::int64_t j, Lanes (&x)[kCount]) const {
    how.read(x);
    for (int k = 0; k < kCount; ++k) {
      const Lanes p = mul(c, load(exps + j + k * kLanes));
      x[k] = weigh(p, sub(sub(x[k], max), log_sum), a, b);
    }
  }
};

template <class Read>
struct Direct {
  static constexpr Source kSource = Source::memory;
  static constexpr bool kScratch = false, kNumbers = false;
  Lanes max, log_sum, a, b;
  const Read& how;
  template <int kCount>
  __attribute__((always_inline)) void apply(std::int64_t, Lanes (&x)[kCount]) const {
    Lanes log_p[kCount], p[kCount];
    how.read(x);
    for (int k = 0; k < kCount; ++k) log_p[k] = sub(sub(x[k], max), log_sum);
    for (int k = 0; k < kCount; ++k) p[k] = exp_range(log_p[k]);
    exp_ranged(p);
    for (int k = 0; k < kCount; ++k)
      x[k] = zero_at_minus_inf(how.times_slope(weigh(p[k], log_p[k], a, b), x[k]), x[k]);
  }
};

struct Multiplied {
  static constexpr Source kSource = Source::memory;
  static constexpr bool kScratch = false, kNumbers = false;
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

template <class Row, class T>
IRL_INLINE void put_four(T* y, const Lanes (&x)[4]) {
  if (!Row::kNumbers) {
    store_two(y, x[0], x[1]);
    store_two(y + 2 * kLanes, x[2], x[3]);
    return;
  }
  for (int k = 0; k < 4; ++k) store_numbers(y + k * kLanes, x[k]);
}

template <class Row, class T>
IRL_INLINE void stream_four(T* y, const Lanes (&x)[4]) {
  if (!Row::kNumbers) {
    stream_two(y, x[0], x[1]);
    stream_two(y + 2 * kLanes, x[2], x[3]);
    return;
  }
  for (int k = 0; k < 4; ++k) stream_numbers(y + k * kLanes, x[k]);
}

// Elements from p to the next line of the cache.
template <class T>
IRL_INLINE std::int64_t to_line(const T* p) {
  constexpr std::intptr_t kLine = 64 / sizeof(T);
  return -(reinterpret_cast<std::intptr_t>(p) / std::intptr_t{sizeof(T)}) & (kLine - 1);
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
    std::int64_t head = to_line(y + j);
    if (head > end - j) head = end - j;
    for (const std::int64_t aligned = j + head; j < aligned;) j = some(aligned);
    for (; j + 4 * kLanes <= end; j += 4 * kLanes) {
      four(source, j, row, x);
      stream_four<Row>(y + j, x);
    }
    end_streams();
  }
  for (; j + 4 * kLanes <= end; j += 4 * kLanes) {
    four(source, j, row, x);
    put_four<Row>(y + j, x);
  }
  while (j < end) j = some(end);
}

// The same, where lanes may be in an order of their own: the groups that the scratch was written in
// are then the only ones that it can be read in, and need not begin where a line does.
template <class T, class Row>
void fill_grouped(T* y, const T* source, std::int64_t begin, std::int64_t end, const Row& row,
                  Stores stores) {
  fill(y, source, begin, end, row, stores);
}
#ifdef IRL_INTERLEAVED
template <class Row>
void fill_grouped(IRL_INTERLEAVED* y, const IRL_INTERLEAVED* source, std::int64_t begin,
                  std::int64_t end, const Row& row, Stores stores) {
  if (stores == Stores::cached || to_line(y + begin) == 0)
    return fill(y, source, begin, end, row, stores);
  alignas(64) IRL_INTERLEAVED packed[kBlock];
  for (std::int64_t j = begin; j < end;) {
    const std::int64_t n = end - j < kBlock ? end - j : kBlock;
    fill(packed, source + j, 0, n, row.from(j), Stores::cached);
    const std::int64_t head = to_line(y + j) < n ? to_line(y + j) : n;
    std::int64_t i = head;
    for (; i + kLanes <= n; i += kLanes) stream_copy(y + j + i, packed + i);
    __builtin_memcpy(y + j, packed, static_cast<std::size_t>(head) * sizeof *y);
    __builtin_memcpy(y + j + i, packed + i, static_cast<std::size_t>(n - i) * sizeof *y);
    j += n;
  }
  end_streams();
}
#endif
