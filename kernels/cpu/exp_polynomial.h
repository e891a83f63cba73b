// exp on sixteen lanes, within 2 ulp over the whole range, subnormal results included; for lanes
// without a table in a register.
//
// exp(x) = 2^n exp(r), n = round(x / log 2), |r| <= log(2)/2: exp(r) is a polynomial of degree 6
// with relative error 3e-9, and log 2 is split so that n times its upper part is exact. x is within
// the range of exp (exp.h), or NaN; kExpZero gives exactly 0.
IRL_INLINE Lanes exp_of(Lanes x) {
  const Power n = power_of_two(x);
  Lanes r = muladd(as_float(n), splat(-0.693359375f), x);
  r = muladd(as_float(n), splat(2.12194440e-4f), r);
  Lanes p = splat(0x1.6a215ap-10f);
  p = muladd(p, r, splat(0x1.123b9ap-7f));
  p = muladd(p, r, splat(0x1.5558fcp-5f));
  p = muladd(p, r, splat(0x1.555490p-3f));
  p = muladd(p, r, splat(0x1.fffffcp-2f));
  p = muladd(p, r, splat(1.0f));
  p = muladd(p, r, splat(1.0f));
  return scale(p, n);
}

template <int kCount>
IRL_INLINE void exp_ranged(Lanes (&x)[kCount]) {
  for (int k = 0; k < kCount; ++k) x[k] = exp_of(x[k]);
}
