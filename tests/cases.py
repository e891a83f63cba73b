"""Random batches for the losses, and how closely a result has to agree with `naive`."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from . import naive

DEVICE = os.environ.get("IRL_OPS_TEST_DEVICE", "cpu")  # where what is under test computes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOSSES = ("iqlearn_loss", "iqlearn_loss", "online_iqlearn_loss", "mle_loss")  # as often as that
VOCABS = (17, 17, 2, 64, 131, 1)

# Each term goes through a handful of float32 roundings.
EPS = 8 * 2.0**-24
# Half a unit in the last place relative to the number, and the half of the smallest subnormal.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}

LAYOUTS: dict[str, tuple[Callable[..., tuple[int, ...]], Callable[[Tensor], Tensor]]] = {
    "contiguous": (lambda *s: s, lambda x: x),
    "[T, B, V]": (lambda *s: (s[-2], *s[:-2], s[-1]), lambda x: x.movedim(0, -2)),
    "padded columns": (lambda *s: (*s[:-1], s[-1] + 3), lambda x: x[..., 1:-2]),
    "padded rows": (lambda *s: (*s[:-2], s[-2] + 1, s[-1]), lambda x: x[..., :-1, :]),
    "every other column": (lambda *s: (*s[:-1], 2 * s[-1]), lambda x: x[..., ::2]),
    "[V, T]": (lambda *s: (*s[:-2], s[-1], s[-2]), lambda x: x.mT),
}


@dataclass
class Case:
    """The arguments of one call; ``view(leaf)`` are the logits."""

    name: str
    leaf: Tensor
    view: Callable[[Tensor], Tensor]
    labels: Tensor
    options: dict[str, Any]
    upstream: Any  # gradient of the loss: a number, or a tensor for reduction "none"

    @property
    def logits(self) -> Tensor:
        return self.view(self.leaf)


def packing(draw: Any, lead: tuple[int, ...], length: int) -> dict[str, Tensor]:
    """Markers of segments, or none."""
    kinds = ["", "", "segment_ids", "position_ids"] + ["cu_seqlens"] * (lead == ())
    kind = draw(st.sampled_from(kinds))
    if not kind:
        return {}
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    count = math.prod(lead)
    starts = [[True, *(rarely(draw, 3) for _ in range(length - 1))] for _ in range(count)]
    if kind == "cu_seqlens":
        ends = [t for t in range(length) if starts[0][t]] + [length]
        if draw(st.booleans()):
            ends = sorted([*ends, draw(st.sampled_from(ends))])  # an empty segment
        return {kind: torch.tensor(ends, dtype=dtype)}
    rows = []
    for sequence in starts:
        row, current = [], -1
        for start in sequence:
            if kind == "segment_ids":
                current = current + 1 if start else current
            else:
                current = 0 if start else current + 1
            row.append(current)
        rows.append(row)
    return {kind: torch.tensor(rows, dtype=dtype).reshape(*lead, length)}


@st.composite
def sequences(draw: Any, vocab: int, lead: tuple[int, ...], length: int) -> tuple[Tensor, dict]:
    """Labels, and the options that say which row follows which."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (*lead, length)
    labels = torch.randint(vocab, shape, generator=generator)
    ignore_index = 0 if rarely(draw, 6) else draw(st.sampled_from([-100, -1]))
    holes = 1.0 if rarely(draw, 20) else draw(st.sampled_from([0.0, 0.0, 0.3]))
    labels[torch.rand(shape, generator=generator) < holes] = ignore_index
    labels = labels.to(draw(st.sampled_from([torch.int64, torch.int32])))
    options: dict[str, Any] = {"ignore_index": ignore_index, **packing(draw, lead, length)}
    options["shift"] = rarely(draw, 3)
    if rarely(draw, 3):
        options["where"] = torch.rand(shape, generator=generator) < 0.8
    options["eos_token_id"] = draw(st.sampled_from([None, None, 0, vocab - 1, [0, vocab // 2]]))
    options["boundary"] = draw(st.sampled_from(["terminal", "bootstrap", "bootstrap", "drop"]))
    cut = draw(st.sampled_from([None, lead, shape]))
    if cut is not None:
        options["truncated"] = torch.rand(cut, generator=generator) < 0.5
    return labels, options


def rarely(draw: Any, n: int) -> bool:
    """True once in n times; what shrinks leaves it out.

    What takes the TD term away (no labels, no weight, a value in its place) is drawn with this, so
    that together they leave it there in most batches: tests/test_cases.py counts them.
    """
    return bool(draw(st.integers(0, n - 1)) == n // 2)  # Hypothesis prefers the ends of a range


def number(draw: Any, *choices: float, zero: int = 0) -> Any:
    """A float, or a 0-d tensor; 0 once in ``zero`` times."""
    x = draw(st.sampled_from(choices))
    if zero and rarely(draw, zero):
        x = 0.0
    return torch.tensor(x) if rarely(draw, 4) else x


@st.composite
def cases(
    draw: Any,
    names: tuple[str, ...] = LOSSES,
    garbage: bool = True,
    z_loss: bool = True,
    readout: bool = True,  # logit_scale and softcap, in a third of the batches
) -> Case:
    name, vocab = draw(st.sampled_from(names)), draw(st.sampled_from(VOCABS))
    lead, length = draw(st.sampled_from([(2,), (), (2, 3)])), draw(st.sampled_from([3, 5, 2, 8, 4]))
    length = 1 if rarely(draw, 15) else length
    shape = (*lead, length)
    labels, options = draw(sequences(vocab, lead, length))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def random(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    options["entropy_coef"] = number(draw, 0.0, 0.0, 0.3, -0.1)
    if z_loss:
        options["z_loss"] = number(draw, 0.0, 0.0, 1e-4, 0.2)
    if readout and rarely(draw, 3):
        options["logit_scale"] = number(draw, 1.0, 0.125, 2.5)
        options["softcap"] = draw(st.sampled_from([None, 30.0, 2.0, torch.tensor(2.0)]))
        options["temperature"] = number(draw, 1.0, 1.0, 0.7, 2.0)
    if name != "mle_loss":
        options["lam"] = number(draw, 0.1, 1.5, zero=15)
        options["gamma"] = number(draw, 0.9, 1.0, 0.5, zero=15)
        options["detach_next"] = rarely(draw, 4)
        for key in ("next_values", "values"):
            if rarely(draw, 5):
                options[key] = random(3.0).to(draw(st.sampled_from(DTYPES)))
    if name == "online_iqlearn_loss":
        options["alpha"] = number(draw, 0.1, 0.7, zero=6)
        groups = torch.rand(draw(st.sampled_from([lead, shape])), generator=generator)
        options["is_expert"] = groups < draw(st.sampled_from([0.5, 0.5, 0.0, 1.0]))
    if rarely(draw, 3):
        weights = random().abs() * (random() < 0.6)
        options["token_weights"] = weights.to(draw(st.sampled_from([*DTYPES, torch.float64])))
    reduction = options["reduction"] = draw(
        st.sampled_from(["mean", "mean", "mean", "sum", "sum", "none"])
    )
    if reduction == "mean" and draw(st.booleans()):
        items = number(draw, 3, 7.5, zero=6), number(draw, 3, 7.5, zero=6)
        options["num_items"] = items if name == "online_iqlearn_loss" else items[0]
    upstream = draw(st.sampled_from([1.0, 1.0, -0.3, 5.0]))

    dtype = draw(st.sampled_from([torch.float32, torch.float32, *DTYPES]))
    offset, scale = draw(st.sampled_from([(0.0, 1.0), (0.0, 6.0), (1e4, 1.0), (-1e4, 1.0)]))
    logits = offset + scale * torch.randn((*shape, vocab), generator=generator)
    if draw(st.booleans()):
        hide(logits, labels, generator)
    if garbage and draw(st.booleans()):
        spoil(name, logits, labels, options, draw(st.sampled_from([math.nan, math.inf])))
    grown, view = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    leaf = torch.zeros(grown(*logits.shape), dtype=dtype)
    view(leaf).copy_(logits)
    return Case(name, leaf, view, labels, options, random() if reduction == "none" else upstream)


def hide(logits: Tensor, labels: Tensor, generator: torch.Generator) -> None:
    """Columns of -inf, as of a padded or masked vocabulary: none that is a label."""
    vocab = logits.shape[-1]
    free = [j for j in range(vocab) if j not in labels.tolist() and not (labels == j).any()]
    for j in free[: vocab - 1]:
        if torch.rand((), generator=generator) < 0.5:
            logits[..., j] = -math.inf


def spoil(name: str, logits: Tensor, labels: Tensor, options: dict, garbage: float) -> None:
    """Garbage in every row, value and next value that no term of a weight other than 0 uses."""
    _, batch = naive.loss(name, torch.zeros_like(logits).double(), labels, **options)
    rows = [row for sequence in batch for row in sequence]
    used = [row.m != 0 or row.d != 0 for row in rows]
    ahead = [row.kind == naive.BOOTSTRAP and row.d != 0 for row in rows]
    onto = [False, *ahead[:-1]]  # a row that bootstraps is never the last of its batch row
    values, next_values = options.get("values"), options.get("next_values")
    for i in range(len(rows)):
        if not used[i] and (values is not None or next_values is not None or not onto[i]):
            logits.view(-1, logits.shape[-1])[i] = garbage
        if values is not None and rows[i].d == 0 and (next_values is not None or not onto[i]):
            values.view(-1)[i] = garbage
        if next_values is not None and not ahead[i]:
            next_values.view(-1)[i] = garbage


@dataclass
class Outcome:
    loss: Tensor
    logits: Tensor
    values: Tensor | None
    next_values: Tensor | None


def differentiate(function: Callable[..., Tensor], case: Case, dtype: Any = None) -> Outcome:
    """The loss and its gradients by backward(); in float64 for the naive ones."""
    device = "cpu" if dtype else DEVICE
    options = {
        key: x.to(device, copy=True) if isinstance(x, Tensor) else x
        for key, x in case.options.items()
    }
    leaf = case.leaf.clone().to(device, dtype or case.leaf.dtype).requires_grad_()
    heads = {
        key: options[key].to(dtype or options[key].dtype).requires_grad_()
        for key in ("values", "next_values")
        if options.get(key) is not None
    }
    loss = function(case.view(leaf), case.labels.to(device), **{**options, **heads})
    if dtype is not None:
        loss = loss + 0 * leaf.nan_to_num(0, 0, 0).sum()  # naive terms of weight 0 have no graph
    upstream = case.upstream.to(device) if isinstance(case.upstream, Tensor) else case.upstream
    (loss * upstream).sum().backward()
    grads = [x.grad if x is not None else None for x in map(heads.get, ("values", "next_values"))]
    back = (None if x is None else x.cpu() for x in grads)
    return Outcome(loss.detach().cpu(), case.view(leaf.grad.cpu()), *back)


def tolerance(case: Case, off: float = 0.0) -> Outcome:
    """How far float32 arithmetic may be off: EPS times the sum of the sizes of the terms.

    ``off``: how many EPS the logits themselves may be off, where they are computed.
    """
    options, shape = case.options, case.labels.shape
    x = case.logits.double()
    q = naive.readout(x, options)
    log_vocab = math.log(q.shape[-1])
    _, batch = naive.loss(case.name, x, case.labels, **options)
    above = torch.as_tensor(case.upstream, dtype=torch.float64).abs().expand(shape)
    gamma, kappa = float(options.get("gamma", 1.0)), abs(float(options.get("entropy_coef", 0.0)))
    zeta = float(options.get("z_loss", 0.0))
    with_values = options.get("values") is not None
    slope, off = read_slope(x, options), off * scale_of(options)
    loss, per_logit, per_value, per_next = [], [], [], []
    for sequence, logits, slopes, upstream in zip(
        batch,
        q.reshape(-1, *q.shape[-2:]),
        slope.reshape(-1, *q.shape[-2:]),
        above.reshape(-1, shape[-1]).tolist(),
        strict=True,
    ):
        from_before = 0.0  # what row t - 1 sends to row t
        for t, (row, g) in enumerate(zip(sequence, upstream, strict=True)):
            m, d = abs(row.m), abs(row.d)
            bonus = kappa * (1 + 2 * log_vocab)
            v = naive.logsumexp(logits[t]).item()
            # bent logits are rounded first, so that log p is off by as much
            reach = logits[t].nan_to_num(0, 0, 0).abs().max().item() if bent(options) else 0.0
            reach += off
            size, delta, surprise = 0.0, 0.0, 0.0
            if d:
                size = abs(logits[t, row.label].item()) + gamma * abs(row.next_value.item())
                size += (abs(v) + abs(row.value.item())) * with_values
                size += (1 + gamma) * off
                delta = abs(row.reward.item())
            if m:
                surprise = abs(row.logprob.item()) + 1 + log_vocab + bonus
                surprise += 2 * reach * (1 + bonus) + 3 * abs(zeta) * v**2
                surprise += 2 * abs(zeta * v) * off
            loss.append(EPS * (m * surprise + d * (2 * delta * size + delta**2 + EPS * size**2)))

            u = g * 2 * d * size
            logp = (logits[t] - v).nan_to_num(0, neginf=0)
            a = g * m * (1 + bonus) + from_before * (not with_values) + u * with_values
            a += g * m * 2 * abs(zeta) * (abs(v) + off)
            part = a * logp.exp() * (1 + logp.abs()) * (logits[t] != -math.inf)
            error = part * (1 + logp.abs() + 2 * reach)
            if row.label is not None:
                part[row.label] += a + g * m + u  # (p - 1) A + (A + C), exact where p is near 1
                error[row.label] += (a + g * m + u) * (1 + reach)
            error *= slopes[t]
            if options.get("softcap") is not None:  # 1 - tanh^2 is off by roundings of 1
                error += (3 + 2 * off / cap_of(options)) * part * scale_of(options)
            per_logit.append(EPS * error)
            per_value.append(EPS * (u + from_before))
            per_next.append(EPS * gamma * u)
            from_before = gamma * u if row.kind == naive.BOOTSTRAP else 0.0
    rows = torch.tensor(loss, dtype=torch.float64).reshape(shape)
    return Outcome(
        rows if options.get("reduction") == "none" else rows.sum(),
        torch.stack(per_logit).reshape(q.shape),
        torch.tensor(per_value, dtype=torch.float64).reshape(shape),
        torch.tensor(per_next, dtype=torch.float64).reshape(shape),
    )


def read_slope(x: Tensor, options: dict[str, Any]) -> Tensor:
    """dq/dx of ``naive.readout``, without its sign."""
    scale, cap = scale_of(options), options.get("softcap")
    if cap is None:
        return torch.full_like(x, scale)
    inner = float(options.get("logit_scale", 1.0)) * x / float(cap)
    return scale * (1 - torch.tanh(inner) ** 2)


def scale_of(options: dict[str, Any]) -> float:
    """dq/dx without a soft cap."""
    return float(options.get("logit_scale", 1.0)) / float(options.get("temperature", 1.0))


def cap_of(options: dict[str, Any]) -> float:
    """The bound of q."""
    return float(options["softcap"]) / float(options.get("temperature", 1.0))


def bent(options: dict[str, Any]) -> bool:
    """Whether logits are scaled or soft-capped."""
    return options.get("softcap") is not None or any(
        bool(options.get(name, 1.0) != 1.0) for name in ("logit_scale", "temperature")
    )


def slack(case: Case) -> float:
    """What multiplies the error of a row's gradient where its logits are bent, and rounded so."""
    if not bent(case.options):
        return 1.0
    q = naive.readout(case.logits.double(), case.options)
    reach = q.nan_to_num(0, 0, 0).abs().max().item()
    return scale_of(case.options) * (1 + reach)


def undecided(case: Case) -> Tensor:
    """Of every row, whether float32 may take its label's logit for the largest, or not.

    Logits that were apart may be one number once they are scaled or capped and rounded.
    """
    batch = naive.rows_of(case.logits.double(), case.labels, case.options)
    if not bent(case.options):
        return torch.zeros(case.labels.shape, dtype=torch.bool)
    q = naive.readout(case.logits.double(), case.options).reshape(-1, case.logits.shape[-1])
    q = q.nan_to_num(neginf=torch.finfo(q.dtype).min)
    near = []
    for row, logits in zip((row for sequence in batch for row in sequence), q, strict=True):
        if row.label is None:
            near.append(False)
            continue
        others = torch.cat([logits[: row.label], logits[row.label + 1 :]])
        apart = (logits[row.label] - others).abs().min().item() if len(others) else math.inf
        near.append(apart <= EPS * logits[row.label].abs().item())
    return torch.tensor(near).reshape(case.labels.shape)


def magnitude(case: Case) -> float:
    """The largest number that a row's statistics are computed from."""
    q = naive.readout(case.logits.double(), case.options)
    given = [q, case.options.get("values"), case.options.get("next_values")]
    finite = [x.double().masked_fill(x.isinf(), 0).abs().max() for x in given if x is not None]
    return math.log(case.logits.shape[-1]) + sum(x.item() for x in finite)


def assert_close(
    actual: Tensor | None,
    expected: Tensor | None,
    error: Tensor,
    times: int,
    factor: float = 1.0,
) -> None:
    """Within ``error`` and ``times`` roundings to the result's dtype; overflow is no error.

    An error of 0 stands for exactly 0: no term reaches that element. ``factor``: what multiplies
    the result between its roundings, and with it what the first one loses below normal numbers.
    """
    if expected is None:
        assert actual is None or not actual.any()
        return
    assert actual is not None and actual.shape == expected.shape
    largest = torch.finfo(actual.dtype).max
    x, y = actual.double().clamp(-largest, largest), expected.clamp(-largest, largest)
    lost = SMALLEST[actual.dtype] * (1 + (times - 1) * max(1.0, factor))
    allowed = error + times * ROUNDING[actual.dtype] * (y.abs() + error) + lost
    # 1e-37: subnormal numbers may be flushed
    allowed = torch.where(error > 0, 1.01 * allowed + 1e-37, 0.0)
    assert ((x - y).abs() <= allowed).all(), f"{actual}\n{expected}\nallowed {allowed}"


def check(
    function: Callable[..., Any],
    case: Case,
    run: Callable[[Callable[..., Any], Case], Outcome] = differentiate,
) -> None:
    """Loss and gradients of ``function``, by ``run``, against the naive loss and its autograd."""
    actual = run(function, case)
    expected = differentiate(
        lambda *args, **options: naive.loss(case.name, *args, **options)[0], case, torch.float64
    )
    error = tolerance(case)
    assert actual.loss.dtype == torch.float32
    assert_close(actual.loss, expected.loss, error.loss, 1)
    assert actual.logits.dtype == case.leaf.dtype
    # the gradient is rounded when it is written, and again when it is scaled
    scaled = case.options.get("reduction") != "none" and case.upstream != 1.0
    factor = abs(float(case.upstream)) if scaled else 1.0
    assert_close(actual.logits, expected.logits, error.logits, 2 if scaled else 1, factor)
    assert_close(actual.values, expected.values, error.values, 1)
    assert_close(actual.next_values, expected.next_values, error.next_values, 1)
