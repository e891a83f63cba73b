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

// exp(x) 2^kScanShift for the scan, where x is at most a little above 0: 2^n then needs one factor
// only, since with this shift it is a normal number down to the smallest n, where it is 0. Degree 5
// has relative error 1.1e-7. A second part of log 2 would add 2e-9 n, less than x was rounded by.
constexpr int kScanShift = 23;

template <int kCount>
IRL_INLINE void exp_scan(Lanes (&x)[kCount]) {
  const Lanes shift = splat(12582912.0f + 127 + kScanShift), log2_e = splat(1.44269504088896341f);
  for (int k = 0; k < kCount; ++k) {
    const Lanes t = muladd(x[k], log2_e, shift), n = sub(t, shift);
    const Lanes r = muladd(n, splat(-0x1.62e430p-1f), x[k]);
    Lanes p = splat(0x1.10627ap-7f);
    p = muladd(p, r, splat(0x1.572a08p-5f));
    p = muladd(p, r, splat(0x1.5557aep-3f));
    p = muladd(p, r, splat(0x1.fffdfcp-2f));
    p = muladd(p, r, splat(1.0f));
    p = muladd(p, r, splat(1.0f));
    x[k] = mul(p, power(t));
  }
}
