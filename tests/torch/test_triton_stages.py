"""The algebra's stages in Triton against those on arrays, and whole calls that cross blocks."""

from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import irl_ops.torch as irl
from irl_ops import algebra, terms
from irl_ops.call import Call, read_loss
from irl_ops.kernels import reference
from irl_ops.options import IQLearnOptions, OnlineOptions
from irl_ops.torch import triton, triton_loss
from irl_ops.torch.arguments import arguments

from ..cases import EPS, Case, cases, check, number

pytest.importorskip("triton", reason="needs Triton, which is published for Linux alone")


@pytest.mark.parametrize("block", [1, 2])
def test_across_blocks(block, monkeypatch):
    monkeypatch.setattr(triton_loss, "BLOCK", block)

    @settings(max_examples=8)
    @given(cases())
    def property_of(case: Case) -> None:
        check(lambda *given, **opt: getattr(irl, case.name)(*given, **opt, backend="triton"), case)

    property_of()


def numpy(x: Any) -> Any:
    """A record as the float64 form takes it."""
    if isinstance(x, Tensor):
        return (x.double() if x.is_floating_point() else x).numpy()
    if isinstance(x, tuple):
        fields = [numpy(field) for field in x]
        return type(x)(*fields) if hasattr(x, "_fields") else tuple(fields)
    return x


class Seen:
    """What each launch is given, by the names of its parameters."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.launches: list[str] = []
        self.of: dict[str, dict[str, Any]] = {}
        found = {"stage": triton_loss.stage, "_kernel": triton._kernel}

        def watch(where: Any, lookup: str) -> None:
            def watched(module: str, function: str | None = None) -> Any:
                return Watched(self, found[lookup](module, function or module), function or module)

            patch.setattr(where, lookup, watched)

        watch(triton_loss, "stage")
        watch(triton, "_kernel")


class Watched:
    """A kernel under watch."""

    def __init__(self, seen: Seen, kernel: Any, name: str) -> None:
        self.seen, self.kernel, self.name = seen, kernel, name

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.kernel[grid](*arguments, **constants)
            self.seen.launches.append(self.name)
            self.seen.of[self.name] = dict(zip(self.kernel.arg_names, arguments, strict=False))

        return launch


@st.composite
def calls(draw: Any) -> tuple[Call, Case, Tensor | None]:
    """Records of a call with every kind of number, and a gradient from above."""
    names = ("iqlearn_loss", "online_iqlearn_loss")
    case = draw(cases(names=names, garbage=False, readout=False))  # which no stage knows
    case.leaf = case.leaf.float()
    case.options["z_loss"] = number(draw, 0.0, 0.2)
    options, shape = dict(case.options), case.labels.shape
    is_expert = options.pop("is_expert", None)
    function = terms.iqlearn if is_expert is None else terms.online_iqlearn
    group = IQLearnOptions if is_expert is None else OnlineOptions
    call = read_loss(
        case.name, group, arguments, function, case.logits, case.labels, options, True, is_expert
    )
    for name in ("mle", "td", "agent_td"):
        if draw(st.integers(0, 2)) == 0:
            call = call._replace(terms=call.terms._replace(**{name: torch.rand(shape)}))
    if draw(st.integers(0, 3)) == 0:
        call = call._replace(terms=call.terms._replace(td=None), heads=algebra.Heads())
    above = draw(st.sampled_from([None, torch.tensor(-0.3), torch.randn(shape)]))
    return call, case, above


def close(actual: Any, expected: Any, size: float) -> None:
    """Within a few roundings of numbers that are up to ``size`` large; exactly where infinite."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(expected)
    assert np.array_equal(actual[~finite], expected[~finite])
    actual, expected = actual[finite], expected[finite]
    assert (np.abs(actual - expected) <= EPS * (size + np.abs(expected))).all()


@settings(max_examples=25)
@given(drawn=calls(), block=st.sampled_from([1, 2, 256]))
def test_every_stage_is_that_of_the_algebra(drawn: Any, block: int) -> None:
    """From the same inputs the same outputs: those of align, coefficients, finish and total.

    A row that is read although nobody needs it changes no result, so -inf as alpha has to be in the
    same rows. What weigh gives stands in alpha, beta and entropy_weight, and in the losses.
    """
    call, case, above = drawn
    logits = case.logits.contiguous()
    shape, vocab, n = case.labels.shape, logits.shape[-1], case.labels.numel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_loss, "BLOCK", block)
        seen = Seen(patch)
        dlogits = torch.empty_like(logits)
        out = triton_loss.loss(call, logits, case.labels, dlogits, above)

    sequence, weighting, heads = map(numpy, (call.sequence, call.weighting, call.heads))
    if weighting.token_weights is None:
        weighting = weighting._replace(token_weights=np.ones(shape))
    above = None if above is None else numpy(above)
    rows = algebra.align(xp, case.labels.numpy(), vocab, sequence)
    given_labels = seen.of["align"]
    assert np.array_equal(given_labels["labels"].view(shape), rows.labels)
    assert np.array_equal(given_labels["kinds"].view(shape), rows.kind)
    picked = reference.label_logit(logits.double().numpy(), rows.labels)
    assert np.array_equal(given_labels["label_logit"][:n].view(shape), picked)

    loss = algebra.weigh(xp, rows.kind, numpy(call.terms), weighting, above)
    expected = algebra.coefficients(xp, rows.kind, loss, picked, heads, algebra.NO_EDGE)
    finite = [x[np.isfinite(x)] for x in (logits.double().numpy(), heads.values, heads.next_values)
              if x is not None]  # fmt: skip
    largest = 1 + sum(np.abs(x).max(initial=0.0) for x in finite)
    weight = np.abs(loss.mle).max() + (0.0 if loss.td is None else np.abs(loss.td).max())
    actual = seen.of["coefficients"]
    close(actual["alpha"][:n].view(shape), expected.alpha, 4 * weight * largest)
    close(actual["beta"][:n].view(shape), expected.beta, 2 * weight)
    assert (actual["entropy_weight"] is None) == (expected.entropy_weight is None)
    if expected.entropy_weight is not None:
        close(actual["entropy_weight"][:n].view(shape), expected.entropy_weight, weight)

    # the same statistics and coefficients for both, so that one stage is compared and no kernel
    given_stats = seen.of["finish"]
    row_max, logsum, entropy, alpha, beta, entropy_weight = (
        None if given_stats[name] is None else numpy(given_stats[name][:n].view(shape))
        for name in ("row_max", "logsum", "entropy", "alpha", "beta", "entropy_weight")
    )
    stats = algebra.statistics(xp, rows.labels, row_max, logsum, picked, entropy)
    told = algebra.Coefficients(alpha, beta, entropy_weight)
    done = algebra.finish(xp, rows, loss, told, stats, heads)
    size = largest + np.log(vocab)
    good = rows.labels != algebra.NO_LABEL
    at = np.take_along_axis(dlogits.numpy(), np.clip(rows.labels, 0, None)[..., None], -1)[..., 0]
    kappa = abs(float(call.terms.entropy_coef or 0.0))
    zeta = abs(float(call.terms.z_loss or 0.0))
    close(at[good], done.element[good], 16 * weight * size * (1 + kappa + zeta))
    dvalues, dnext_values = algebra.head_gradients(xp, rows.kind, loss, done.slope, heads)
    for ours, theirs in ((out.dvalues, dvalues), (out.dnext_values, dnext_values)):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            close(ours, theirs, 8 * weight * size)

    total, metrics = algebra.total(xp, rows.kind, loss, done)
    per_row = algebra.row_losses(xp, loss, done.stats, done.step)
    size = 8 * n * weight * size**2 * (1 + kappa + zeta)
    close(out.loss, per_row if weighting.reduction == "none" else total, size)
    assert out.metrics is not None and list(out.metrics) == list(metrics)
    for name, mean in metrics.items():
        close(out.metrics[name], mean, 16 * largest**2 + 16 * np.log(vocab) ** 2)


LOGITS, LABELS = torch.randn(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])


@pytest.mark.parametrize("options", [{}, dict(entropy_coef=0.1, z_loss=0.1, return_metrics=True)])
def test_five_launches_with_a_gradient_and_four_without(options, monkeypatch):
    seen = Seen(monkeypatch)
    irl.iqlearn_loss(LOGITS, LABELS, backend="triton", **options)
    assert seen.launches == ["align", "row_stats", "finish", "total"]
    seen.launches.clear()
    irl.iqlearn_loss(LOGITS.clone().requires_grad_(), LABELS, backend="triton", **options)
    assert seen.launches == ["align", "coefficients", "row_stats_grad", "finish", "total"]


def test_rows_whose_strides_do_not_fold(monkeypatch):
    """The elements at the labels take launches of their own, one for each set of views."""
    leaf = torch.randn(3, 2, 4, 2, 7)
    logits, labels = leaf[:, :, :3].movedim(3, 1), torch.randint(7, (3, 2, 2, 3))
    values, gradients = torch.ones(3, 2, 2, 3), []
    for backend in ("triton", "reference"):
        seen = Seen(monkeypatch)
        given_logits = logits.detach().requires_grad_()
        assert not given_logits.is_contiguous()
        irl.iqlearn_loss(given_logits, labels, backend=backend, values=values).backward()
        gradients.append(given_logits.grad)
        assert backend != "triton" or "set_label" in seen.launches
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 67])
def test_vectors_are_aligned_whatever_n_is(n, monkeypatch):
    """Another alignment would be another compiled variant."""
    seen = Seen(monkeypatch)
    logits = torch.randn(n, 5, requires_grad=True)
    irl.iqlearn_loss(logits, torch.zeros(n, dtype=torch.long), backend="triton", entropy_coef=0.1)
    vectors = [x for x in seen.of["finish"].values() if isinstance(x, Tensor) and x.dim() == 1]
    assert len(vectors) >= 8
    base = vectors[2].untyped_storage().data_ptr()
    assert all((x.data_ptr() - base) % 16 == 0 for x in vectors if x.dtype == torch.float32)


@pytest.mark.parametrize("blocks", [1, 1024, 3000])
def test_sums_over_many_blocks(blocks):
    """More than the 1024 that are added up at once."""
    sums = torch.rand(10, blocks, generator=torch.Generator().manual_seed(0))
    sums[8:] *= 3
    loss, means = torch.empty(()), torch.empty(8)
    triton_loss.stage("total", "total")[(1,)](sums, blocks, loss, means)
    summed, *rest, tokens, with_td = sums.double().sum(1).tolist()
    rest = [x / (with_td if k in (3, 4) else tokens) for k, x in enumerate(rest)]
    # NumPy adds a block up in pairs: a rounding for each of its ten levels, and for each block
    assert [loss.item(), *means.tolist()] == pytest.approx(
        [summed, *rest, tokens], rel=16 * 2.0**-24
    )


@pytest.mark.parametrize(
    ("offsets", "good"),
    [([0, 2, 6], True), ([0, 2, 2, 6], True), ([0, 6], True), ([2, 2, 2], False), ([1, 6], False),
     ([0, 4, 3, 6], False), ([0, 5], False), ([0, 7], False), ([], False)],
)  # fmt: skip
def test_offsets_that_are_none_make_every_label_bad(offsets, good):
    """A CPU refuses them beforehand; elsewhere the launch alone sees them."""
    labels = torch.tensor([0, 1, 2, -100, 3, 0])
    found, kinds = torch.empty(6, dtype=torch.int64), torch.empty(6, dtype=torch.int8)
    picked, weights = torch.empty(6), torch.empty(6)
    marks = torch.tensor(offsets, dtype=torch.int32)
    logits = torch.arange(24.0).view(1, 6, 4)
    triton_loss.stage("rows", "align")[(2,)](
        labels, None, marks, None, None, None, logits, 6, 6, 4, -100, len(offsets), 6, 24, 4,
        found, kinds, weights, picked, torch.empty(2, 2),
        SHIFT=False, EOS=(), BOUNDARY="terminal", WHERE=False, MARKS="cu_seqlens", WEIGHTS=False,
        TRUNCATED=0, EXPERT=0, MEAN=True, PICK=True, BLOCK=4,
    )  # fmt: skip
    sequence = algebra.Sequence(cu_seqlens=marks.numpy())
    rows = algebra.align(xp, labels.numpy(), 4, sequence)
    assert np.array_equal(found, rows.labels)
    labelled = labels != -100
    assert not picked[labelled].isnan().any() if good else picked[labelled].isnan().all()
    assert picked[3] == 0
    if good:
        assert np.array_equal(kinds, rows.kind)
