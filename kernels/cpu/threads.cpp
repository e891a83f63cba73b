// Borrows the threads of the caller's pool, or those of an OpenMP runtime where one was named. Else
// threads live for one call only: nothing survives to be broken by fork, or to be shut down.
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace irl {

namespace {

// What a row takes beside its elements, in elements: its logarithm, the sums over lanes, the calls.
constexpr std::int64_t kPerRow = 256;

// Fewer elements than this are not worth another thread. One of an OpenMP runtime takes up its work
// within a microsecond or two while it spins, some ten where it sleeps; starting a thread, or
// waking one of a pool, takes tens. An element takes about a third of a nanosecond.
constexpr std::int64_t kToBorrow = 1 << 15, kToStart = 1 << 17;

// Ranges a thread: one that is held up leaves its share to the others.
constexpr std::int64_t kRanges = 4;

std::atomic<GompParallel> openmp{nullptr};

// What every thread of a team does: takes the next range until none is left, so that a team smaller
// than was asked for still does all the work.
class Ranges {
 public:
  Ranges(std::int64_t rows, std::int64_t count,
         const std::function<void(std::int64_t, std::int64_t)>& work)
      : length_(rows / count), longer_(rows % count), work_(work), failures_(size(count)) {}

  // Where no range is left, neither the work nor what it refers to need exist any more.
  void run() {
    for (std::int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count();) {
      try {
        work_(begin(i), begin(i + 1));
      } catch (...) {
        failures_[size(i)] = std::current_exception();
      }
      if (ended_.fetch_add(1, std::memory_order_acq_rel) + 1 < count()) continue;
      const std::lock_guard<std::mutex> lock(mutex_);
      all_ended_.notify_all();
    }
  }

  // Until the ranges that other threads have taken are done.
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_ended_.wait(lock, [&] { return ended_.load(std::memory_order_acquire) == count(); });
  }

  void rethrow() const {
    for (const std::exception_ptr& failure : failures_)
      if (failure) std::rethrow_exception(failure);
  }

 private:
  static std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

  std::int64_t count() const { return static_cast<std::int64_t>(failures_.size()); }

  // rows * i could overflow: the first `longer` ranges have one row more.
  std::int64_t begin(std::int64_t i) const { return i * length_ + std::min(i, longer_); }

  const std::int64_t length_, longer_;
  const std::function<void(std::int64_t, std::int64_t)>& work_;
  std::vector<std::exception_ptr> failures_;
  std::atomic<std::int64_t> next_{0}, ended_{0};
  std::mutex mutex_;
  std::condition_variable all_ended_;
};

void run_on_own_threads(Ranges& ranges, std::int64_t threads) {
  std::vector<std::thread> others;
  others.reserve(static_cast<std::size_t>(threads - 1));
  try {
    while (static_cast<std::int64_t>(others.size()) < threads - 1)
      others.emplace_back([&] { ranges.run(); });
  } catch (const std::system_error&) {
    // No more threads to be had: those that run take the ranges that are left.
  }
  ranges.run();
  for (std::thread& other : others) other.join();
}

// A task may begin after this has returned: it finds no range left, and shares the object that
// tells it so.
void run_on_pool(const std::shared_ptr<Ranges>& ranges, const Team& team, std::int64_t threads) {
  try {
    for (std::int64_t i = 1; i < threads; ++i) team.start([ranges] { ranges->run(); });
  } catch (const std::bad_alloc&) {
    // Those that were started take the ranges that are left.
  }
  ranges->run();
  ranges->wait();
}

}  // namespace

void use_openmp(GompParallel parallel) { openmp = parallel; }

void over_rows(std::int64_t rows, std::int64_t columns, const Team& team,
               const std::function<void(std::int64_t, std::int64_t)>& work) {
  const GompParallel borrow = team.start ? nullptr : openmp.load();
  const std::int64_t part = borrow ? kToBorrow : kToStart;
  const std::int64_t threads = std::min({team.count, rows, rows * (columns + kPerRow) / part});
  if (threads <= 1) {
    if (rows > 0) work(0, rows);
    return;
  }
  const auto ranges = std::make_shared<Ranges>(rows, std::min(rows, threads * kRanges), work);
  if (team.start)
    run_on_pool(ranges, team, threads);
  else if (borrow)
    borrow([](void* data) { static_cast<Ranges*>(data)->run(); }, ranges.get(),
           static_cast<unsigned>(threads), 0);
  else
    run_on_own_threads(*ranges, threads);
  ranges->rethrow();
}

}  // namespace irl
