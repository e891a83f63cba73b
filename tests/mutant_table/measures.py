"""Breaks of the row measures, in each of their kernels and around them."""

from .mutant import ALGEBRA, KERNELS, LAUNCHES, MEASURES, REFERENCE, TRITON_KERNELS, Mutant

CONTRACT = "::test_measures_match_float64"
NATIVE = "tests/kernels/test_native.py::TestNative"
TRITON = "tests/kernels/test_triton.py::TestTriton"
PLAIN = "tests/kernels/test_reference.py::TestReference"
MOVING = "::test_measures_while_the_maximum_moves"
FIRST = "::test_the_first_of_equals_is_the_top"
STATS = "tests/torch/test_measures.py::"
EVERYTHING = f"{STATS}test_everything[reference]"
LAYER = f"{STATS}test_a_layer_gives_what_its_logits_give"
THRESHOLD = f"{STATS}test_a_threshold_keeps_what_equals_it"


def native(what: str, text: str, replacement: str, test: str = NATIVE + CONTRACT) -> Mutant:
    return Mutant(f"measures in C++: {what}", KERNELS, text, replacement, test)


def triton(what: str, text: str, replacement: str, test: str = TRITON + CONTRACT) -> Mutant:
    return Mutant(f"measures in Triton: {what}", TRITON_KERNELS, text, replacement, test)


def plain(what: str, text: str, replacement: str, test: str = PLAIN + CONTRACT) -> Mutant:
    return Mutant(f"measures in reference: {what}", REFERENCE, text, replacement, test)


def algebra(what: str, text: str, replacement: str, test: str = EVERYTHING) -> Mutant:
    return Mutant(f"measures: {what}", ALGEBRA, text, replacement, test)


MUTANTS = [
    native(
        "a mask is not looked at",
        "view_.keep_mask ? view_.keep_mask + view_.keep_layout.offset(row) : nullptr",
        "nullptr",
    ),
    native(
        "every row has the mask of the first",
        "view_.keep_mask + view_.keep_layout.offset(row)",
        "view_.keep_mask",
    ),
    native(
        "a soft cap is not scaled by the row",
        "readout.softcap *= view_.scale[row];",
        "",
    ),
    native(
        "an id that is there twice counts once",
        "elements[distinct - 1].value += element.value;",
        "elements[distinct - 1].value = element.value;",
    ),
    native(
        "an id outside the row is written",
        "if (ids[k] >= 0 && ids[k] < rows.vocab)",
        "if (ids[k] == rows.vocab || (ids[k] >= 0 && ids[k] < rows.vocab))",
    ),
    native(
        "the element at an id misses E",
        "(b == 0 ? 0.0 : b * log_p) + d * p) + e;",
        "(b == 0 ? 0.0 : b * log_p) + d * p);",
    ),
    native(
        "what is not kept has a gradient at an id",
        "element.z == -HUGE_VALF ? 0.0f",
        "element.z == HUGE_VALF ? 0.0f",
    ),
    native(
        "the last of the largest is the top",
        "found.top < 0 && l < kLanes && j + l < vocab",
        "l < kLanes && j + l < vocab",
        NATIVE + FIRST,
    ),
    native(
        "what equals the threshold goes",
        "above > -kInfinity && q[l] < above;",
        "above > -kInfinity && q[l] <= above;",
        f"{THRESHOLD}[native]",
    ),
    native(
        "what is not kept is counted",
        "const bool present = q[l] != -kInfinity;",
        "const bool present = q[l] != kInfinity;",
    ),
    native(
        "squares are moved to the row's maximum once",
        "sum += total(totals) * unit * unit;",
        "sum += total(totals) * unit * kScanUnit;",
        NATIVE + MOVING,
    ),
    native(
        "D is a second A",
        "muladd(mul(d, p[k]), p[k], weigh(p[k], log_p[k], a, b))",
        "muladd(d, p[k], weigh(p[k], log_p[k], a, b))",
    ),
    triton(
        "a later tile takes the top's place",
        "tl.where(tile_top > top,",
        "tl.where(tile_top >= top,",
        TRITON + FIRST,
    ),
    triton(
        "squares are moved to the new maximum once",
        "squares = moved * moved * squares + tl.sum(e * e, 0)",
        "squares = moved * squares + tl.sum(e * e, 0)",
        TRITON + MOVING,
    ),
    triton(
        "the edges are not counted",
        "all_count += tl.sum(tl.where(present, 1.0, 0.0), 0)",
        "all_count += 0.0",
    ),
    triton(
        "an id among the edges is lost",
        "g_edge += tl.where(hit, tl.load(c + at_edge_id), 0.0)",
        "g_edge += tl.where(hit, 0.0, 0.0)",
    ),
    triton(
        "an id counts from the first whole group",
        "place = tl.load(ids + at) - skip - begin",
        "place = tl.load(ids + at) - begin",
    ),
    triton(
        "what is not kept has a gradient",
        "through_cap(tl.where(z == -INF, 0.0, g * SCALE), q, SOFTCAP)",
        "through_cap(g * SCALE, q, SOFTCAP)",
    ),
    triton(
        "a bad id is no id",
        'tl.where(label >= n_cols, float("nan"), tl.where(label < 0, 0.0, z_at))',
        "tl.where(label < 0, 0.0, z_at)",
    ),
    Mutant(
        "measures in Triton: the strides of a mask change places",
        LAUNCHES,
        "return (0, 0) if mask is None else _strides(mask)",
        "return (0, 0) if mask is None else _strides(mask)[::-1]",
        TRITON + CONTRACT,
    ),
    plain(
        "what equals the threshold goes",
        "~(q < keep_above[..., None])",
        "(q > keep_above[..., None])",
        f"{THRESHOLD}[reference]",
    ),
    plain(
        "what is not kept has a gradient",
        "xp.where((z == -xp.inf) | (element == 0), 0.0, element)",
        "xp.where(element == 0, 0.0, element)",
    ),
    algebra(
        "the entropy's gradient misses H",
        "a = a - xp.where(dentropy != 0, dentropy * entropy, 0.0)",
        "a = a + xp.zeros_like(a)",
    ),
    algebra(
        "half of what log_sum_sq takes from all columns",
        "a = a - 2 * dlog_sum_sq",
        "a = a - dlog_sum_sq",
    ),
    algebra(
        "a mean's gradient is that of the sum",
        "dmean / xp.where(kept > 0, kept, 1.0)",
        "dmean",
    ),
    algebra(
        "a bad id is no id",
        "xp.where(extra == ignore, NO_LABEL, BAD_LABEL)",
        "xp.where(extra == ignore, NO_LABEL, NO_LABEL)",
        f"{STATS}test_bad_input",
    ),
    algebra(
        "an answer that is not kept is right where nothing is",
        "(label_logit >= row_max) & (label_logit != -xp.inf)",
        "(label_logit >= row_max)",
        f"{STATS}test_no_answer_is_right_where_nothing_is_kept",
    ),
    Mutant(
        "measures: every chunk is seen as the first",
        MEASURES,
        "x[rows] for x in self",
        "x[: rows.stop - rows.start] for x in self",
        LAYER,
    ),
    Mutant(
        "measures: a gradient goes to weight and to the given sum",
        MEASURES,
        "        asked[1] = False\n",
        "",
        LAYER,
    ),
]
