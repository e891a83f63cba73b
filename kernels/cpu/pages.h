// What the operating system knows about the memory of an output.
#pragma once
#include <cstdint>

namespace irl {

// Makes a large output ready to be written once from end to end, and says whether its pages are in
// memory already.
//
// A fresh allocation has no pages: each first touch is a fault in which the kernel clears a page,
// and with small pages the faults cost several times what the writing does. So huge pages are
// asked for; the cleared lines are then still in a cache when the stores reach them.
// Returns false for small or fresh outputs, and where the system cannot tell.
bool prepare_output(void* begin, std::int64_t bytes);

}  // namespace irl
