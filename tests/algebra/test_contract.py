"""The algebra's stages in C++ are those of irl_ops.algebra: stage by stage, on random rows.

The Triton form is held to the same in test_triton_losses.py.
"""

from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irl_ops import _native, algebra
from irl_ops.algebra import NO_EDGE, Heads, Sequence, Terms, Weighting
from irl_ops.torch.native_call import Fields, contiguous

from ..cases import sequences

VOCAB = 5
METRICS = ("nll", "value", "entropy", "td", "reward", "accuracy", "z", "tokens")


def numpy(x: Any) -> Any:
    """Records and arrays as the array form takes them: float64."""
    if isinstance(x, Tensor):
        return (x.double() if x.is_floating_point() else x).numpy()
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(numpy, x))
    return x


@st.composite
def calls(draw: Any) -> tuple[Tensor, Sequence, Weighting, Terms, Heads, Any]:
    """Every record, with each of its options there or not."""
    lead = draw(st.sampled_from([(), (3,)]))
    labels, options = draw(sequences(VOCAB, lead, draw(st.sampled_from([1, 4, 9]))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    flags = st.booleans()

    def rows(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(labels.shape, generator=generator)

    def number(of: float) -> Any:
        return rows() if draw(flags) and draw(flags) else of

    ends = options.pop("eos_token_id")
    ends = (ends,) if isinstance(ends, int) else None if ends is None else tuple(ends)
    items = draw(st.sampled_from([None, (3.0, 7.5), (0.0, 2.0)]))
    weighting = Weighting(
        rows().abs() * (rows() < 0.8) if draw(flags) else None,
        items,
        "mean" if items or draw(flags) else "sum",
    )
    with_td, with_expert = draw(st.sampled_from([True, True, False])), draw(flags)
    terms = Terms(
        mle=number(1.0),
        td=number(0.3) if with_td else None,
        agent_td=number(0.2),
        is_expert=rows() < 0.5 if with_expert else None,
        gamma=draw(st.sampled_from([0.0, 0.9, 1.0])),
        entropy_coef=draw(st.sampled_from([None, 0.2])),
        z_loss=draw(st.sampled_from([None, 0.1])),
    )
    heads = Heads(rows(3) if draw(flags) else None, rows(3) if draw(flags) else None, draw(flags))
    above = draw(st.sampled_from([None, -2.0])) if draw(flags) else rows()
    return labels, Sequence(eos_token_id=ends, **options), weighting, terms, heads, above


@settings(max_examples=300)
@given(calls())
def test_every_stage_in_cpp(call: Any) -> None:
    labels, sequence, weighting, terms, heads, above = call
    generator = torch.Generator().manual_seed(1)
    row_max, logsum, label_logit, entropy = (
        torch.rand((4, *labels.shape), generator=generator).double().numpy()
    )
    entropy = None if terms.entropy_coef is None else entropy

    fields = Fields(labels.shape)
    fields.sequence(sequence)
    fields.weighting(weighting)
    fields.terms(terms)
    fields.heads(heads)
    flat = [
        [] if x is None else x.ravel().tolist() for x in (row_max, logsum, label_logit, entropy)
    ]
    factor, factors = (1.0, above) if isinstance(above, Tensor) else (above or 1.0, None)
    rows = contiguous(labels, torch.int64)
    seen = _native.stages(
        fields.call,
        rows.data_ptr(),
        labels.shape,
        factor,
        0 if factors is None else factors.data_ptr(),
        VOCAB,
        *flat,
    )

    rows = algebra.align(xp, labels.numpy(), VOCAB, numpy(sequence))
    given = numpy(weighting)
    if given.token_weights is None:
        given = given._replace(token_weights=np.ones(labels.shape))
    with np.errstate(all="ignore"):
        loss = algebra.weigh(xp, rows.kind, numpy(terms), given, numpy(above))
        told = algebra.coefficients(xp, rows.kind, loss, label_logit, numpy(heads), NO_EDGE)
        stats = algebra.statistics(xp, rows.labels, row_max, logsum, label_logit, entropy)
        done = algebra.finish(xp, rows, loss, told, stats, numpy(heads))
        dvalues, dnext_values = algebra.head_gradients(
            xp, rows.kind, loss, done.slope, numpy(heads)
        )
        total, metrics = algebra.total(xp, rows.kind, loss, done)
        per_row = algebra.row_losses(xp, loss, done.stats, done.step)

    def same(name: str, expected: Any, where: Any = True) -> None:
        actual = np.asarray(seen[name], dtype=float).reshape(labels.shape)
        # alpha, beta and what they enter are rounded to float32 on their way to a kernel
        close = np.isclose(actual, np.asarray(expected, float), rtol=1e-5, atol=1e-5)
        assert (close | ~np.broadcast_to(where, labels.shape)).all(), name

    labelled = rows.kind != algebra.IGNORED
    same("labels", rows.labels)
    same("kind", rows.kind)
    same("mle", loss.mle)
    same("alpha", told.alpha)
    same("beta", told.beta)
    if terms.entropy_coef is not None:
        same("entropy_weight", told.entropy_weight)
    same("value", done.step.value)
    same("logprob", done.stats.logprob)
    same("next_value", done.step.next_value)
    same("reward", done.step.reward)
    if terms.td is not None:
        same("td", loss.td)
        same("slope", done.slope)
    same("element", done.element, where=labelled)
    same("row_losses", per_row)
    if dvalues is not None:
        same("dvalues", dvalues)
    if dnext_values is not None:
        same("dnext_values", dnext_values)
    summed = dict(zip(("loss", *METRICS), seen["total"], strict=True))
    for name, expected in {"loss": total, **metrics}.items():
        assert np.isclose(summed[name], expected, rtol=1e-5, atol=1e-5), name
