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

IRL_INLINE Lanes div(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
// a itself: keeps the compiler from joining the product that a is with a later sum.
IRL_INLINE Lanes rounded(Lanes a) {
  __asm__("" : "+v"(a.v));
  return a;
}

// b where either is NaN, as vmaxps and vminps have it.
IRL_INLINE Lanes max_or_second(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
IRL_INLINE Lanes min_or_second(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
// Of lanes without a NaN.
IRL_INLINE float largest(Lanes a) { return _mm512_reduce_max_ps(a.v); }

// The sum in double: one half of the lanes is added to the other, until one lane is left.
IRL_INLINE double sum_of(Lanes a) {
  const __m512d eight = _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)),
                                      _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
  const __m256d four =
      _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

// a, but 0 where x is -inf.
IRL_INLINE Lanes zero_at_minus_inf(Lanes a, Lanes x) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-__builtin_inff()), _CMP_NEQ_UQ);
  return {_mm512_maskz_mov_ps(keep, a.v)};
}

// exp(x) = 2^(n/16) 2^r with n = round(16 x log2 e) and |r| <= 1/32. The sixteen roots 2^(k/16) lie
// in one register and the polynomial has degree 3 (relative error 2e-9); with one of degree 6 and
// no table the arithmetic takes longer than the memory. x is within the range of exp (exp.h), or
// NaN; kExpZero gives exactly 0, and a subnormal result is rounded once. Step by step over several
// registers, since one alone is a chain of ten operations that wait for each other.
template <int kCount>
IRL_INLINE void exp_ranged(Lanes (&x)[kCount]) {
  const __m512 roots = _mm512_setr_ps(
      1.0f, 0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f, 0x1.306fe0p+0f, 0x1.3dea64p+0f,
      0x1.4bfdaep+0f, 0x1.5ab07ep+0f, 0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f,
      0x1.9c4918p+0f, 0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f, 0x1.ea4afap+0f);
  // Adding 1.5 * 2^19 rounds to sixteenths, and leaves n mod 16 in the lowest bits.
  const __m512 shift = _mm512_set1_ps(786432.0f), log2_e = _mm512_set1_ps(0x1.715476p+0f);
  const __m512 log2_e_rest = _mm512_set1_ps(0x1.4ae0c0p-26f);
  const __m512 c1 = _mm512_set1_ps(0x1.62e430p-1f), c2 = _mm512_set1_ps(0x1.ebfff4p-3f);
  const __m512 c3 = _mm512_set1_ps(0x1.c6ac6ap-5f);
  __m512 root[kCount], n[kCount], r[kCount], p[kCount];
#define IRL_EACH(STATEMENT) \
  for (int k = 0; k < kCount; ++k) STATEMENT
  IRL_EACH(root[k] = _mm512_fmadd_ps(x[k].v, log2_e, shift));
  IRL_EACH(n[k] = _mm512_sub_ps(root[k], shift));
  IRL_EACH(r[k] = _mm512_fmsub_ps(x[k].v, log2_e, n[k]));
  IRL_EACH(r[k] = _mm512_fmadd_ps(x[k].v, log2_e_rest, r[k]));
  IRL_EACH(p[k] = _mm512_fmadd_ps(c3, r[k], c2));
  IRL_EACH(p[k] = _mm512_fmadd_ps(p[k], r[k], c1));
  IRL_EACH(root[k] = _mm512_permutexvar_ps(_mm512_castps_si512(root[k]), roots));
  IRL_EACH(p[k] = _mm512_mul_ps(p[k], r[k]));
  IRL_EACH(p[k] = _mm512_fmadd_ps(p[k], root[k], root[k]));
  IRL_EACH(x[k].v = _mm512_scalef_ps(p[k], n[k]));  // by 2 to the floor of n
#undef IRL_EACH
}

// For the scan: exp itself is as short as it can be.
constexpr int kScanShift = 0;
template <int kCount>
IRL_INLINE void exp_scan(Lanes (&x)[kCount]) {
  exp_ranged(x);
}

IRL_INLINE Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
IRL_INLINE Lanes load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
IRL_INLINE Lanes load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

// Round to nearest even; a NaN stays a (quiet) NaN. The bfloat16 is the upper half of each lane.
IRL_INLINE __m512i round_to_bfloat16(Lanes a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __mmask16 number = _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_mask_add_epi32(quiet, number, bits, half);
}
IRL_INLINE __m256i to_bfloat16(Lanes a) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bfloat16(a), 16));
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

// 32 bfloat16 fill a register: one shuffle spreads each half of it, and one packs two halves.
IRL_INLINE __m512i each_lane() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
IRL_INLINE __m512 spread(__m512i elements, int from) {
  const __m512i element = _mm512_add_epi32(each_lane(), _mm512_set1_epi32(from));
  const __m512i upper = _mm512_slli_epi32(element, 16);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, upper, elements));
}
IRL_INLINE __m512i pack(Lanes a, Lanes b) {
  const __m512i step = _mm512_mullo_epi32(each_lane(), _mm512_set1_epi32(0x00040004));
  const __m512i upper = _mm512_add_epi32(step, _mm512_set1_epi32(0x00030001));  // 1, 3, 5, ...
  return _mm512_permutex2var_epi16(round_to_bfloat16(a), upper, round_to_bfloat16(b));
}
IRL_INLINE void load_two(const BFloat16* p, Lanes& a, Lanes& b) {
  const __m512i elements = _mm512_loadu_si512(p);
  a = {spread(elements, 0)};
  b = {spread(elements, 16)};
}
IRL_INLINE void store_two(BFloat16* p, Lanes a, Lanes b) { _mm512_storeu_si512(p, pack(a, b)); }
IRL_INLINE void stream_two(BFloat16* p, Lanes a, Lanes b) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), pack(a, b));
}
