// Page residency and huge pages: Linux only, elsewhere every output counts as fresh.
#include "pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace irl {

#if defined(__linux__)

constexpr std::int64_t kLarge = 8 << 20;     // smaller outputs stay in the caches
constexpr std::int64_t kHugePage = 2 << 20;  // on x86-64, and on arm64 with pages of 4 KiB
constexpr std::int64_t kSamples = 8;

// Whether the page that holds the address is in memory; an unknown page counts as absent.
static bool resident(std::uintptr_t address, std::uintptr_t page) {
  unsigned char state = 0;
  void* start = reinterpret_cast<void*>(address & ~(page - 1));
  return mincore(start, 1, &state) == 0 && (state & 1);
}

bool prepare_output(void* begin, std::int64_t bytes) {
  if (bytes < kLarge) return false;
  const auto first = reinterpret_cast<std::uintptr_t>(begin);
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  bool mapped = true;
  // Seven samples inside and one at the end: the first page may hold the allocator's header.
  for (std::int64_t k = 1; k <= kSamples && mapped; ++k)
    mapped = resident(first + static_cast<std::uintptr_t>(bytes / kSamples * k - 1), page);
  if (mapped) return true;
  const std::uintptr_t low = (first + kHugePage - 1) & ~std::uintptr_t{kHugePage - 1};
  const std::uintptr_t high =
      (first + static_cast<std::uintptr_t>(bytes)) & ~std::uintptr_t{kHugePage - 1};
  // Advice only: where it is refused, the pages are small and everything else is the same.
  if (low < high) (void)madvise(reinterpret_cast<void*>(low), high - low, MADV_HUGEPAGE);
  return false;
}

#else

bool prepare_output(void*, std::int64_t) { return false; }

#endif

}  // namespace irl
