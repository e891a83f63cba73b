// Sixteen float lanes on AVX-512 (F, BW, DQ, VL): one register. Included inside the namespace and
// the target region of isa_avx512.cpp; every function is forced inline and touches no other row.

struct Lanes {
  __m512 v;
};

IRL_INLINE Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
IRL_INLINE Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
IRL_INLINE Lanes sub(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
IRL_INLINE Lanes mul(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
IRL_INLINE Lanes muladd(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// b where either is NaN, as vmaxps and vminps have it.
IRL_INLINE Lanes max_or_second(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
IRL_INLINE Lanes min_or_second(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }

// a, but 0 where x is -inf.
IRL_INLINE Lanes zero_at_minus_inf(Lanes a, Lanes x) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-__builtin_inff()), _CMP_NEQ_UQ);
  return {_mm512_maskz_mov_ps(keep, a.v)};
}

// n = round(x log2 e) and the scaling by 2^n, rounded once even where the result is subnormal.
struct Power {
  __m512 n;
};
IRL_INLINE Power power_of_two(Lanes x) {
  const __m512 t = _mm512_mul_ps(x.v, _mm512_set1_ps(1.44269504088896341f));
  return {_mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
IRL_INLINE Lanes as_float(Power p) { return {p.n}; }
IRL_INLINE Lanes scale(Lanes a, Power p) { return {_mm512_scalef_ps(a.v, p.n)}; }

IRL_INLINE Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
IRL_INLINE Lanes load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
IRL_INLINE Lanes load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

// Round to nearest even; a NaN stays a (quiet) NaN.
IRL_INLINE __m256i to_bfloat16(Lanes a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __mmask16 number = _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i rounded = _mm512_mask_add_epi32(quiet, number, bits, half);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
IRL_INLINE __m256i to_float16(Lanes a) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

IRL_INLINE void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
IRL_INLINE void store(BFloat16* p, Lanes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(a));
}
IRL_INLINE void store(Float16* p, Lanes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_float16(a));
}

// Past the caches; p is aligned to the sixteen elements written.
IRL_INLINE void stream(float* p, Lanes a) { _mm512_stream_ps(p, a.v); }
IRL_INLINE void stream(BFloat16* p, Lanes a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(a));
}
IRL_INLINE void stream(Float16* p, Lanes a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_float16(a));
}
IRL_INLINE void end_streams() { _mm_sfence(); }
