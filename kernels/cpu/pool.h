// Large blocks of memory that stay mapped between uses.
//
// A fresh gradient is the largest allocation of a step, and the kernel clears each of its pages at
// the first touch: that takes longer than computing it. The pool keeps blocks that were given back,
// up to a limit of idle bytes, and hands them out again with whatever they held.
#pragma once
#include <cstdint>
#include <mutex>
#include <vector>

namespace irl {

struct Block {
  void* at = nullptr;
  std::int64_t bytes = 0;
};

// Every function may be called from any thread. A block outlives the pool's interest in it: it may
// come back at any time, and is unmapped then if there is no room.
class Pool {
 public:
  // The one of this process. It is never destroyed: a block may come back after the end of main.
  static Pool& instance();

  // At least `bytes` bytes, aligned to a page at least; throws std::bad_alloc. An idle block is
  // taken where it is large enough and at most twice as large.
  Block take(std::int64_t bytes);
  void give_back(Block block) noexcept;

  // The idle bytes that are kept at most; 0 keeps none. Idle blocks above it are unmapped now, and
  // later those that have been idle for longest.
  void set_limit(std::int64_t bytes);
  std::int64_t limit() const;
  std::int64_t idle() const;

  // Unmaps all idle blocks; how many bytes they had.
  std::int64_t release() noexcept;

  // A child of fork lets go of the idle blocks, which its parent goes on using.
  void before_fork() { mutex_.lock(); }
  void after_fork(bool child) noexcept;

 private:
  void shrink(std::int64_t most) noexcept;  // under the lock

  mutable std::mutex mutex_;
  std::vector<Block> blocks_;  // idle; the one given back last is at the end
  std::int64_t idle_ = 0, limit_ = 0;
};

}  // namespace irl
