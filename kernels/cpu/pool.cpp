// Linux and macOS map and unmap whole blocks; elsewhere the allocator does.
#include "pool.h"

#include <cstddef>
#include <cstdlib>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#define IRL_MMAP 1
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace irl {

namespace {

constexpr std::int64_t kHugePage = 2 << 20;

#ifdef IRL_MMAP

// A multiple of huge pages that begins at one: what is mapped around it is unmapped at once.
void* map(std::int64_t bytes) {
  const auto wanted = static_cast<std::size_t>(bytes), page = std::size_t{kHugePage};
  void* start = mmap(nullptr, wanted + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
  if (start == MAP_FAILED) throw std::bad_alloc();
  char* const first = static_cast<char*>(start);
  const std::size_t before = (page - reinterpret_cast<std::uintptr_t>(first) % page) % page;
  if (before) munmap(first, before);
  munmap(first + before + wanted, page - before);
#ifdef MADV_HUGEPAGE
  // Advice only: where it is refused, the pages are small and everything else is the same.
  (void)madvise(first + before, wanted, MADV_HUGEPAGE);
#endif
  return first + before;
}

void unmap(const Block& block) noexcept { munmap(block.at, static_cast<std::size_t>(block.bytes)); }

#else

void* map(std::int64_t bytes) {
  return ::operator new(static_cast<std::size_t>(bytes), std::align_val_t{4096});
}
void unmap(const Block& block) noexcept { ::operator delete(block.at, std::align_val_t{4096}); }

#endif

}  // namespace

Pool& Pool::instance() {
  static Pool* const pool = [] {
    Pool* made = new Pool;
#ifdef IRL_MMAP
    pthread_atfork([] { instance().before_fork(); }, [] { instance().after_fork(false); },
                   [] { instance().after_fork(true); });
#endif
    return made;
  }();
  return *pool;
}

Block Pool::take(std::int64_t bytes) {
  if (bytes < 0 || bytes > INT64_MAX - 2 * kHugePage) throw std::bad_alloc();
  const std::int64_t wanted = (bytes / kHugePage + (bytes % kHugePage != 0)) * kHugePage;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::size_t best = blocks_.size();
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      const std::int64_t size = blocks_[i].bytes;
      if (size < wanted || size / 2 > wanted) continue;
      if (best == blocks_.size() || size <= blocks_[best].bytes) best = i;
    }
    if (best < blocks_.size()) {
      const Block found = blocks_[best];
      blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(best));
      idle_ -= found.bytes;
      return found;
    }
  }
  if (!wanted) return {};
  try {
    return {map(wanted), wanted};
  } catch (const std::bad_alloc&) {
    if (!release()) throw;
  }
  return {map(wanted), wanted};
}

void Pool::give_back(Block block) noexcept {
  if (!block.at) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (block.bytes <= limit_) {
    shrink(limit_ - block.bytes);
    try {
      blocks_.push_back(block);
      idle_ += block.bytes;
      return;
    } catch (const std::bad_alloc&) {
      // Not kept, then.
    }
  }
  unmap(block);
}

void Pool::shrink(std::int64_t most) noexcept {
  std::size_t gone = 0;
  for (; idle_ > most; ++gone) {
    idle_ -= blocks_[gone].bytes;
    unmap(blocks_[gone]);
  }
  blocks_.erase(blocks_.begin(), blocks_.begin() + static_cast<std::ptrdiff_t>(gone));
}

void Pool::set_limit(std::int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  limit_ = bytes;
  shrink(bytes);
}

std::int64_t Pool::limit() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return limit_;
}

std::int64_t Pool::idle() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return idle_;
}

std::int64_t Pool::release() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::int64_t bytes = idle_;
  shrink(0);
  return bytes;
}

void Pool::after_fork(bool child) noexcept {
  if (child) shrink(0);
  mutex_.unlock();
}

}  // namespace irl
