// The loops over one row, and the instruction sets they are compiled for.
//
// These are the only functions compiled for more than the oldest CPU. They know rows and numbers;
// labels, coefficients, strides and threads belong to rows.cpp.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "dtypes.h"

namespace irl {

// From element `begin` on, until the next segment, the scratch holds exp(q - reference), times
// dq/dx without logit_scale where that is asked for, up to a power of two and an order of the
// elements which are the instruction set's own.
struct Segment {
  std::int64_t begin;
  float reference;
};

// max = max_j q_j over those that are numbers; sum = sum_j exp(q_j - max), weighted = sum_j
// exp(q_j - max) (q_j - max). Without a number above -inf, max is -inf and the sums are 0 or NaN.
struct RowSums {
  float max;
  double sum;
  double weighted;
  std::int64_t segments;
};

// The first j with q_j = max, 0 if there is none; and the q_j above -inf, NaN among them.
struct Survey {
  std::int64_t top;
  double total;
  std::int64_t kept;
};

inline constexpr std::int64_t kBlock = 2048;  // elements summed in float32, then in double
inline constexpr std::int64_t kLanes = 16;

// How a row is written: straight to memory where it is mapped and too large for the caches.
enum class Stores { cached, streamed };

// q = logit_scale x where softcap is 0, else softcap tanh(logit_scale x / softcap), of logits x.
// logit_scale is above 0, softcap not below. Statistics are those of q, gradients those to x. An x
// of -inf has q = -inf, with a cap as without, and under a cap the slope 0.
struct Readout {
  float logit_scale = 1, softcap = 0;
};

struct RowLoops {
  // q of one x, the same bits as in the loops.
  float (*read)(float x, const Readout& readout);

  // Reads x once. `exps` (vocab + kLanes floats) and `segments` (vocab / kBlock + 2) may be null;
  // with `sloped` the first gets the slopes too.
  RowSums (*scan)(const void* x, std::int64_t vocab, bool entropy, bool sloped, float* exps,
                  Segment* segments, const Readout& readout);

  // y_j = p_j (a + b log p_j) dq_j/dx_j from the sloped scratch of scan, log_sum = log sum_j
  // exp(q_j - max). Reads the scratch, and x only where b != 0, both from the cache; writes y once.
  void (*write_scanned)(const void* x, void* y, std::int64_t vocab, const float* exps,
                        const Segment* segments, const RowSums& sums, double log_sum, double a,
                        float b, Stores stores, const Readout& readout);

  // The same from x alone, any a and b: reads x once, writes y once.
  void (*write)(const void* x, void* y, std::int64_t vocab, float max, float log_sum, float a,
                float b, Stores stores, const Readout& readout);

  // y_j = (p_j (a + b log p_j + d p_j) + e) dq_j/dx_j, 0 where x_j = -inf; as write.
  void (*write_further)(const void* x, void* y, std::int64_t vocab, float max, float log_sum,
                        float a, float b, float d, float e, Stores stores, const Readout& readout);

  // y_j = -inf where keep_j is 0 or q_j < above, else x_j. `keep` may be null, `above` -inf.
  // Reads x and keep once, writes y once.
  void (*filter)(const void* x, void* y, std::int64_t vocab, const std::uint8_t* keep, float above,
                 const Readout& readout);

  // Reads x once, which scan has brought into the cache.
  Survey (*survey)(const void* x, std::int64_t vocab, float max, const Readout& readout);

  // sum_j exp(q_j - max)^2 from the scratch of scan without slopes.
  double (*squares)(std::int64_t vocab, const float* exps, const Segment* segments,
                    const RowSums& sums);

  // y_j = 0: writes y once.
  void (*clear)(void* y, std::int64_t vocab, Stores stores);

  // y_j = factor y_j: reads and writes y once.
  void (*scale)(void* y, std::int64_t vocab, float factor);
};

struct Isa {
  const char* name;
  bool (*supported)();
  RowLoops loops[kDtypes];  // indexed by Dtype
};

// Those this CPU can run, best first.
const std::vector<const Isa*>& isas();

// The one of that name. An empty name means IRL_OPS_ISA (read once per process), or else the best.
// Throws std::invalid_argument where the CPU or this build does not have it.
const Isa& find_isa(const std::string& name);

}  // namespace irl
