// Chooses among the instruction sets when the program runs.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace irl {

namespace baseline {
extern const Isa isa;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Isa isa;
}
namespace avx512 {
extern const Isa isa;
}
static const Isa* const kBestFirst[] = {&avx512::isa, &avx2::isa, &baseline::isa};
#else
static const Isa* const kBestFirst[] = {&baseline::isa};
#endif

const std::vector<const Isa*>& isas() {
  static const std::vector<const Isa*> usable = [] {
    std::vector<const Isa*> found;
    for (const Isa* isa : kBestFirst)
      if (isa->supported()) found.push_back(isa);
    return found;
  }();
  return usable;
}

static const Isa& named(const std::string& name, const char* source) {
  std::string accepted;
  for (const Isa* isa : isas()) {
    if (name == isa->name) return *isa;
    accepted += accepted.empty() ? isa->name : std::string(", ") + isa->name;
  }
  throw std::invalid_argument(std::string(source) + " is '" + name + "', this CPU accepts " +
                              accepted);
}

const Isa& find_isa(const std::string& name) {
  if (!name.empty()) return named(name, "isa");
  static const Isa& chosen = [&]() -> const Isa& {
    const char* forced = std::getenv("IRL_OPS_ISA");
    return forced && *forced ? named(forced, "IRL_OPS_ISA") : *isas().front();
  }();
  return chosen;
}

}  // namespace irl
