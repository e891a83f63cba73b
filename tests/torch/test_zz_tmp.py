"""Statistics with all that they can be asked for, of logits cut among processes."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from irl_ops.torch.token_fields import TokenStats

from ..cases import Case
from ..measure_cases import Found, check, measure_cases
from .ranks import Ranks
from .split import Split, dense_outcome, jobs, outputs, splits


def run(ranks: Ranks, split: Split) -> Any:
    """``measure_cases.check``'s way to compute statistics: on several processes."""

    def compute(_: Any, case: Case) -> Found:
        above = [case.upstream.get(name) for name in TokenStats._fields]
        sent = jobs("token_stats", case, split, above)
        answers = ranks.run(sent)
        fields = dict(zip(TokenStats._fields, outputs(split, answers), strict=True))
        found = dense_outcome(split, case, sent, answers)
        return Found(fields, found.logits, found.values, found.next_values)

    return compute


@given(data=st.data())
@settings(max_examples=400)
def test_everything(ranks: Ranks, data: Any) -> None:
    case = data.draw(measure_cases())
    split = data.draw(splits(tuple(case.labels.shape), case.logits.shape[-1]))
    check(None, case, run(ranks, split))
