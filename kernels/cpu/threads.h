// Splits a number of rows over threads.
#pragma once
#include <cstdint>
#include <functional>
#include <utility>

namespace irl {

// The threads of a call: at most `count`, the calling one among them. The others are this library's
// own, or those of a pool that the caller brings: start(task) has the task run on it, sooner or
// later, on any thread, be it within start itself.
struct Team {
  using Task = std::function<void()>;

  Team(std::int64_t threads) : count(threads) {}
  Team(std::int64_t threads, std::function<void(Task)> pool)
      : count(threads), start(std::move(pool)) {}

  std::int64_t count;
  std::function<void(Task)> start;
};

// Calls work(begin, end) on contiguous ranges that cover [0, rows): on at most the team's threads,
// and on no more than give each a worthwhile part of rows of so many `columns`. The first exception
// of a range is thrown again here, after every range has ended. Never waits for a task that has not
// begun: a pool may be running this call on its only thread.
void over_rows(std::int64_t rows, std::int64_t columns, const Team& team,
               const std::function<void(std::int64_t, std::int64_t)>& work);

// The entry point of an OpenMP runtime, as gcc's compiled code calls it: runs body(data) on a team.
using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// From now on the library's own threads are those of that runtime. A framework's own threads spin
// for a while after its last loop, and threads beside them would have to share their cores.
void use_openmp(GompParallel parallel);

}  // namespace irl
