"""Breaks of the algebra in Triton."""

from .mutant import CASES, STAGES_IN_TRITON, TRITON, Mutant, triton

MUTANTS = [
    triton(
        "a position may stay",
        "here += 1",
        "here += 0",
        "positions",
    ),
    triton(
        "shifted labels are not",
        "tl.load(given + i + 1, has_next, 0).to(",
        "tl.load(given + i, has_next, 0).to(",
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
        "onto = before & (kind_before == BOOTSTRAP)  # row i - 1",
        "onto = before & (kind_before == IGNORED)  # row i - 1",
        "plain TD rows",
    ),
    triton(
        "a gamma is lost in beta",
        "b += 2 * discount * discount * d_before",
        "b += 2 * discount * d_before",
        "plain TD rows",
    ),
    triton(
        "z_loss is lost in beta",
        "b = 2 * number(z_loss, 0, True, Z) * m",
        "b = 0.0 * m",
        "z_loss",
    ),
    triton(
        "the gradient from above is ignored",
        "expert = tl.where(expert != 0.0, factor * expert, 0.0)",
        "expert = expert + 0.0",
        "plain TD rows",
        "none",
    ),
    triton(
        "the neighbour's weight is the row's own",
        "i - 1, before, kind_before, weights, is_expert, length, mle, td, agent_td, above,",
        "i, before, kind_before, weights, is_expert, length, mle, td, agent_td, above,",
        "weights, int32 labels",
    ),
    triton(
        "alpha takes the row's own label",
        "picked = tl.load(label_logit + i - 1, before, 0.0)",
        "picked = tl.load(label_logit + i, before, 0.0)",
        "plain TD rows",
    ),
    triton(
        "gamma is lost in alpha",
        "a -= 2 * discount * d_before *",
        "a -= 2 * d_before *",
        "plain TD rows",
    ),
    triton(
        "detach_next lost for logits",
        "elif TD and not (NEXT_VALUES or DETACH):",
        "elif TD and not NEXT_VALUES:",
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
        "b += 2 * d\n",
        "b += d\n",
        "values",
    ),
    triton(
        "the agent's rows have the expert's TD weight",
        "number(agent_td, i, inside, AGENT_TD) * agent",
        "number(td, i, inside, TD) * agent",
        "experts and agents",
    ),
    triton(
        "the agent's rows are averaged over the expert's",
        "_share(weight, agent_total)",
        "_share(weight, expert_total)",
        "experts and agents, items",
    ),
    triton(
        "ignored rows are never read",
        "tl.where((kind != IGNORED) | onto, a, -INF)",
        "tl.where(kind != IGNORED, a, -INF)",
        "the gradient of an ignored row",
    ),
    Mutant(
        "Triton: the mean reward counts rows without a TD term",
        TRITON,
        "with_td if k == 3 or k == 4 else tokens",
        "with_td if k == 3 else tokens",
        STAGES_IN_TRITON,
    ),
    Mutant(
        "Triton: a confident row's p is rounded",
        TRITON,
        "finite * _expm1(x) + (finite + c)",
        "finite * exp(x) + c",
        f"{CASES}test_a_confident_row_in_torch[triton]",
    ),
]
