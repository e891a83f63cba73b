"""Which row follows which, and of what kind it is: every rule, and every marker of segments."""

from itertools import pairwise
from typing import Any

import pytest
import torch

import irl_ops.torch as irl
from irl_ops import algebra
from irl_ops.torch.backends import BACKENDS as BACKENDS_BY_NAME

BACKENDS = irl.available_backends()
I, T, B, N = range(4)  # IGNORED, TERMINAL, BOOTSTRAP, NO_TD  # noqa: E741
_ = -100  # no label
V = 17

RULES: dict[str, tuple[list[int], dict[str, Any], list[int]]] = {
    "the paper's boundary": ([3, 4, 5, _], {}, [B, B, T, I]),
    "a full row": ([3, 4, 5], {}, [B, B, T]),
    "a gap": ([3, _, 5], {}, [T, I, T]),
    "no labels": ([_, _], {}, [I, I]),
    "boundary bootstrap": ([3, 4, _], dict(boundary="bootstrap"), [B, B, I]),
    "boundary bootstrap, no next row": ([3, 4], dict(boundary="bootstrap"), [B, N]),
    "boundary drop": ([3, 4, _, 5], dict(boundary="drop"), [B, N, I, N]),
    "eos": ([3, 7, 5, 6], dict(eos_token_id=7), [B, T, B, N]),
    "eos, next row unlabelled": ([3, _, 7, _], dict(eos_token_id=7), [B, I, T, I]),
    "eos beats boundary": ([3, _, 5], dict(eos_token_id=7, boundary="drop"), [B, I, N]),
    "several eos": ([3, 7, 8, 6], dict(eos_token_id=[7, 8]), [B, T, T, N]),
    "several eos, as a tuple": ([3, 7, 8, _], dict(eos_token_id=(8, 7)), [B, T, T, I]),
    "eos is the ignored label": ([3, 7, 5], dict(eos_token_id=7, ignore_index=7), [B, I, N]),
    "eos without a label": (
        [3, 7, 5],
        dict(eos_token_id=7, where=[True, False, True]),
        [B, I, N],
    ),
    "truncated": ([3, 4, _], dict(truncated=True), [B, B, I]),
    "truncated, no next row": ([3, 4], dict(truncated=True), [B, N]),
    "truncated, by row": ([3, _, 4, _], dict(truncated=[False, False, True, False]), [T, I, B, I]),
    "not truncated": ([3, 4, _], dict(truncated=False), [B, T, I]),
    "eos beats truncated": ([3, 7], dict(truncated=True, eos_token_id=7), [B, T]),
    "a label ahead beats truncated": (
        [3, 4, 5],
        dict(truncated=[True, False, False], boundary="drop"),
        [B, B, N],
    ),
    "truncated beats boundary": ([3, _, 4], dict(truncated=True, boundary="drop"), [B, I, N]),
    "where": ([3, 4, 5], dict(where=[True, False, True]), [T, I, T]),
    "where and ignore_index": ([3, _, 5], dict(where=[True, True, False]), [T, I, I]),
    "ignore_index within the vocabulary": ([3, 0, 5], dict(ignore_index=0), [T, I, T]),
    "shift": ([3, 4, 5, 6], dict(shift=True), [B, B, T, I]),
    "shift, and the first label": ([_, 4, _, _], dict(shift=True), [T, I, I, I]),
    "shift, bootstrap": ([3, 4, 5, 6], dict(shift=True, boundary="bootstrap"), [B, B, B, I]),
    "shift, drop": ([3, 4, 5, 6], dict(shift=True, boundary="drop"), [B, B, N, I]),
    "shift, eos": ([3, 4, 7, 5], dict(shift=True, eos_token_id=7), [B, T, B, I]),
    "shift, eos not scored": ([7, 4, 5, 6], dict(shift=True, eos_token_id=7), [B, B, B, I]),
    "shift, truncated": ([3, 4, 5], dict(shift=True, truncated=True), [B, B, I]),
    "shift, truncated by row": (
        [3, 4, 5],
        dict(shift=True, truncated=[False, True, False]),
        [B, B, I],
    ),
    "where after the shift": (
        [3, 4, 5, 6],
        dict(shift=True, where=[True, False, True, True]),
        [T, I, T, I],
    ),
    "segments": ([3, 4, 5, 6], dict(segment_ids=[0, 0, 1, 1]), [B, T, B, T]),
    "segments, bootstrap": (
        [3, 4, 5, 6],
        dict(segment_ids=[9, 9, 2, 2], boundary="bootstrap"),
        [B, N, B, N],
    ),
    "segments, truncated": ([3, 4, 5], dict(segment_ids=[0, 0, 1], truncated=True), [B, N, N]),
    "segments, eos": ([3, 4, 7, 6], dict(segment_ids=[0, 0, 1, 1], eos_token_id=7), [B, N, T, N]),
    "segments, an id again": ([3, 4, 5], dict(segment_ids=[0, 1, 0]), [T, T, T]),
    "segments, shift": ([3, 4, 5, 6], dict(segment_ids=[0, 0, 1, 1], shift=True), [T, I, T, I]),
    "segments, shift, bootstrap": (
        [3, 4, 5, 6],
        dict(segment_ids=[0, 0, 1, 1], shift=True, boundary="bootstrap"),
        [B, I, B, I],
    ),
    "positions": ([3, 4, 5, 6], dict(position_ids=[0, 1, 0, 1]), [B, T, B, T]),
    "positions that jump": ([3, 4, 5, 6], dict(position_ids=[5, 6, 8, 9]), [B, T, B, T]),
    "positions that stay": ([3, 4, 5, 6], dict(position_ids=[0, 0, 0, 1]), [T, T, B, T]),
    "positions, shift": ([3, 4, 5, 6], dict(position_ids=[0, 1, 2, 0], shift=True), [B, T, I, I]),
    "cu_seqlens": ([3, 4, 5, 6], dict(cu_seqlens=[0, 1, 4]), [T, B, B, T]),
    "cu_seqlens, empty segments": ([3, 4, 5], dict(cu_seqlens=[0, 0, 2, 2, 3]), [B, T, T]),
    "cu_seqlens, shift": ([3, 4, 5, 6], dict(cu_seqlens=[0, 2, 4], shift=True), [T, I, T, I]),
    "one row": ([3], {}, [T]),
    "one row, shift": ([3], dict(shift=True), [I]),
    "one row, eos": ([3], dict(eos_token_id=7), [N]),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("rule", RULES)
def test_kind(rule: str, dtype: torch.dtype) -> None:
    labels, options, kinds = RULES[rule]
    tensors = {
        name: torch.tensor(option)
        if name in ("where", "truncated", "segment_ids", "position_ids", "cu_seqlens")
        else option
        for name, option in options.items()
    }
    given = torch.tensor(labels, dtype=dtype)
    assert irl.token_stats(torch.zeros(len(labels), V), given, **tensors).kind.tolist() == kinds
    if "cu_seqlens" in options:
        return
    # the same in each row of a batch, whose rows do not see each other
    batch = {
        name: x if not isinstance(x, torch.Tensor) else torch.stack([x, x])
        for name, x in tensors.items()
    }
    stats = irl.token_stats(torch.zeros(2, len(labels), V), torch.stack([given, given]), **batch)
    assert stats.kind.tolist() == [kinds, kinds]


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    logits = 2 * torch.randn(*shape, V, generator=generator)
    return logits.to(dtype).requires_grad_(), torch.randint(V, shape, generator=generator)


def run(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> tuple[float, torch.Tensor]:
    logits.grad = None
    loss = irl.iqlearn_loss(logits, labels, lam=0.3, gamma=0.9, **options)
    loss.sum().backward()
    return loss.sum().item(), logits.grad


# The same float32 arithmetic a row, summed in another order.
same = dict(rel=2**-20, abs=2**-20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("boundary", ["terminal", "bootstrap", "drop"])
@pytest.mark.parametrize("marker", ["segment_ids", "position_ids", "cu_seqlens"])
def test_packed_documents_are_separate(
    backend: str, shift: bool, boundary: str, marker: str
) -> None:
    lengths = [3, 1, 4, 2]
    logits, labels = batch(sum(lengths))
    options = dict(shift=shift, boundary=boundary, reduction="sum", backend=backend)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    markers = {
        "segment_ids": torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        "cu_seqlens": ends.int(),
    }
    loss, gradient = run(logits, labels, **options, **{marker: markers[marker]})
    total, parts = 0.0, []
    for start, end in pairwise(ends.tolist()):
        document = logits[start:end].detach().requires_grad_()
        part, part_gradient = run(document, labels[start:end], **options)
        total += part
        parts.append(part_gradient)
    assert loss == pytest.approx(total, **same)
    torch.testing.assert_close(gradient, torch.cat(parts), rtol=2**-20, atol=2**-20)
    unmarked, _ = run(logits, labels, **options)
    assert unmarked != pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(), (3,)])
def test_shifted_labels_are_those_shifted_before(backend: str, lead: tuple[int, ...]) -> None:
    logits, labels = batch(*lead, 6)
    labels[..., :2] = -100
    aligned = torch.cat([labels[..., 1:], torch.full((*lead, 1), -100)], -1)
    for boundary in ("terminal", "bootstrap", "drop"):
        options = dict(boundary=boundary, backend=backend)
        loss, gradient = run(logits, labels, shift=True, **options)
        expected, expected_gradient = run(logits, aligned, **options)
        assert loss == expected and torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_is_ignore_index(backend: str) -> None:
    logits, labels = batch(2, 5)
    where = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
    loss, gradient = run(logits, labels, where=where, backend=backend)
    masked = labels.masked_fill(~where, -100)
    expected, expected_gradient = run(logits, masked, backend=backend)
    assert loss == expected and torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)])
def test_no_rows(backend: str, shape: tuple[int, ...]) -> None:
    logits = torch.zeros(*shape, V, requires_grad=True)
    labels = torch.zeros(shape, dtype=torch.int64)
    for reduction in ("mean", "sum", "none"):
        loss, gradient = run(logits, labels, reduction=reduction, backend=backend)
        assert loss == 0 and gradient.shape == logits.shape
    assert irl.token_stats(logits, labels, backend=backend).kind.shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_leave_out_rows_that_nobody_needs(
    backend: str, entropy: bool, dtype: torch.dtype
) -> None:
    logits = torch.randn(3, V).to(dtype)
    logits[1] = torch.nan
    alpha, beta = torch.tensor([1.0, algebra.UNREAD, 2.0]), torch.ones(3)
    dlogits = torch.full_like(logits, torch.nan)
    row_max, logsum, h = BACKENDS_BY_NAME[backend].row_stats_grad(
        logits, alpha, beta, beta if entropy else None, dlogits
    )
    assert row_max[1] == logsum[1] == 0 and not dlogits[1].any()
    assert (h is not None and h[1] == 0) if entropy else h is None
    assert torch.allclose(
        (row_max + logsum)[::2], logits[::2].float().logsumexp(-1), rtol=0, atol=1e-6
    )
    assert dlogits[::2].all()
