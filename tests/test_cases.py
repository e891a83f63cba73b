"""The random batches: most of them reach what they are meant to test."""

from collections import Counter

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from . import naive
from .cases import Case, cases

# Of 400 batches. A share of TD rows is what caught, or missed, a term that was left out.
AT_LEAST = {
    "some row has a weight": 0.7,
    "a TD term": 0.45,
    "V of a row's own neighbour": 0.2,
    "its gradient, at once": 0.1,  # not float16, whose gradient waits, nor reduction "none"
}


def reached(case: Case) -> set[str]:
    logits = torch.zeros(case.logits.shape, dtype=torch.float64)
    _, batch = naive.loss(case.name, logits, case.labels, **case.options)
    rows = [row for sequence in batch for row in sequence]
    options = case.options
    found = set()
    if any(row.m != 0 or row.d != 0 for row in rows):
        found.add("some row has a weight")
    if any(row.d != 0 for row in rows):
        found.add("a TD term")
    onto = any(row.d != 0 and row.kind == naive.BOOTSTRAP for row in rows)
    heads = options.get("values") is not None or options.get("next_values") is not None
    if onto and not heads and options["gamma"] > 0:
        found.add("V of a row's own neighbour")
        at_once = options["reduction"] != "none" and case.leaf.dtype != torch.float16
        if at_once and not options["detach_next"]:
            found.add("its gradient, at once")
    return found


def test_most_batches_reach_the_td_term() -> None:
    counted: Counter[str] = Counter()

    @seed(0)
    @settings(
        max_examples=400,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases())
    def count(case: Case) -> None:
        counted.update([*reached(case), "all"])

    count()
    shares = {name: counted[name] / counted["all"] for name in AT_LEAST}
    assert all(share >= AT_LEAST[name] for name, share in shares.items()), shares
