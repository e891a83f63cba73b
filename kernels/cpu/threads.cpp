// Threads live for one call only: nothing survives to be broken by fork, or to be shut down.
#include "threads.h"

#include <algorithm>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace irl {

// Below this a thread costs more than it brings: tens of microseconds to start, as much as this
// many elements take.
constexpr std::int64_t kWorthwhile = 1 << 17;

void over_rows(std::int64_t rows, std::int64_t elements, std::int64_t threads,
               const std::function<void(std::int64_t, std::int64_t)>& work) {
  const std::int64_t parts = std::min({threads, rows, elements / kWorthwhile});
  if (parts <= 1) {
    if (rows > 0) work(0, rows);
    return;
  }
  // rows * part could overflow: the first `longer` parts have one row more.
  const std::int64_t length = rows / parts, longer = rows % parts;
  const auto begin = [=](std::int64_t part) { return part * length + std::min(part, longer); };

  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(parts));
  const auto run = [&](std::int64_t part) {
    try {
      work(begin(part), begin(part + 1));
    } catch (...) {
      failures[static_cast<std::size_t>(part)] = std::current_exception();
    }
  };

  std::vector<std::thread> others;
  others.reserve(static_cast<std::size_t>(parts - 1));
  std::int64_t started = 1;
  try {
    for (; started < parts; ++started) others.emplace_back(run, started);
  } catch (const std::system_error&) {
    // No more threads to be had: the caller does the parts that are left.
  }
  run(0);
  for (std::int64_t part = started; part < parts; ++part) run(part);
  for (std::thread& other : others) other.join();
  for (const std::exception_ptr& failure : failures)
    if (failure) std::rethrow_exception(failure);
}

}  // namespace irl
