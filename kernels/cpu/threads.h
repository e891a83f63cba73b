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

}  // namespace irl
