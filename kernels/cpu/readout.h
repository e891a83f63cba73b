// How logits become Q-values, after the lanes of an instruction set and exp.h: q = x, q = scale x,
// or q = softcap tanh(scale x / softcap). slope is dq/dx without logit_scale, which the caller's
// coefficients carry. An x of -inf stays -inf under a cap as well: what is masked has no mass.
//
// Each q is rounded before anything is done with it, so that a row's maximum, its exponentials and
// its label's logit are of the same numbers: log p <= 0 rests on that.

struct Plain {
  static constexpr bool kCapped = false;
  IRL_INLINE_MEMBER Lanes read(Lanes x) const { return x; }
  IRL_INLINE_MEMBER Lanes slope(Lanes) const { return splat(1.0f); }
};

// tanh(u) = u P(u^2) / Q(u^2), within 7 units of 2^-24 relatively, and at most 1. Beyond 9.02 it
// rounds to 1. NaN stays NaN.
IRL_INLINE Lanes tanh_of(Lanes u) {
  const Lanes end = splat(9.02f);
  u = max_or_second(splat(-9.02f), min_or_second(end, u));
  const Lanes z = mul(u, u);
  Lanes p = splat(0x1.3f839ep-36f);
  p = muladd(p, z, splat(-0x1.b5df3cp-27f));
  p = muladd(p, z, splat(0x1.368cc4p-17f));
  p = muladd(p, z, splat(0x1.7ea71cp-9f));
  p = muladd(p, z, splat(0x1.088f5cp-3f));
  p = muladd(p, z, splat(0x1.fffffep-1f));
  Lanes q = splat(0x1.ddf812p-13f);
  q = muladd(q, z, splat(0x1.853eb6p-6f));
  q = muladd(q, z, splat(0x1.d99ce2p-2f));
  q = muladd(q, z, splat(1.0f));
  const Lanes t = div(mul(u, p), q);
  return max_or_second(splat(-1.0f), min_or_second(splat(1.0f), t));
}

// A scale, and a soft cap where there is one. Its functions are not inlined: each loop would be
// compiled into several times its size, for logits that are rarely bent.
IRL_NOT_INLINE Lanes bent(bool capped, Lanes scale, Lanes softcap, Lanes x) {
  const Lanes u = mul(scale, x);
  if (!capped) return rounded(u);
  // 0, and -inf where x is: the only x that is below 0 beside the largest number.
  const Lanes masked = min_or_second(splat(0.0f), add(x, splat(__FLT_MAX__)));
  return add(rounded(mul(softcap, tanh_of(u))), masked);
}

IRL_NOT_INLINE Lanes slope_of_cap(Lanes scale, Lanes x) {
  const Lanes t = tanh_of(mul(scale, x));
  return sub(splat(1.0f), mul(t, t));
}

struct Bent {
  static constexpr bool kCapped = true;
  bool capped;
  Lanes scale, softcap;  // scale = logit_scale, / softcap where there is one
  IRL_INLINE_MEMBER Lanes read(Lanes x) const { return bent(capped, scale, softcap, x); }
  IRL_INLINE_MEMBER Lanes slope(Lanes x) const {
    return capped ? slope_of_cap(scale, x) : splat(1.0f);
  }
};

IRL_INLINE Bent bent_by(const Readout& readout) {
  const bool capped = readout.softcap != 0.0f;
  const float scale = capped ? readout.logit_scale / readout.softcap : readout.logit_scale;
  return {capped, splat(scale), splat(readout.softcap)};
}

// What FUNCTION, given how to read as its last argument, returns for this readout.
#define IRL_WITH_READOUT(FUNCTION, ...)                       \
  if (readout.softcap != 0.0f || readout.logit_scale != 1.0f) \
    return FUNCTION(__VA_ARGS__, bent_by(readout));           \
  return FUNCTION(__VA_ARGS__, Plain{})
