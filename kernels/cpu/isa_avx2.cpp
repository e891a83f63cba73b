// The row loops for AVX2, FMA and F16C. The target region opens after the standard headers: an
// inline function of theirs compiled for AVX2 could be the copy that the linker keeps for all.
#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define IRL_ISA avx2
#define IRL_SUPPORTED                                                 \
  (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && \
   __builtin_cpu_supports("f16c"))
#define IRL_LANES "lanes_avx2.h"
#include "loops.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
