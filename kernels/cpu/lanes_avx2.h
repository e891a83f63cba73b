// Sixteen float lanes on AVX2, FMA and F16C: two registers. Included inside the namespace and the
// target region of isa_avx2.cpp; every function is forced inline and touches no other row.

struct Lanes {
  __m256 v[2];
};

IRL_INLINE Lanes splat(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
IRL_INLINE Lanes add(Lanes a, Lanes b) {
  return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}};
}
IRL_INLINE Lanes sub(Lanes a, Lanes b) {
  return {{_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1])}};
}
IRL_INLINE Lanes mul(Lanes a, Lanes b) {
  return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}};
}
IRL_INLINE Lanes muladd(Lanes a, Lanes b, Lanes c) {
  return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
}

IRL_INLINE Lanes div(Lanes a, Lanes b) {
  return {{_mm256_div_ps(a.v[0], b.v[0]), _mm256_div_ps(a.v[1], b.v[1])}};
}
// a itself: keeps the compiler from joining the product that a is with a later sum.
IRL_INLINE Lanes rounded(Lanes a) {
  __asm__("" : "+x"(a.v[0]), "+x"(a.v[1]));
  return a;
}

// b where either is NaN, as vmaxps and vminps have it.
IRL_INLINE Lanes max_or_second(Lanes a, Lanes b) {
  return {{_mm256_max_ps(a.v[0], b.v[0]), _mm256_max_ps(a.v[1], b.v[1])}};
}
IRL_INLINE Lanes min_or_second(Lanes a, Lanes b) {
  return {{_mm256_min_ps(a.v[0], b.v[0]), _mm256_min_ps(a.v[1], b.v[1])}};
}
// Of lanes without a NaN.
IRL_INLINE float largest(Lanes a) {
  const __m256 eight = _mm256_max_ps(a.v[0], a.v[1]);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// The sum in double: one half of the lanes is added to the other, until one lane is left.
IRL_INLINE double sum_of(Lanes a) {
  const __m256d first = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a.v[0])),
                                      _mm256_cvtps_pd(_mm256_castps256_ps128(a.v[1])));
  const __m256d second = _mm256_add_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(a.v[0], 1)),
                                       _mm256_cvtps_pd(_mm256_extractf128_ps(a.v[1], 1)));
  const __m256d four = _mm256_add_pd(first, second);
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

// a, but 0 where x is -inf.
IRL_INLINE Lanes zero_at_minus_inf(Lanes a, Lanes x) {
  const __m256 low = _mm256_set1_ps(-__builtin_inff());
  return {{_mm256_and_ps(a.v[0], _mm256_cmp_ps(x.v[0], low, _CMP_NEQ_UQ)),
           _mm256_and_ps(a.v[1], _mm256_cmp_ps(x.v[1], low, _CMP_NEQ_UQ))}};
}

// n = round(x log2 e) and the scaling by 2^n in two factors: the first product is exact, so the
// result is rounded once even where it is subnormal.
struct Power {
  __m256 n[2];
};
IRL_INLINE __m256 round_log2(__m256 x) {
  const __m256 t = _mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f));
  return _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
IRL_INLINE Power power_of_two(Lanes x) { return {{round_log2(x.v[0]), round_log2(x.v[1])}}; }
IRL_INLINE Lanes as_float(Power p) { return {{p.n[0], p.n[1]}}; }
IRL_INLINE __m256 scale_half(__m256 a, __m256 n) {
  const __m256i whole = _mm256_cvtps_epi32(n), one = _mm256_set1_epi32(127);
  const __m256i first = _mm256_srai_epi32(whole, 1), second = _mm256_sub_epi32(whole, first);
  const __m256i f = _mm256_slli_epi32(_mm256_add_epi32(first, one), 23);
  const __m256i s = _mm256_slli_epi32(_mm256_add_epi32(second, one), 23);
  return _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(f)), _mm256_castsi256_ps(s));
}
IRL_INLINE Lanes scale(Lanes a, Power p) {
  return {{scale_half(a.v[0], p.n[0]), scale_half(a.v[1], p.n[1])}};
}

// The float whose exponent is the integer in the lowest bits of t, a sum with 1.5 * 2^23.
IRL_INLINE __m256 power_half(__m256 t) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23));
}
IRL_INLINE Lanes power(Lanes t) { return {{power_half(t.v[0]), power_half(t.v[1])}}; }

IRL_INLINE Lanes load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
IRL_INLINE __m128i load_eight(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
// The even elements in one register, the odd ones in the other: two operations apart, two together
// again. Lanes of bfloat16 are in this order until they are stored as bfloat16.
IRL_INLINE Lanes load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i odd = _mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)), _mm256_castsi256_ps(odd)}};
}
IRL_INLINE Lanes load(const Float16* p) {
  return {{_mm256_cvtph_ps(load_eight(p)), _mm256_cvtph_ps(load_eight(p + 8))}};
}

// Round to nearest even in the upper half of each lane; of a NaN, the one that arithmetic makes is
// kept. Any other may become a number: quiet first.
IRL_INLINE __m256i round_to_bfloat16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
IRL_INLINE __m256 quiet(__m256 a) {
  const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  return _mm256_blendv_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan);
}
IRL_INLINE __m256i pack_numbers(const BFloat16*, Lanes a) {
  const __m256i even = _mm256_srli_epi32(round_to_bfloat16(a.v[0]), 16);
  return _mm256_blend_epi16(even, round_to_bfloat16(a.v[1]), 0xaa);
}
IRL_INLINE __m256i pack(const BFloat16* p, Lanes a) {
  return pack_numbers(p, {{quiet(a.v[0]), quiet(a.v[1])}});
}
IRL_INLINE __m256i pack(const Float16*, Lanes a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m128i low = _mm256_cvtps_ph(a.v[0], kNearest), high = _mm256_cvtps_ph(a.v[1], kNearest);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

IRL_INLINE void store(float* p, Lanes a) {
  _mm256_storeu_ps(p, a.v[0]);
  _mm256_storeu_ps(p + 8, a.v[1]);
}
template <class Half>
IRL_INLINE void store(Half* p, Lanes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack(p, a));
}

IRL_INLINE void store_numbers(BFloat16* p, Lanes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_numbers(p, a));
}

// Past the caches; p is aligned to the sixteen elements written.
IRL_INLINE void stream_numbers(BFloat16* p, Lanes a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), pack_numbers(p, a));
}
IRL_INLINE void stream(float* p, Lanes a) {
  _mm256_stream_ps(p, a.v[0]);
  _mm256_stream_ps(p + 8, a.v[1]);
}
template <class Half>
IRL_INLINE void stream(Half* p, Lanes a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), pack(p, a));
}
IRL_INLINE void end_streams() { _mm_sfence(); }

// Sixteen elements as they are, past the caches.
IRL_INLINE void stream_copy(BFloat16* p, const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
}
#define IRL_INTERLEAVED BFloat16

#include "exp_polynomial.h"
