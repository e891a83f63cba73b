"""The functions under the names of RL trainers, against the formulas that those state."""

import ast
import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from irl_ops.integrations.rl import __main__ as lines
from irl_ops.integrations.rl import nemo_rl, openrlhf, rows, slime, trl, verl
from irl_ops.torch import token_stats

V = 300  # no multiple of a power of two
CLOSE = {"rtol": 1e-5, "atol": 2e-6}  # float32 roundings of logits of a few units, by rows of 300


def batch(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(*shape, V, generator=generator)
    return logits, torch.randint(V, shape, generator=generator)


def plain(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities, 0 for a label of -100, and entropies."""
    logp = (logits / temperature).log_softmax(-1)
    picked = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels < 0, 0.0, picked), entropy(logits / temperature)


def entropy(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def agree(ours: Callable[..., Any], theirs: Callable[..., Any], *leaves: Tensor) -> None:
    """Results, and gradients of a random sum of them, by float64 autograd."""
    wide = [x.double().requires_grad_() for x in leaves]
    leaves = tuple(x.clone().requires_grad_() for x in leaves)
    got, right = (x if isinstance(x, tuple) else (x,) for x in (ours(*leaves), theirs(*wide)))
    assert len(got) == len(right)
    total, expected = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    for x, y in zip(got, right, strict=True):
        assert x.dtype == torch.float32 and x.shape == y.shape
        torch.testing.assert_close(x.double(), y, **CLOSE)
        above = torch.randn(y.shape, generator=generator)
        total, expected = total + (x * above).sum(), expected + (y * above.double()).sum()
    for x, y in zip(
        torch.autograd.grad(total, leaves), torch.autograd.grad(expected, wide), strict=True
    ):
        torch.testing.assert_close(x.double(), y, **CLOSE)


def test_from_logits() -> None:
    x, y = batch(2, 5)
    holes = y.clone()
    holes[0, 2] = -100

    def logprob(q: Tensor) -> Tensor:
        return plain(q, holes, 0.7)[0]

    agree(lambda q: trl.selective_log_softmax(q, holes, 0.7), logprob, x)
    agree(lambda q: trl.selective_log_softmax_and_entropy(q, holes), lambda q: plain(q, holes), x)
    agree(trl.entropy_from_logits, entropy, x)
    agree(trl.entropy_from_logits, entropy, x[0, 0])
    agree(lambda q: verl.logprobs_from_logits(q, holes.int()), lambda q: plain(q, holes)[0], x)
    agree(lambda q: openrlhf.log_probs_from_logits(q, holes, 0.7), logprob, x)
    agree(openrlhf.compute_entropy, entropy, x)
    _, constant = trl.selective_log_softmax_and_entropy(x.requires_grad_(), y, False)
    assert not constant.requires_grad


def test_several_tokens_a_row() -> None:
    x, y = batch(2, 3)
    index = torch.stack([y, y.flip(0), y], -1)  # the first one twice
    agree(
        lambda q: trl.selective_log_softmax(q, index, 2.0),
        lambda q: (q / 2.0).log_softmax(-1).gather(-1, index),
        x,
    )
    mask = torch.rand(index.shape) < 0.5
    masked = trl.selective_log_softmax(x, index, row_mask=mask.long())
    assert torch.equal(masked != 0, mask)


def test_rows_that_a_mask_leaves_out() -> None:
    x, y = batch(2, 5)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])
    spoiled = x.masked_fill(mask[..., None] == 0, math.nan).requires_grad_()
    outputs = trl.selective_log_softmax_and_entropy(spoiled, y, temperature=0.7, row_mask=mask)
    for ours, right in zip(outputs, plain(x, y, 0.7), strict=True):
        torch.testing.assert_close(ours, torch.where(mask == 0, 0.0, right), **CLOSE)
    (gradient,) = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), spoiled)
    assert gradient.isfinite().all() and not gradient[mask == 0].any()
    alone = trl.selective_log_softmax(spoiled, y, 0.7, mask)
    torch.testing.assert_close(alone, outputs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_from_0(dtype: torch.dtype) -> None:
    """Never above 0, never NaN: a sharp row, and logits that all lie far below 0."""
    x, y = batch(2, 5)
    x[0] *= 50
    x[1] -= 2e4
    x = x.to(dtype).requires_grad_()
    for function in (trl.selective_log_softmax, verl.logprobs_from_logits):
        logprob = function(x, y)
        assert (logprob <= 0).all() and logprob.dtype == torch.float32
        torch.testing.assert_close(logprob.double(), plain(x.double(), y)[0], rtol=1e-5, atol=1e-5)
    spread = trl.entropy_from_logits(x)
    assert ((spread >= 0) & (spread <= math.log(V) + 1e-6)).all()
    (gradient,) = torch.autograd.grad(logprob.sum() + spread.sum(), x)
    assert gradient.isfinite().all()


def layer(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(*shape, 12, generator=generator)
    weight = torch.randn(V, 12, generator=generator)
    return hidden, weight, torch.randint(V, shape, generator=generator)


def test_from_hidden_states() -> None:
    hidden, weight, y = layer(2, 5)
    flat = y.reshape(-1)
    agree(
        lambda h, w: verl.FusedLinearForPPO(chunk_size=3)(h, w, y.int(), temperature=0.7),
        lambda h, w: plain(h @ w.T, y, 0.7),
        hidden, weight,
    )  # fmt: skip
    for reduction, reduce in {"none": lambda x: x, "sum": Tensor.sum, "mean": Tensor.mean}.items():

        def right(h: Tensor, w: Tensor, reduce: Any = reduce) -> tuple[Tensor, Tensor]:
            logprob, spread = plain(h.reshape(-1, 12) @ w.T, flat, 1.5)
            return reduce(logprob), spread

        agree(
            lambda h, w, how=reduction: verl.linear_cross_entropy(h, w, y, 1.5, how, None),
            right, hidden, weight,
        )  # fmt: skip
    with pytest.raises(ValueError, match="reduction is 'max'"):
        verl.linear_cross_entropy(hidden, weight, y, reduction="max")


def test_slime() -> None:
    x, y = batch(6)
    keep = x > 0.5
    assert not keep.gather(-1, y[:, None]).all()  # tokens that the mask leaves out, and still count

    def right(q: Tensor) -> tuple[Tensor, Tensor]:
        kept = keep.scatter(-1, y[:, None], True)
        filtered = q.masked_fill(~kept, -math.inf).logsumexp(-1)
        return (q.gather(-1, y[:, None])[:, 0] - filtered)[:, None], plain(q, y)[1]

    function = slime.calculate_log_probs_and_entropy
    agree(lambda q: function(q, y, None, True, 4, keep), right, x)
    agree(lambda q: function(q, y, None, True), lambda q: (plain(q, y)[0][:, None], right(q)[1]), x)
    assert function(x, y, None)[1] is None
    for mask in (None, keep):
        _, constant = function(x.clone().requires_grad_(), y, None, True, -1, mask, False)
        assert constant is not None and not constant.requires_grad
    logprob, spread = function(x[:0], y[:0], None, with_entropy=True)
    assert spread is not None and logprob.shape == spread.shape == (0,)


def nucleus(q: Tensor, top_k: int, top_p: float) -> list[int]:
    """The columns that vLLM's filters keep: the top_k, and of those the fewest that hold top_p."""
    order = q.argsort(descending=True).tolist()[: top_k if top_k > 0 else None]
    mass, kept = 0.0, []
    for j, p in zip(order, q[order].double().softmax(-1).tolist(), strict=True):
        if kept and mass >= top_p:
            break
        kept.append(j)
        mass += p
    return kept


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (20, 1.0), (-1, 0.8), (20, 0.8)])
def test_nemo_rl_from_logits(top_k: int, top_p: float) -> None:
    x, target = batch(2, 6)
    target[:, 1:] = x[:, :-1].argmax(-1)  # what a filter keeps
    sampling = SimpleNamespace(top_k=top_k, top_p=top_p)

    def right(q: Tensor) -> Tensor:
        filtered = torch.full_like(q, -math.inf)
        for b in range(2):
            for t in range(6):
                kept = nucleus(x[b, t], top_k, top_p)
                filtered[b, t, kept] = q[b, t, kept]
        return filtered.log_softmax(-1)[:, :-1].gather(-1, target[:, 1:, None])[..., 0]

    agree(
        lambda q: nemo_rl.from_parallel_logits_to_logprobs(
            q, target, 0, V, None, chunk_size=2, sampling_params=sampling
        ),
        right, x,
    )  # fmt: skip


def test_nemo_rl_pads_and_refuses() -> None:
    x, target = batch(2, 6)
    function = nemo_rl.from_parallel_logits_to_logprobs
    short = function(x, target[:, :4], 0, V, None)
    torch.testing.assert_close(short, function(x, target, 0, V, None)[:, :3])
    assert not function(x.requires_grad_(), target, 0, V, None, inference_only=True).requires_grad
    with pytest.raises(ValueError, match="as there are columns here, 300"):
        function(x, target, 0, V - 1, None)
    two = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    with pytest.raises(NotImplementedError, match="cp_group has 2 processes"):
        function(x, target, 0, V, None, cp_group=two)


def test_nemo_rl_from_hidden_states() -> None:
    hidden, weight, target = layer(2, 5)
    function = nemo_rl.from_parallel_hidden_states_to_logprobs
    agree(
        lambda h, w: function(h.transpose(0, 1), w, False, target, 0, V, None, chunk_size=3),
        lambda h, w: plain(h[:, :-1] @ w.T, target[:, 1:])[0],
        hidden, weight,
    )  # fmt: skip
    with pytest.raises(ValueError, match="as there are columns here, 300"):
        function(hidden, weight, False, target, 0, V + 1, None)
    two = SimpleNamespace(size=lambda: 2)
    with pytest.raises(NotImplementedError, match="cp_group has 2 processes"):
        function(hidden, weight, False, target, 0, V, None, cp_group=two)


def test_bad_labels_and_temperatures() -> None:
    x, y = batch(2, 5)
    for function in (trl.selective_log_softmax, verl.logprobs_from_logits):
        with pytest.raises(IndexError, match=r"labels\[0, 0\]"):
            function(x, torch.full_like(y, V))
    with pytest.raises(ValueError, match="temperature is 0"):
        trl.selective_log_softmax(x, y, 0.0)
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        weight = torch.zeros(V, 4)
        weight.ds_id = 1  # type: ignore[attr-defined]
        trl.ChunkedLogProbFunction.apply(torch.zeros(2, 4), weight, None, y[0, :2], 1.0, 8)


def test_groups_are_passed_on() -> None:
    """As vocab_group; a version without it says so."""
    two = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    assert rows.columns(None) == {}
    assert rows.columns(SimpleNamespace(size=lambda: 1)) == {}
    assert rows.columns(two, 5) == {"vocab_group": two, "vocab_start": 5}
    if "vocab_group" not in inspect.signature(token_stats).parameters:
        x, y = batch(2)
        with pytest.raises(TypeError, match="vocab_group"):
            slime.calculate_log_probs_and_entropy(x, y, two)


@pytest.mark.parametrize("project", lines.LINES)
def test_lines_name_what_there_is(project: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines.main([project]) == 0
    tree = ast.parse(capsys.readouterr().out)
    (ours,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("irl_ops")
    )
    module = {"nemo-rl": nemo_rl, "tunix": None}.get(
        project, {"trl": trl, "verl": verl, "slime": slime, "openrlhf": openrlhf}.get(project)
    )
    named = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == ours.names[0].asname
    }
    assert named
    assert module is None or all(hasattr(module, name) for name in named)


def test_lines_of_a_project_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines.main(["ppo"]) == 2
    assert "accepted: one of trl, verl" in capsys.readouterr().err


def test_the_command_prints_lines_without_the_projects() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "irl_ops.integrations.rl", "trl"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "trl_utils.selective_log_softmax = irl_trl.selective_log_softmax" in done.stdout


@pytest.mark.parametrize("project", lines.LINES)
def test_the_page_shows_the_lines_that_are_printed(
    project: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "rl.md"
    lines.main([project])
    assert f"```python\n{capsys.readouterr().out}```" in page.read_text(encoding="utf-8")
