// Splits a number of rows over threads.
#pragma once
#include <cstdint>
#include <functional>

namespace irl {

// Calls work(begin, end) on contiguous ranges that cover [0, rows): on at most `threads` threads,
// the calling one among them, and on no more than give each a worthwhile part of `elements`.
// The first exception of a range is thrown again here, after every range has ended.
void over_rows(std::int64_t rows, std::int64_t elements, std::int64_t threads,
               const std::function<void(std::int64_t, std::int64_t)>& work);

// The entry point of an OpenMP runtime, as gcc's compiled code calls it: runs body(data) on a team.
using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// From now on the threads are those of that runtime. A framework's own threads spin for a while
// after its last loop, and threads beside them would have to share their cores.
void use_openmp(GompParallel parallel);

}  // namespace irl
