"""token_stats with all that it can be asked for, over mesh axes; part of ``test_parallel``."""

import functools
from typing import Any, NamedTuple

import torch

from .. import cases, measure_cases
from .parallel_promises import COLLECTIVE, B, T, V, mesh

K, WIDTH = 3, 6
EXTRAS = ("log_sum_sq", "top1", "mean_logit")
ARRAYS = ("temperature", "extra_ids", "keep_mask", "keep_above")


class Form(NamedTuple):
    """What a program is compiled for."""

    split: tuple[int, int]  # devices that share a row, devices that share a sequence
    options: dict[str, Any]  # the static ones
    arrays: tuple[str, ...] = ARRAYS
    order: bool = False
    padding: int = 0  # columns behind the vocabulary
    linear: bool = False
    check_vma: bool = True


FORMS = {
    "vocabulary": Form((4, 1), dict(extras=EXTRAS, softcap=30.0), padding=4, check_vma=False),
    "pallas": Form(
        (4, 1), dict(extras=EXTRAS, softcap=30.0, backend="pallas"), padding=4, check_vma=False
    ),
    "both": Form((2, 2), dict(extras=EXTRAS, shift=True), order=True, padding=2),
    "linear": Form(
        (2, 2), dict(extras=EXTRAS, chunk_size=5), ("extra_ids", "keep_mask"), order=True,
        padding=2, linear=True,
    ),
}  # fmt: skip


def batch(form: Form, seed: int) -> tuple[cases.Case, dict[str, torch.Tensor]]:
    """A random batch, and the layer that its logits are of; logits are float32 either way."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=g)

    labels = torch.randint(V, (B, T), generator=g)
    labels[rand(B, T) < 0.2] = -100
    layer = {
        "hidden": torch.randint(-8, 9, (B, T, WIDTH), generator=g) / 8,
        "weight": torch.randint(-8, 9, (V, WIDTH), generator=g) / 8,
    }
    logits = layer["hidden"] @ layer["weight"].T  # exact: products of eighths
    if not form.linear:
        logits = (0.0, 1e4)[seed % 2] + 4 * torch.randn(B, T, V, generator=g)
    options: dict[str, Any] = dict(
        form.options, gamma=0.9, ignore_index=-100, boundary="bootstrap", entropy=True
    )
    options.setdefault("extras", ())
    ids = torch.randint(V, (B, T, K), generator=g)
    ids[rand(B, T, K) < 0.1] = -100
    made = {"temperature": 0.3 + 2 * rand(B, T), "extra_ids": ids, "keep_mask": rand(B, T, V) < 0.6}
    made["keep_mask"][0, 2] = False
    options |= {name: x for name, x in made.items() if name in form.arrays}
    if "keep_above" in form.arrays:
        options["keep_above"] = measure_cases.between(logits, options, rand(B, T))
    case = cases.Case("token_stats", logits, lambda x: x, labels, options, None)
    fields = measure_cases.fields(case).items()
    case.upstream = {name: torch.randn(sizes, generator=g) for name, sizes in fields}
    for x in case.upstream.values():
        x[measure_cases.garbage(case)] = 0.0  # ``Expected`` holds nothing of such rows
    return case, layer


@functools.cache
def program(name: str) -> Any:
    """``run(leaves, rest, upstream)``: the fields, and the gradients by the leaves."""
    import jax
    from jax.sharding import PartitionSpec as P

    import irl_ops.jax as irl

    form = FORMS[name]
    static = dict(form.options, gamma=0.9, boundary="bootstrap")
    static |= {"vocab_axis": "v", "vocab_size": V} if form.split[0] > 1 else {}
    static |= {"sequence_axis": "s"} if form.split[1] > 1 else {}
    first = ("hidden", "weight") if form.linear else ("logits",)
    wide = {"logits", "keep_mask"}

    def spec(name: str, x: Any) -> Any:
        if name in ("weight", "sequence_order"):
            return P("v") if name == "weight" else P("s")
        return P(None, "s", "v") if name in wide else P(None, "s")

    def stats(leaves: Any, rest: Any) -> Any:
        given = {**leaves, **rest, **static}
        function = irl.linear_token_stats if form.linear else irl.token_stats
        return function(*[given.pop(n) for n in (*first, "labels")], **given)

    def run(leaves: Any, rest: Any, upstream: Any) -> Any:
        specs = tuple({n: spec(n, x) for n, x in d.items()} for d in (leaves, rest))
        spread = jax.shard_map(
            stats, mesh=mesh(form.split), in_specs=specs, out_specs=P(None, "s"),
            check_vma=form.check_vma,
        )  # fmt: skip

        def total(leaves: Any) -> Any:
            found = spread(leaves, rest)
            return sum((g * getattr(found, n)).sum() for n, g in upstream.items()), found

        gradients, found = jax.grad(total, has_aux=True)(leaves)
        return found, gradients

    return jax.jit(run)


def check(name: str, seed: int) -> None:
    from .jax_cases import array, tensor
    from .test_parallel import back, moved

    form = FORMS[name]
    case, layer = batch(form, seed)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(T, generator=g) if form.order else None

    def rows(x: torch.Tensor) -> torch.Tensor:
        return moved(x, order, -2 if x.ndim > 2 else -1)

    def padded(x: torch.Tensor, axis: int) -> torch.Tensor:
        shape = list(x.shape)
        shape[axis] = form.padding
        return torch.cat([x, torch.full(shape, torch.nan).to(x.dtype)], axis)

    rest = {n: rows(x) for n, x in case.options.items() if isinstance(x, torch.Tensor)}
    rest["labels"] = rows(case.labels)
    if "keep_mask" in rest:
        rest["keep_mask"] = padded(rest["keep_mask"], -1)
    if order is not None:
        rest["sequence_order"] = order
    leaves = {"logits": padded(rows(case.logits), -1)}
    if form.linear:
        leaves = {"hidden": rows(layer["hidden"]), "weight": padded(layer["weight"], 0)}
        leaves["weight"] = leaves["weight"].nan_to_num(1.0)
    upstream = {n: rows(x) for n, x in case.upstream.items()}
    found, gradients = program(name)(
        *({n: array(x) for n, x in d.items()} for d in (leaves, rest, upstream))
    )
    fields = {
        n: None if x is None else back(tensor(x), order, -2 if x.ndim > 2 else -1)
        for n, x in found._asdict().items()
    }
    expected = measure_cases.Expected(case)
    if not form.linear:
        logits = tensor(gradients["logits"])
        assert not logits[..., V:].any()
        actual = measure_cases.Found(fields, back(logits[..., :V], order, -2), None, None)
        expected.check(actual)
        return
    # the layer's gradients are products of that of its logits; sums of float32 numbers of order 1
    actual = measure_cases.Found(fields, expected.found.logits.float(), None, None)
    expected.check(actual)
    above = expected.found.logits
    wanted = {"hidden": above @ layer["weight"].double()}
    wanted["weight"] = above.flatten(0, 1).T @ layer["hidden"].double().flatten(0, 1)
    assert not tensor(gradients["weight"])[V:].any()
    close = {"hidden": back(tensor(gradients["hidden"]), order, -2)}
    close["weight"] = tensor(gradients["weight"])[:V]
    for n, x in close.items():
        torch.testing.assert_close(x.double(), wanted[n], rtol=1e-4, atol=1e-4)


def check_sent() -> None:
    """A few numbers per row, in one gather of floats and one of ``top1``; nothing in reverse."""
    import re

    import jax
    import numpy as np
    from jax.sharding import PartitionSpec as P

    import irl_ops.jax as irl

    wide = 4096
    options = dict(extras=EXTRAS, vocab_axis="v")

    def total(q: Any, labels: Any, ids: Any) -> Any:
        stats = irl.token_stats(q, labels, extra_ids=ids, **options)
        return stats.extra_logprob.sum() + stats.log_sum_sq.sum() + stats.top1.sum()

    over = P(None, None, "v")
    spread = jax.shard_map(
        jax.grad(total), mesh=mesh((4, 1)), in_specs=(over, P(), P()), out_specs=over
    )
    shapes = [((B, T, wide), np.float32), ((B, T), np.int32), ((B, T, K), np.int32)]
    given = [jax.ShapeDtypeStruct(*x) for x in shapes]
    text = jax.jit(spread).lower(*given).compile().as_text()
    sent = [x for x in text.splitlines() if re.search(COLLECTIVE, x)]
    sizes = [
        np.prod([int(n) for n in shape.split(",")]) // (B * T)
        for line in sent
        for shape in re.findall(r"[a-z]+\d*\[([\d,]+)\]", line.split("(")[0])
    ]
    # of 4 devices: row_max, logsum, the label's and K ids' logits, entropy, log_sum_sq and two more
    assert sum(sizes) <= 4 * (3 + K + 4 + 1), sent
