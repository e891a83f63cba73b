"""Before the pass: ``weigh``, called by the launches that need m and d of their rows."""

import triton
import triton.language as tl

from irl_ops.algebra.triton.numbers import flag, number, sum_of
from irl_ops.algebra.triton.rows import has_td


@triton.jit
def totals(
    partial, blocks, expert_items, agent_items,
    MEAN: tl.constexpr, ITEMS: tl.constexpr, AGENT_ITEMS: tl.constexpr, EXPERT: tl.constexpr,
):  # fmt: skip
    """N of the expert's rows and of the agent's: given (ITEMS), summed (MEAN), or 1."""
    if ITEMS:
        expert = number(expert_items, 0, True, ITEMS)
        agent = number(agent_items, 0, True, AGENT_ITEMS)
    elif MEAN:
        expert, agent = sum_of(partial, blocks), 1.0
        if EXPERT:
            agent = sum_of(partial + blocks, blocks)
    else:
        expert, agent = 1.0, 1.0
    return expert, agent


@triton.jit
def weigh(
    i, inside, kind, weights, is_expert, length,
    mle, td, agent_td, above, expert_total, agent_total,
    MLE: tl.constexpr, TD: tl.constexpr, AGENT_TD: tl.constexpr, ABOVE: tl.constexpr,
    EXPERT: tl.constexpr,
):  # fmt: skip
    """m and d of the rows i; d is 0 where the loss has no TD term at all."""
    weight = tl.load(weights + i, inside, 0.0)
    expert = _share(weight, expert_total)
    agent = tl.zeros_like(weight)
    if EXPERT:
        is_of_expert = flag(is_expert, i, inside, length, EXPERT)
        agent = tl.where(is_of_expert, 0.0, _share(weight, agent_total))
        expert = tl.where(is_of_expert, expert, 0.0)
    if ABOVE:
        factor = number(above, i, inside, ABOVE)
        expert = tl.where(expert != 0.0, factor * expert, 0.0)
        agent = tl.where(agent != 0.0, factor * agent, 0.0)
    m, d = number(mle, i, inside, MLE) * expert, tl.zeros_like(weight)
    if TD:
        d = number(td, i, inside, TD) * expert
        if EXPERT:
            d += number(agent_td, i, inside, AGENT_TD) * agent
        d = tl.where(has_td(kind), d, 0.0)
    return m, d


@triton.jit
def _share(weight, total):
    return tl.where(total != 0.0, weight / tl.where(total != 0.0, total, 1.0), 0.0)
