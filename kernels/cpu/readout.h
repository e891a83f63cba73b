// How logits become Q-values, after the lanes of an instruction set and exp.h: q = x, q = scale x,
// or q = softcap tanh(scale x / softcap). slope is dq/dx where the logit is q, without logit_scale,
// which the caller's coefficients carry. An x of -inf stays -inf under a cap as well: what is
// masked has no mass.
//
// Each q is rounded before anything is done with it, so that a row's maximum, its exponentials and
// its label's logit are of the same numbers: log p <= 0 rests on that.

struct Plain {
  template <int kCount>
  IRL_INLINE_MEMBER void read(Lanes (&)[kCount]) const {}
  IRL_INLINE_MEMBER Lanes times_slope(Lanes a, Lanes) const { return a; }
};

// tanh(u) = u P(u^2) / Q(u^2), within 7 units of 2^-24 relatively, and at most 1. Beyond 9.02 it
// rounds to 1. NaN stays NaN. Step by step over several registers, as exp_ranged is.
template <int kCount>
IRL_INLINE void tanh_of(Lanes (&u)[kCount]) {
  Lanes z[kCount], p[kCount], q[kCount];
#define IRL_EACH(STATEMENT) \
  for (int k = 0; k < kCount; ++k) STATEMENT
  IRL_EACH(u[k] = max_or_second(splat(-9.02f), min_or_second(splat(9.02f), u[k])));
  IRL_EACH(z[k] = mul(u[k], u[k]));
  IRL_EACH(p[k] = muladd(splat(0x1.3f839ep-36f), z[k], splat(-0x1.b5df3cp-27f)));
  IRL_EACH(p[k] = muladd(p[k], z[k], splat(0x1.368cc4p-17f)));
  IRL_EACH(p[k] = muladd(p[k], z[k], splat(0x1.7ea71cp-9f)));
  IRL_EACH(p[k] = muladd(p[k], z[k], splat(0x1.088f5cp-3f)));
  IRL_EACH(p[k] = muladd(p[k], z[k], splat(0x1.fffffep-1f)));
  IRL_EACH(q[k] = muladd(splat(0x1.ddf812p-13f), z[k], splat(0x1.853eb6p-6f)));
  IRL_EACH(q[k] = muladd(q[k], z[k], splat(0x1.d99ce2p-2f)));
  IRL_EACH(q[k] = muladd(q[k], z[k], splat(1.0f)));
  IRL_EACH(u[k] = div(mul(u[k], p[k]), q[k]));
  IRL_EACH(u[k] = max_or_second(splat(-1.0f), min_or_second(splat(1.0f), u[k])));
#undef IRL_EACH
}

// A scale, and a soft cap where there is one.
struct Bent {
  bool capped;
  Lanes scale, softcap;  // scale = logit_scale, / softcap where there is one
  Lanes unit;            // 1 / softcap

  // Not inlined: each loop would be compiled into several times its size, for logits that are
  // rarely bent.
  template <int kCount>
  __attribute__((noinline)) void read(Lanes (&x)[kCount]) const {
    Lanes u[kCount];
    for (int k = 0; k < kCount; ++k) u[k] = mul(scale, x[k]);
    if (capped) tanh_of(u);
    for (int k = 0; k < kCount; ++k) {
      if (!capped) {
        x[k] = rounded(u[k]);
        continue;
      }
      // 0, and -inf where x is: the only x that is below 0 beside the largest number.
      const Lanes masked = min_or_second(splat(0.0f), add(x[k], splat(__FLT_MAX__)));
      x[k] = add(rounded(mul(softcap, u[k])), masked);
    }
  }

  // A slope below 0 is that of a q of -inf: 0 then.
  IRL_INLINE_MEMBER Lanes times_slope(Lanes a, Lanes q) const {
    if (!capped) return a;
    const Lanes t = mul(unit, q);
    return mul(a, max_or_second(splat(0.0f), sub(splat(1.0f), mul(t, t))));
  }
};

template <class Read>
IRL_INLINE Lanes read_one(Lanes x, const Read& how) {
  Lanes q[1] = {x};
  how.read(q);
  return q[0];
}

IRL_INLINE Bent bent_by(const Readout& readout) {
  const bool capped = readout.softcap != 0.0f;
  const float scale = capped ? readout.logit_scale / readout.softcap : readout.logit_scale;
  return {capped, splat(scale), splat(readout.softcap), splat(capped ? 1 / readout.softcap : 0)};
}

// What FUNCTION, given how to read as its last argument, returns for this readout.
#define IRL_WITH_READOUT(FUNCTION, ...)                       \
  if (readout.softcap != 0.0f || readout.logit_scale != 1.0f) \
    return FUNCTION(__VA_ARGS__, bent_by(readout));           \
  return FUNCTION(__VA_ARGS__, Plain{})
