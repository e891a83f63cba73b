// The row loops for any CPU: SSE2 on x86-64, NEON on arm64.
#include "isa.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define IRL_ISA baseline
#define IRL_SUPPORTED true
#define IRL_LANES "lanes_baseline.h"
#include "loops.h"
