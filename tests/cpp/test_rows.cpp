// The row kernels in exactly sized heap blocks, for the sanitizers, and exp against double.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "checks.h"
#include "pool.h"
#include "threads.h"

int failures = 0;

void expect(bool holds, const char* what, const char* where, double x) {
  if (holds) return;
  std::printf("FAILED %s: %s at %g\n", where, what, x);
  ++failures;
}

namespace {

float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Distance in units of the last place of the float nearest to the exact value.
double ulps(float got, double exact) {
  const float nearest = static_cast<float>(exact);
  const double step = nearest == 0 ? std::numeric_limits<float>::denorm_min()
                                   : std::nextafter(nearest, HUGE_VALF) - nearest;
  return std::fabs(static_cast<double>(got) - exact) / step;
}

// p_j (1 + 0 log p_j) with max and logsum 0 is exp(q_j).
void check_exp(const irl::Isa& isa) {
  const auto& loops = isa.loops[static_cast<int>(irl::Dtype::float32)];
  std::vector<float> x;
  // Positive and negative numbers from 2^-40 to 128: every 211th float of each sign.
  for (const std::uint32_t sign : {0u, 0x80000000u})
    for (std::uint32_t bits = 0x2b800000u; bits < 0x43000000u; bits += 211)
      x.push_back(float_of(bits | sign));
  std::vector<float> y(x.size());
  loops.write(x.data(), y.data(), static_cast<std::int64_t>(x.size()), 0, 0, 1, 0,
              irl::Stores::cached, {});
  double worst = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp(static_cast<double>(x[i]));
    if (exact >= 3.4028235677973366e38) {  // halfway from the largest float to the next
      expect(std::isinf(y[i]) || exact < 3.40283e38, "exp is not infinite", isa.name, x[i]);
      continue;
    }
    const double error = ulps(y[i], exact);
    if (error > worst) worst = error;
    expect(error <= 2, "exp is off by more than 2 ulp", isa.name, x[i]);
  }
  std::printf("%s: exp within %.2f ulp at %zu points\n", isa.name, worst, x.size());

  const float inf = std::numeric_limits<float>::infinity();
  const float special[] = {-inf, std::nanf(""), 0.0f, -0.0f, -1e-45f, -3e38f, 3e38f};
  const float wanted[] = {0.0f, std::nanf(""), 1.0f, 1.0f, 1.0f, 0.0f, inf};
  for (int i = 0; i < 7; ++i) {
    float out;
    loops.write(&special[i], &out, 1, 0, 0, 1, 0, irl::Stores::cached, {});
    const bool same = std::isnan(wanted[i]) ? std::isnan(out) : out == wanted[i];
    expect(same, "exp of a special value", isa.name, special[i]);
  }
}

void check_bounds(const irl::Isa& isa, irl::Dtype dtype, std::int64_t vocab, std::int64_t start,
                  std::int64_t gap) {
  Block q(dtype, vocab, start, gap), y(dtype, vocab, gap, start);
  const irl::Rows rows = {dtype, vocab, q.layout};
  for (std::int64_t i = 0; i < 6; ++i)
    for (std::int64_t j = 0; j < vocab; ++j)
      irl::write_element(dtype, q.data() + (q.layout.offset(i) + j) * q.size,
                         static_cast<float>(std::sin(static_cast<double>(i * vocab + j)) * 5));
  const std::vector<std::int64_t> labels = {0,
                                            vocab - 1,
                                            vocab,
                                            -1,
                                            std::numeric_limits<std::int64_t>::min(),
                                            std::numeric_limits<std::int64_t>::max()};
  const std::vector<float> zero_and_one = {0, 1, 0, 1, 0, 1}, one(6, 1.0f);
  std::vector<float> row_max(6), logsum(6), label_logit(6), entropy(6);
  irl::row_stats(isa, 2, rows, q.data(), labels.data(), row_max.data(), logsum.data(),
                 label_logit.data(), entropy.data());
  irl::row_grad(isa, 2, rows, q.data(), labels.data(), row_max.data(), logsum.data(),
                zero_and_one.data(), one.data(), one.data(), y.data(), y.layout);
  for (const float* weight : {static_cast<const float*>(nullptr), zero_and_one.data()})
    irl::row_stats_grad(isa, 2, rows, q.data(), one.data(), one.data(), weight, row_max.data(),
                        logsum.data(), entropy.data(), y.data(), y.layout);
  for (const irl::Readout readout : {irl::Readout{0.5f, 0}, irl::Readout{2, 3}}) {
    irl::row_stats(isa, 2, rows, q.data(), labels.data(), row_max.data(), logsum.data(),
                   label_logit.data(), entropy.data(), readout);
    irl::row_grad(isa, 2, rows, q.data(), labels.data(), row_max.data(), logsum.data(),
                  zero_and_one.data(), one.data(), one.data(), y.data(), y.layout, readout);
    for (const float* weight : {static_cast<const float*>(nullptr), zero_and_one.data()})
      irl::row_stats_grad(isa, 2, rows, q.data(), one.data(), one.data(), weight, row_max.data(),
                          logsum.data(), entropy.data(), y.data(), y.layout, readout);
    irl::label_logit(rows, q.data(), labels.data(), label_logit.data(), readout, &isa);
    irl::set_label({dtype, vocab, y.layout}, y.data(), labels.data(), one.data(),
                   label_logit.data(), readout);
  }
  irl::scale(isa, 2, rows, q.data(), 0.5f);

  // The loops alone, streamed: short rows never are by themselves.
  const auto& loops = isa.loops[static_cast<int>(dtype)];
  for (std::int64_t i = 0; i < 6; ++i) {
    loops.write(q.data() + q.layout.offset(i) * q.size, y.data() + y.layout.offset(i) * y.size,
                vocab, 0, 0, 1, 1, irl::Stores::streamed, {});
    std::vector<float> exps(static_cast<std::size_t>(vocab + irl::kLanes));
    std::vector<irl::Segment> segments(static_cast<std::size_t>(vocab / irl::kBlock + 2));
    const char* x = q.data() + q.layout.offset(i) * q.size;
    const irl::RowSums sums = loops.scan(x, vocab, true, true, exps.data(), segments.data(), {});
    std::vector<char> cached(static_cast<std::size_t>(vocab * y.size));
    for (const float b : {0.0f, 0.5f}) {
      char* const out = y.data() + y.layout.offset(i) * y.size;
      loops.write_scanned(x, out, vocab, exps.data(), segments.data(), sums, std::log(sums.sum), 1,
                          b, irl::Stores::streamed, {});
      loops.write_scanned(x, cached.data(), vocab, exps.data(), segments.data(), sums,
                          std::log(sums.sum), 1, b, irl::Stores::cached, {});
      expect(std::memcmp(out, cached.data(), cached.size()) == 0, "streamed and cached differ",
             isa.name, static_cast<double>(vocab));
    }
    loops.clear(y.data() + y.layout.offset(i) * y.size, vocab, irl::Stores::streamed);
  }
  for (std::int64_t i = 0; i < 6; ++i)
    for (std::int64_t j = 0; j < vocab; ++j)
      expect(irl::read_element(dtype, y.data() + (y.layout.offset(i) + j) * y.size) == 0,
             "clear left an element", isa.name, static_cast<double>(j));
}

// Pools as a caller may bring them: each row's work is done once, before over_rows returns.
void check_pools() {
  using Task = irl::Team::Task;
  std::vector<Task> late;
  std::vector<std::thread> threads;
  const std::pair<const char*, std::function<void(Task)>> pools[] = {
      {"at once", [](const Task& task) { task(); }},
      {"too late", [&](Task task) { late.push_back(std::move(task)); }},
      {"threads", [&](Task task) { threads.emplace_back(std::move(task)); }},
      {"full", [](const Task&) { throw std::bad_alloc(); }},
  };
  for (const auto& [name, start] : pools) {
    std::vector<int> times(1000);
    irl::over_rows(1000, std::int64_t{1} << 30, irl::Team(7, start),
                   [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t i = begin; i < end; ++i)
                       ++times[static_cast<std::size_t>(i)];
                   });
    for (const int n : times) expect(n == 1, "rows were worked on so often", name, n);
    bool thrown = false;
    try {
      irl::over_rows(1000, std::int64_t{1} << 30, irl::Team(7, start),
                     [](std::int64_t begin, std::int64_t end) {
                       if (begin <= 500 && 500 < end) throw std::runtime_error("row 500");
                     });
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    expect(thrown, "the exception of a range was lost", name, 500);
  }
  for (const Task& task : late) task();  // finds nothing left to do, and nothing it may touch
  for (std::thread& thread : threads) thread.join();
}

// Small batches keep to one thread: those that spin are cheaper to ask than those that are woken.
void check_grain() {
  static unsigned asked;
  const auto threads = [](std::int64_t rows, std::int64_t columns, const irl::Team& team) {
    asked = 1;
    std::int64_t done = 0;
    irl::over_rows(rows, columns, team,
                   [&](std::int64_t begin, std::int64_t end) { done += end - begin; });
    expect(done == rows, "rows were left out", "grain", static_cast<double>(done));
    return asked;
  };
  irl::use_openmp([](void (*body)(void*), void* data, unsigned count, unsigned) {
    asked = count;
    body(data);
  });
  const irl::Team pool(8, [](const irl::Team::Task&) { ++asked; });
  expect(threads(512, 64, 2) == 2, "threads of OpenMP", "512 rows of 64", asked);
  expect(threads(512, 64, 8) == 5, "threads of OpenMP", "512 rows of 64, 8 cores", asked);
  expect(threads(64, 64, 2) == 1, "threads of OpenMP", "64 rows of 64", asked);
  expect(threads(1, 1 << 20, 2) == 1, "threads of OpenMP", "one row", asked);
  expect(threads(512, 64, pool) == 1, "threads of a pool", "512 rows of 64", asked);
  expect(threads(2048, 64, pool) == 5, "threads of a pool", "2048 rows of 64", asked);
  irl::use_openmp(nullptr);
}

// Blocks are whole and aligned, come back while others take some, and never belong to two.
void check_pool() {
  irl::Pool& pool = irl::Pool::instance();
  pool.set_limit(20 << 20);
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (std::size_t t = 0; t < wrong.size(); ++t)
    threads.emplace_back([&, t] {
      for (int step = 0; step < 50; ++step) {
        const irl::Block block = pool.take((std::int64_t{1} << 21) * (1 + step % 3) - step);
        char* const bytes = static_cast<char*>(block.at);
        for (std::int64_t i = 0; i < block.bytes; i += 4096) bytes[i] = static_cast<char>(t);
        bytes[block.bytes - 1] = static_cast<char>(t);
        for (std::int64_t i = 0; i < block.bytes; i += 4096)
          wrong[t] += bytes[i] != static_cast<char>(t);
        wrong[t] += reinterpret_cast<std::uintptr_t>(bytes) % 4096 != 0;
        pool.give_back(block);
        if (step % 20 == 19) pool.release();
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (const int n : wrong) expect(n == 0, "a block belonged to two", "pool", n);
  expect(pool.idle() <= pool.limit(), "more is idle than may be", "pool", 0);
  pool.give_back(pool.take(0));
  pool.set_limit(0);
  expect(pool.idle() == 0, "blocks are idle without a limit", "pool", 0);
  bool thrown = false;
  try {
    pool.take(std::numeric_limits<std::int64_t>::max());
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  expect(thrown, "more than there is was given", "pool", 0);
}

}  // namespace

int main() {
  check_pool();
  check_pools();
  check_grain();
  for (const irl::Isa* isa : irl::isas()) {
    check_exp(*isa);
    for (const auto dtype : {irl::Dtype::float32, irl::Dtype::bfloat16, irl::Dtype::float16})
      for (const std::int64_t vocab : {1, 2, 15, 16, 17, 33, 63, 64, 65, 127, 2047, 2048, 4129})
        for (const std::int64_t start : {0, 1, 31}) check_bounds(*isa, dtype, vocab, start, 3);
    check_measures(*isa);
  }
  // Enough rows for every thread to have some.
  const std::int64_t vocab = 5000;
  const irl::Rows rows = {irl::Dtype::float32, vocab, {{200}, {vocab}}};
  std::vector<float> q(200 * vocab, 0.5f), vector(200, 1.0f), row_max(200), logsum(200);
  irl::row_stats_grad(irl::find_isa(""), 7, rows, q.data(), vector.data(), vector.data(), nullptr,
                      row_max.data(), logsum.data(), nullptr, q.data(), rows.layout);
  for (const float x : logsum)
    expect(std::fabs(x - std::log(5000.0f)) < 1e-6f, "logsum of a constant row", "threads", x);
  return failures != 0;
}
