"""The breaks that tests/mutants.py makes, and the test that notices each.

A text is looked for in all files of its room, and has to be there once: code may move from file to
file without a change here.
"""

from typing import NamedTuple

ALGEBRA = ("irl_ops/algebra.py", "irl_ops/algebra/**/*.py")
CPU = ("kernels/cpu/*.cpp", "kernels/cpu/*.h")
TRITON = ("kernels/triton/*.py",)
BINDINGS = ("bindings/*.cpp", "bindings/*.h", "irl_ops/torch/native*.py")
LAUNCHES = ("irl_ops/torch/triton*.py",)


class Mutant(NamedTuple):
    what: str
    room: tuple[str, ...]
    text: str
    replacement: str
    test: str


CASES = "tests/test_named_cases.py::"


def algebra(what: str, text: str, replacement: str, case: str) -> Mutant:
    test = f"{CASES}test_torch[reference--{case}]"
    return Mutant(f"algebra: {what}", ALGEBRA, text, replacement, test)


def cpu(what: str, text: str, replacement: str, case: str) -> Mutant:
    return Mutant(f"C++: {what}", CPU, text, replacement, f"{CASES}test_torch[native--{case}]")


def triton(what: str, text: str, replacement: str, case: str) -> Mutant:
    test = f"{CASES}test_torch[triton--{case}]"
    return Mutant(f"Triton: {what}", TRITON, text, replacement, test)


def binding(what: str, text: str, replacement: str, case: str) -> Mutant:
    test = f"{CASES}test_torch[native--{case}]"
    return Mutant(f"bindings: {what}", BINDINGS, text, replacement, test)


TRANSPOSED = "test_row_kernels_take_transposed_vectors"

MUTANTS = [
    # --- the algebra in array code ---
    algebra(
        "segments are not looked at",
        "segment_ids[..., 1:] == segment_ids[..., :-1]",
        "segment_ids[..., 1:] == segment_ids[..., 1:]",
        "segments",
    ),
    algebra(
        "a position may stay",
        "position_ids[..., :-1] + 1",
        "position_ids[..., :-1] + 0",
        "positions",
    ),
    algebra("a segment ends a row late", 'side="right"', 'side="left"', "ends of segments"),
    algebra(
        "a shifted label crosses a segment",
        "labels = xp.where(has_next, following(xp, labels, ignore_index), ignore_index)",
        "labels = following(xp, labels, ignore_index)",
        "shifted, in segments",
    ),
    algebra("where is or", "labelled & where", "labelled | where", "where"),
    algebra(
        "a row bootstraps across a segment",
        "xp.where(has_next & following(xp, labelled, False), BOOTSTRAP, kind)",
        "xp.where(following(xp, labelled, False), BOOTSTRAP, kind)",
        "segments",
    ),
    algebra(
        "a token that ends an episode does not",
        "xp.where(labels == token, TERMINAL, kind)",
        "xp.where(labels == token, NO_TD, kind)",
        "tokens that end an episode",
    ),
    algebra(
        "truncated rows have no TD term",
        "xp.where(has_next, BOOTSTRAP, xp.full_like(kind, NO_TD))",
        "xp.full_like(kind, NO_TD)",
        "truncated, by sequence",
    ),
    algebra(
        "an expert's share",
        "lam / (1 - alpha) * expert",
        "lam * expert",
        "experts and agents",
    ),
    algebra(
        "an agent's share",
        "lam * alpha / (1 - alpha) ** 2 * agent",
        "lam * alpha / (1 - alpha) * agent",
        "experts and agents",
    ),
    algebra(
        "V' is the row's own value",
        "following(xp, value, 0.0) if",
        "value if",
        "plain TD rows",
    ),
    algebra("gamma is lost in delta", "q - gamma * ahead", "q - ahead", "plain TD rows"),
    algebra(
        "a gamma is lost in beta",
        "2 * loss.gamma**2 * td",
        "2 * loss.gamma * td",
        "plain TD rows",
    ),
    algebra(
        "gamma is lost in alpha",
        "alpha - 2 * loss.gamma * td * q",
        "alpha - 2 * td * q",
        "plain TD rows",
    ),
    algebra(
        "the neighbour is the row itself",
        "preceding(xp, xp.where(kind == BOOTSTRAP, loss.td, 0.0), 0.0)",
        "xp.where(kind == BOOTSTRAP, loss.td, 0.0)",
        "plain TD rows",
    ),
    algebra(
        "detach_next lost for logits",
        "if next_values is not None or detach_next:",
        "if next_values is not None:",
        "detached",
    ),
    algebra(
        "detach_next lost for values",
        "xp.zeros_like(u) if detach_next else xp.where(kind == BOOTSTRAP, u, 0.0)",
        "xp.where(kind == BOOTSTRAP, u, 0.0)",
        "values, detached",
    ),
    algebra(
        "a value without its neighbour's gradient",
        "u + preceding(xp, back, 0.0)",
        "u",
        "values",
    ),
    algebra(
        "half of beta with values",
        "xp.where(loss.td != 0, q, 0.0), 2 * loss.td",
        "xp.where(loss.td != 0, q, 0.0), loss.td",
        "values",
    ),
    algebra(
        "the sign of the entropy",
        "nll - loss.entropy_coef * xp.where",
        "nll + loss.entropy_coef * xp.where",
        "entropy",
    ),
    algebra(
        "ignored rows are never read",
        "(kind != IGNORED) | preceding(xp, kind == BOOTSTRAP, False)",
        "kind != IGNORED",
        "the gradient of an ignored row",
    ),
    Mutant(
        "algebra: a confident row's p is rounded",
        ALGEBRA,
        "a * xp.expm1(logprob) + (a + c)",
        "a * xp.exp(logprob) + c",
        f"{CASES}test_a_confident_row_in_torch[reference]",
    ),
    # --- the algebra in C++ ---
    cpu(
        "a segment ends a row late",
        "exists[static_cast<std::size_t>(begin - 1)] = 0",
        "exists[static_cast<std::size_t>(begin)] = 0",
        "ends of segments",
    ),
    cpu(
        "a position may stay",
        "call.position_ids[i + 1] == call.position_ids[i] + 1",
        "call.position_ids[i + 1] == call.position_ids[i]",
        "positions",
    ),
    cpu(
        "where is not looked at",
        "&& (!call.where || call.where[i])",
        "",
        "where",
    ),
    cpu(
        "the neighbour is lost",
        "const bool onto = !first && rows.kinds[i - 1] == bootstrap;",
        "const bool onto = first && rows.kinds[i] == bootstrap;",
        "plain TD rows",
    ),
    cpu(
        "a gamma is lost in beta",
        "2 * call.gamma * call.gamma * d",
        "2 * call.gamma * d",
        "plain TD rows",
    ),
    cpu(
        "alpha takes the row's own label",
        "masked(d, label_logit[i - 1])",
        "masked(d, label_logit[i])",
        "plain TD rows",
    ),
    cpu(
        "detach_next lost for logits",
        "onto && !call.next_values && !call.detach_next",
        "onto && !call.next_values",
        "detached",
    ),
    cpu(
        "detach_next lost for values",
        "back = kind == bootstrap && !call.detach_next ?",
        "back = kind == bootstrap ?",
        "values, detached",
    ),
    cpu(
        "a value's gradient through next values",
        "first || call.next_values ? 0.0 : back",
        "first ? 0.0 : back",
        "values and next values",
    ),
    cpu(
        "delta without log pi with values",
        "call.values ? call.values[i] + logprob : label_logit[i]",
        "call.values ? call.values[i] : label_logit[i]",
        "values",
    ),
    cpu("an expert's share", "of_expert ? d / rest :", "of_expert ? d :", "experts and agents"),
    cpu("an agent's share", "/ (rest * rest)", "/ rest", "experts and agents"),
    cpu(
        "a weight of 0 times inf",
        "d * masked(d, reward * reward)",
        "d * reward * reward",
        "garbage of weight 0",
    ),
    Mutant(
        # In double p (A + ...) + C is as exact as expm1: the sum 1 + exp, rounded to double, rules.
        "C++: a confident row's p is rounded",
        CPU,
        "a * std::expm1(logprob) + (a + c)",
        "a * static_cast<float>(std::exp(logprob)) + c",
        f"{CASES}test_a_confident_row_in_torch[native]",
    ),
    # --- the algebra in Triton ---
    triton(
        "a position may stay",
        "tl.load(position_ids + i + 1, has_next, 0) == here + 1",
        "tl.load(position_ids + i + 1, has_next, 0) == here",
        "positions",
    ),
    triton(
        "shifted labels are not",
        "tl.load(given + i + 1, has_next, 0)",
        "tl.load(given + i, has_next, 0)",
        "shifted",
    ),
    triton(
        "a row bootstraps across a segment",
        "tl.where(has_next & next_labelled, BOOTSTRAP, kind)",
        "tl.where(next_labelled, BOOTSTRAP, kind)",
        "segments",
    ),
    triton(
        "the neighbour is lost",
        "onto = before & (kind_before == BOOTSTRAP)",
        "onto = before & (kind_before == IGNORED)",
        "plain TD rows",
    ),
    triton(
        "a gamma is lost in beta",
        "2 * gamma * gamma * d_before",
        "2 * gamma * d_before",
        "plain TD rows",
    ),
    triton(
        "gamma is lost in alpha",
        "m - 2 * gamma * d_before * picked",
        "m - 2 * d_before * picked",
        "plain TD rows",
    ),
    triton(
        "detach_next lost for logits",
        "elif not (NEXT_VALUES or DETACH):",
        "elif not NEXT_VALUES:",
        "detached",
    ),
    triton(
        "detach_next lost for values",
        "slope = u\n            if not (NEXT_VALUES or DETACH):",
        "slope = u\n            if not NEXT_VALUES:",
        "values, detached",
    ),
    triton(
        "detach_next lost for next values",
        "back = tl.zeros_like(back)",
        "back = back + 0.0",
        "next values, detached",
    ),
    triton(
        "half of beta with values",
        "tl.where(d != 0.0, q, 0.0), 2 * d",
        "tl.where(d != 0.0, q, 0.0), d",
        "values",
    ),
    triton("an expert's share", "lam / rest * m", "lam * m", "experts and agents"),
    triton(
        "ignored rows are never read",
        "needed = (kind != IGNORED) | onto",
        "needed = kind != IGNORED",
        "the gradient of an ignored row",
    ),
    Mutant(
        "Triton: a confident row's p is rounded",
        TRITON,
        "a * _expm1(x) + (a + c)",
        "a * exp(x) + c",
        f"{CASES}test_a_confident_row_in_torch[triton]",
    ),
    # --- the bindings ---
    Mutant(
        "bindings: row_stats takes labels that do not lie row by row",
        BINDINGS,
        "labels = labels.contiguous()  # under",
        "labels = labels  # under",
        f"{CASES}{TRANSPOSED}[native]",
    ),
    Mutant(
        "bindings: set_label_ takes vectors that do not lie row by row",
        BINDINGS,
        "labels, elements = labels.contiguous(), elements.contiguous()",
        "labels, elements = labels, elements",
        f"{CASES}{TRANSPOSED}[native]",
    ),
    Mutant(
        "bindings: row_grad takes coefficients that do not lie row by row",
        BINDINGS,
        "a, b, c = a.contiguous(), b.contiguous(), c.contiguous()",
        "a, b, c = a, b, c",
        f"{CASES}{TRANSPOSED}[native]",
    ),
    Mutant(
        "bindings: Triton's row_stats_grad takes an alpha that does not lie row by row",
        LAUNCHES,
        "(alpha.contiguous(), beta.contiguous(), weight,",
        "(alpha, beta.contiguous(), weight,",
        f"{CASES}{TRANSPOSED}[triton]",
    ),
    Mutant(
        "bindings: Triton's set_label_ takes labels that do not lie row by row",
        LAUNCHES,
        "_planes(dlogits, labels.contiguous(), elements.contiguous())",
        "_planes(dlogits, labels, elements.contiguous())",
        f"{CASES}{TRANSPOSED}[triton]",
    ),
    binding(
        "a whole call takes labels that do not lie row by row",
        "x.detach().to(dtype).contiguous()",
        "x.detach().to(dtype)",
        "transposed labels",
    ),
    binding(
        "flags by row are read by sequence",
        "by_row = flags.shape == call.labels.shape",
        "by_row = False",
        "truncated, by row",
    ),
    binding(
        "detach_next is not handed on",
        "seen.td, seen.detach_next = bool(terms), call.detach_next",
        "seen.td, seen.detach_next = bool(terms), False",
        "detached",
    ),
    binding(
        "the items of the agents for those of the experts",
        '.def_readwrite("expert_items", &Call::expert_items)',
        '.def_readwrite("expert_items", &Call::agent_items)',
        "experts and agents, items",
    ),
    binding(
        "bootstrap is drop",
        'name == "bootstrap" ? irl::Boundary::bootstrap',
        'name == "bootstrap" ? irl::Boundary::drop',
        "the gradient of an ignored row",
    ),
    Mutant(
        "bindings: row_grad takes B for C",
        BINDINGS,
        "pointer<const float>(c), pointer<void>(dlogits), layout);",
        "pointer<const float>(b), pointer<void>(dlogits), layout);",
        f"{CASES}test_torch[native-none-entropy]",
    ),
]
