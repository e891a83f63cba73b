#include "measures.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "row.h"

namespace irl {

namespace {

// Rows as they are read: where columns are left out, a copy of the row with -inf in their place,
// private to a thread and kept in its cache.
class Reader {
 public:
  Reader(const Isa& isa, const Rows& rows, const Readout& readout, const RowView& view)
      : loops_(isa.loops[static_cast<int>(rows.dtype)]), rows_(rows), given_(readout), view_(view) {
    if (view.keep_mask || view.keep_above)
      copy_.resize(static_cast<std::size_t>(rows.vocab * size_of(rows.dtype)));
  }

  const char* read(const void* logits, std::int64_t row) {
    readout = given_;
    if (view_.scale) {  // a cap is bent before, and so scaled as well
      readout.logit_scale *= view_.scale[row];
      readout.softcap *= view_.scale[row];
    }
    const char* x = row_at(logits, rows_, row);
    if (copy_.empty()) return x;
    const std::uint8_t* keep =
        view_.keep_mask ? view_.keep_mask + view_.keep_layout.offset(row) : nullptr;
    const float above = view_.keep_above ? view_.keep_above[row] : -HUGE_VALF;
    loops_.filter(x, copy_.data(), rows_.vocab, keep, above, given_);
    return copy_.data();
  }

  Readout readout;  // of the row that was read last

 private:
  const RowLoops& loops_;
  const Rows& rows_;
  const Readout& given_;
  const RowView& view_;
  std::vector<char> copy_;
};

float or_zero(const float* x, std::int64_t i) { return x ? x[i] : 0.0f; }

}  // namespace

void row_measures(const Isa& isa, const Team& team, const Rows& rows, const void* logits,
                  const std::int64_t* ids, std::int64_t count, const RowMeasures& out,
                  const Readout& readout, const RowView& view) {
  const RowLoops& loops = isa.loops[static_cast<int>(rows.dtype)];
  const std::int64_t n = rows.layout.rows();
  over_rows(n, rows.vocab, team, [&](std::int64_t begin, std::int64_t end) {
    Reader reader(isa, rows, readout, view);
    Scratch scratch(out.log_sum_sq ? rows.vocab : 0);
    float* exps = out.log_sum_sq ? scratch.exps() : nullptr;
    for (std::int64_t i = begin; i < end; ++i) {
      const char* x = reader.read(logits, i);
      const RowSums sums = loops.scan(x, rows.vocab, out.entropy != nullptr, false, exps,
                                      exps ? scratch.segments() : nullptr, reader.readout);
      const double log_s = log_sum(sums);
      out.row_max[i] = sums.max;
      out.logsum[i] = static_cast<float>(log_s);
      for (std::int64_t k = i * count; k < (i + 1) * count; ++k)
        out.picked[k] = label_logit_of(isa, rows, x, ids[k], reader.readout);
      if (out.entropy) {  // which rounding may take out of its range
        const double most = std::log(static_cast<double>(rows.vocab));
        out.entropy[i] = static_cast<float>(
            std::min(std::max(entropy_of(sums, log_s), 0.0), std::max(most, 0.0)));
      }
      if (exps) {
        const double squares = loops.squares(rows.vocab, exps, scratch.segments(), sums);
        out.log_sum_sq[i] = sums.sum == 0
                                ? -HUGE_VALF
                                : static_cast<float>(std::min(std::log(squares) - 2 * log_s, 0.0));
      }
      if (!out.top1 && !out.mean_logit) continue;
      const Survey found = loops.survey(x, rows.vocab, sums.max, reader.readout);
      if (out.top1) out.top1[i] = found.top;
      if (!out.mean_logit) continue;
      out.kept[i] = static_cast<float>(found.kept);
      out.mean_logit[i] = found.kept
                              ? static_cast<float>(found.total / static_cast<double>(found.kept))
                              : -HUGE_VALF;
    }
  });
}

void row_measures_grad(const Isa& isa, const Team& team, const Rows& rows, const void* logits,
                       const std::int64_t* ids, std::int64_t count, const float* row_max,
                       const float* logsum, const RowSlopes& slopes, void* dlogits,
                       const Layout& dlogits_layout, const Readout& readout, const RowView& view) {
  const RowLoops& loops = isa.loops[static_cast<int>(rows.dtype)];
  const std::int64_t n = rows.layout.rows(), size = size_of(rows.dtype);
  const Stores stores = choose_stores(logits, dlogits, rows, dlogits_layout);
  struct Element {
    std::int64_t id;
    double value;
    float z;
  };
  over_rows(n, rows.vocab, team, [&](std::int64_t begin, std::int64_t end) {
    Reader reader(isa, rows, readout, view);
    std::vector<Element> elements;
    for (std::int64_t i = begin; i < end; ++i) {
      const char* x = reader.read(logits, i);
      char* y = row_at(dlogits, rows, dlogits_layout, i);
      const float a = slopes.a[i], b = or_zero(slopes.b, i);
      const float d = or_zero(slopes.d, i), e = or_zero(slopes.e, i);
      const bool plain = d == 0 && e == 0, empty = a == 0 && b == 0 && plain;
      elements.clear();  // read before y, which may be x, is written
      for (std::int64_t k = i * count; k < (i + 1) * count; ++k)
        if (ids[k] >= 0 && ids[k] < rows.vocab)
          elements.push_back({ids[k], static_cast<double>(slopes.c[k]), 0.0f});
      std::sort(elements.begin(), elements.end(),
                [](const Element& one, const Element& other) { return one.id < other.id; });
      std::size_t distinct = 0;
      for (const Element& element : elements) {
        if (distinct && elements[distinct - 1].id == element.id)
          elements[distinct - 1].value += element.value;
        else
          elements[distinct++] = element;
      }
      elements.resize(distinct);
      for (Element& element : elements) {
        const float z = element.z = label_logit_of(isa, rows, x, element.id, reader.readout);
        if (empty || z == -HUGE_VALF) continue;
        const double log_p = (static_cast<double>(z) - row_max[i]) - logsum[i];
        const double p = std::exp(log_p);
        element.value += p * (a + (b == 0 ? 0.0 : b * log_p) + d * p) + e;
      }
      if (empty)
        loops.clear(y, rows.vocab, stores);
      else if (plain)
        loops.write(x, y, rows.vocab, row_max[i], logsum[i], a, b, stores, reader.readout);
      else
        loops.write_further(x, y, rows.vocab, row_max[i], logsum[i], a, b, d, e, stores,
                            reader.readout);
      for (const Element& element : elements)
        write_element(rows.dtype, y + element.id * size,
                      element.z == -HUGE_VALF ? 0.0f
                                              : static_cast<float>(through_cap(
                                                    reader.readout, element.value, element.z)));
    }
  });
}

}  // namespace irl
