// The range of exp, after the lanes of an instruction set, which bring exp_ranged: within 2 ulp,
// subnormal results included.

// Below this exp rounds to 0, above kExpInfinite to infinity.
constexpr float kExpZero = -104.0f;
constexpr float kExpInfinite = 89.0f;

// x kept within the range of exp, a NaN kept as it is.
IRL_INLINE Lanes exp_range(Lanes x) {
  return max_or_second(splat(kExpZero), min_or_second(splat(kExpInfinite), x));
}

IRL_INLINE Lanes exp_ranged(Lanes x) {
  Lanes y[1] = {x};
  exp_ranged(y);
  return y[0];
}
