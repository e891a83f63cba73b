// Sixteen float lanes in the compilers' vector extension: four registers of four lanes, which is
// SSE2 on x86-64 and NEON on arm64. Included inside the namespace of isa_baseline.cpp.

typedef float F4 __attribute__((vector_size(16)));
typedef std::int32_t I4 __attribute__((vector_size(16)));
typedef std::uint32_t U4 __attribute__((vector_size(16)));
typedef std::uint16_t H4 __attribute__((vector_size(8)));

struct Lanes {
  F4 v[4];
};

// Lanes built register by register: EXPRESSION in terms of the register number k.
#define IRL_EACH(EXPRESSION)                           \
  Lanes out;                                           \
  for (int k = 0; k < 4; ++k) out.v[k] = (EXPRESSION); \
  return out

IRL_INLINE F4 four(float x) { return F4{x, x, x, x}; }
IRL_INLINE U4 four_bits(std::uint32_t x) { return U4{x, x, x, x}; }
IRL_INLINE U4 bits_of(F4 x) { return reinterpret_cast<U4>(x); }
IRL_INLINE F4 float_of(U4 x) { return reinterpret_cast<F4>(x); }
// a where the mask (a comparison's result) is set, else b.
IRL_INLINE U4 choose(I4 mask, U4 a, U4 b) {
  const U4 m = reinterpret_cast<U4>(mask);
  return (a & m) | (b & ~m);
}
IRL_INLINE F4 choose(I4 mask, F4 a, F4 b) { return float_of(choose(mask, bits_of(a), bits_of(b))); }

IRL_INLINE Lanes splat(float x) { IRL_EACH(four(x)); }
IRL_INLINE Lanes add(Lanes a, Lanes b) { IRL_EACH(a.v[k] + b.v[k]); }
IRL_INLINE Lanes sub(Lanes a, Lanes b) { IRL_EACH(a.v[k] - b.v[k]); }
IRL_INLINE Lanes mul(Lanes a, Lanes b) { IRL_EACH(a.v[k] * b.v[k]); }
IRL_INLINE Lanes muladd(Lanes a, Lanes b, Lanes c) { IRL_EACH(a.v[k] * b.v[k] + c.v[k]); }

IRL_INLINE Lanes div(Lanes a, Lanes b) { IRL_EACH(a.v[k] / b.v[k]); }
// a itself: keeps the compiler from joining the product that a is with a later sum.
IRL_INLINE Lanes rounded(Lanes a) {
#if defined(__SSE2__)
  for (int k = 0; k < 4; ++k) __asm__("" : "+x"(a.v[k]));
#elif defined(__aarch64__)
  for (int k = 0; k < 4; ++k) __asm__("" : "+w"(a.v[k]));
#else
  for (int k = 0; k < 4; ++k) __asm__("" : "+m"(a.v[k]));
#endif
  return a;
}

// b where either is NaN.
#if defined(__SSE2__)
IRL_INLINE Lanes max_or_second(Lanes a, Lanes b) { IRL_EACH((F4)_mm_max_ps(a.v[k], b.v[k])); }
IRL_INLINE Lanes min_or_second(Lanes a, Lanes b) { IRL_EACH((F4)_mm_min_ps(a.v[k], b.v[k])); }
#else
IRL_INLINE Lanes max_or_second(Lanes a, Lanes b) {
  IRL_EACH(choose(a.v[k] > b.v[k], a.v[k], b.v[k]));
}
IRL_INLINE Lanes min_or_second(Lanes a, Lanes b) {
  IRL_EACH(choose(a.v[k] < b.v[k], a.v[k], b.v[k]));
}
#endif

// Of lanes without a NaN.
IRL_INLINE float largest(Lanes a) {
  Lanes m = max_or_second(a, {{a.v[2], a.v[3], a.v[0], a.v[1]}});
  m = max_or_second(m, {{m.v[1], m.v[0], m.v[1], m.v[0]}});
  const F4 x = m.v[0];
  const float low = x[0] > x[1] ? x[0] : x[1], high = x[2] > x[3] ? x[2] : x[3];
  return low > high ? low : high;
}

// The sum in double: one half of the lanes is added to the other, until one lane is left.
IRL_INLINE double sum_of(Lanes a) {
  double sums[8];
  for (int l = 0; l < 8; ++l)
    sums[l] = static_cast<double>(a.v[l / 4][l % 4]) + static_cast<double>(a.v[2 + l / 4][l % 4]);
  for (int l = 0; l < 4; ++l) sums[l] += sums[l + 4];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// a, but 0 where x is -inf.
IRL_INLINE Lanes zero_at_minus_inf(Lanes a, Lanes x) {
  IRL_EACH(choose(x.v[k] == four(-__builtin_inff()), four(0.0f), a.v[k]));
}

// n = round(x log2 e), found by adding 1.5 * 2^23, and the scaling by 2^n in two factors: the first
// product is exact, so the result is rounded once even where it is subnormal.
struct Power {
  F4 shifted[4];
};
IRL_INLINE Power power_of_two(Lanes x) {
  Power p;
  for (int k = 0; k < 4; ++k)
    p.shifted[k] = x.v[k] * four(1.44269504088896341f) + four(12582912.0f);
  return p;
}
IRL_INLINE Lanes as_float(Power p) { IRL_EACH(p.shifted[k] - four(12582912.0f)); }
IRL_INLINE F4 scale_quarter(F4 a, F4 shifted) {
  const U4 n = bits_of(shifted) - bits_of(four(12582912.0f));
  const U4 first = reinterpret_cast<U4>(reinterpret_cast<I4>(n) >> 1), second = n - first;
  return a * float_of((first + 127u) << 23) * float_of((second + 127u) << 23);
}
IRL_INLINE Lanes scale(Lanes a, Power p) { IRL_EACH(scale_quarter(a.v[k], p.shifted[k])); }

// The float whose exponent is the integer in the lowest bits of t, a sum with 1.5 * 2^23.
IRL_INLINE Lanes power(Lanes t) { IRL_EACH(float_of(bits_of(t.v[k]) << 23)); }

IRL_INLINE F4 load_four(const float* p) {
  F4 x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
IRL_INLINE U4 load_bits(const void* p) {
  H4 x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, U4);
}
IRL_INLINE F4 load_four(const BFloat16* p) { return float_of(load_bits(p) << 16); }
// The exponent is rebased by a product with 2^112, which also normalises subnormals.
IRL_INLINE F4 load_four(const Float16* p) {
  const U4 h = load_bits(p), exponent = h & 0x7c00u;
  const F4 finite = float_of((h & 0x7fffu) << 13) * four(0x1p112f);
  const U4 special = bits_of(finite) | 0x7f800000u;
  const U4 magnitude = choose(exponent == 0x7c00u, special, bits_of(finite));
  return float_of(magnitude | ((h & 0x8000u) << 16));
}
template <class T>
IRL_INLINE Lanes load(const T* p) {
  IRL_EACH(load_four(p + 4 * k));
}

// Round to nearest even; a NaN stays a (quiet) NaN.
IRL_INLINE void store_bits(void* p, U4 bits) {
  const H4 x = __builtin_convertvector(bits, H4);
  __builtin_memcpy(p, &x, sizeof x);
}
IRL_INLINE void store_four(float* p, F4 a) { __builtin_memcpy(p, &a, sizeof a); }
IRL_INLINE void store_four(BFloat16* p, F4 a) {
  const U4 bits = bits_of(a), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  store_bits(p, choose(a == a, rounded, bits | 0x400000u) >> 16);
}
// Adding 0.5 lines up the bits of a subnormal half, and the addition itself rounds it.
IRL_INLINE void store_four(Float16* p, F4 a) {
  const U4 sign = bits_of(a) & 0x80000000u, m = bits_of(a) ^ sign;
  const U4 small = bits_of(float_of(m) + four(0.5f)) - bits_of(four(0.5f));
  const U4 normal = (m - (112u << 23) + 0xfffu + ((m >> 13) & 1u)) >> 13;
  const I4 tiny = float_of(m) < four(0x1p-14f), large = float_of(m) >= four(65520.0f);
  U4 h = choose(tiny, small, normal);
  h = choose(large, four_bits(0x7c00u), h);
  h = choose(a == a, h, four_bits(0x7e00u));
  store_bits(p, h | (sign >> 16));
}
template <class T>
IRL_INLINE void store(T* p, Lanes a) {
  for (int k = 0; k < 4; ++k) store_four(p + 4 * k, a.v[k]);
}

// Past the caches where the machine can; p is aligned to the sixteen elements written.
#if defined(__SSE2__)
IRL_INLINE void stream(float* p, Lanes a) {
  for (int k = 0; k < 4; ++k) _mm_stream_ps(p + 4 * k, a.v[k]);
}
template <class Half>
IRL_INLINE void stream(Half* p, Lanes a) {
  alignas(16) Half packed[16];
  store(packed, a);
  const __m128i* from = reinterpret_cast<const __m128i*>(packed);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_load_si128(from));
  _mm_stream_si128(reinterpret_cast<__m128i*>(p) + 1, _mm_load_si128(from + 1));
}
IRL_INLINE void end_streams() { _mm_sfence(); }
#else
template <class T>
IRL_INLINE void stream(T* p, Lanes a) {
  store(p, a);
}
IRL_INLINE void end_streams() {}
#endif
#undef IRL_EACH

#include "exp_polynomial.h"
