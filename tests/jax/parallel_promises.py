"""What losses over mesh axes promise beside numbers; part of the program of ``test_parallel``."""

import functools
import re
from typing import Any

import torch

from .. import naive

B, T, V = 3, 8, 24
COLLECTIVE = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\("


@functools.cache
def mesh(split: tuple[int, int]) -> Any:
    import jax
    import numpy as np
    from jax.sharding import Mesh

    assert len(jax.devices()) == 4
    return Mesh(np.array(jax.devices()).reshape(split), ("v", "s"))


def check_devices() -> None:
    """The same bits on every device, metrics of the whole, and nothing as wide as a row is sent."""
    import jax
    import numpy as np
    from jax.sharding import PartitionSpec as P

    import irl_ops.jax as irl

    rows, wide = 2, 4096
    torch.manual_seed(0)
    q, labels = torch.randn(rows, T, wide), torch.randint(wide, (rows, T))
    options = dict(lam=0.3, gamma=0.9, entropy_coef=0.1, reduction="mean")
    loss = functools.partial(
        irl.iqlearn_loss, vocab_axis="v", sequence_axis="s", return_metrics=True, **options
    )

    def run(q: Any, labels: Any, order: Any) -> Any:
        both = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), gradient = both(q, labels, sequence_order=order)
        return jax.tree.map(lambda x: x[None], (value, metrics)), gradient

    over = P(None, "s", "v")
    spread = jax.shard_map(
        run,
        mesh=mesh((2, 2)),
        in_specs=(over, P(None, "s"), P("s")),
        out_specs=(P(("v", "s")), over),
        check_vma=False,
    )
    compiled = jax.jit(spread).lower(q.numpy(), labels.numpy(), np.arange(T)).compile()
    sent = [x for x in compiled.as_text().splitlines() if re.search(COLLECTIVE, x)]
    assert sent
    for line in sent:
        for shape in re.findall(r"[a-z]+\d*\[([\d,]+)\]", line.split("(")[0]):
            assert np.prod([int(n) for n in shape.split(",")]) < wide // 4, line

    (value, metrics), _ = compiled(q.numpy(), labels.numpy(), np.arange(T))
    expected, batch = naive.loss("iqlearn_loss", q.double(), labels, **options)
    wanted = {"loss": expected.item(), **naive.metrics(batch, "iqlearn_loss", True)}
    for name, x in {"loss": value, **metrics}.items():
        x = np.asarray(x)
        assert (x == x[0]).all(), (name, x)
        np.testing.assert_allclose(x[0], wanted[name], rtol=1e-5, err_msg=name)

    # a row that no device has, and one that two have, are bad labels and not a wrong number
    (value, _), _ = compiled(q.numpy(), labels.numpy(), np.array([0, 1, 2, 3, 4, 5, 6, 6]))
    assert np.isnan(value).all()
    labels[1, 2] = wide
    (value, _), _ = compiled(q.numpy(), labels.numpy(), np.arange(T))
    assert np.isnan(value).all()


def check_refused() -> None:
    """While a program is traced, with the name of the argument."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    import irl_ops.jax as irl

    q, labels = jnp.zeros((B, T, V)), jnp.zeros((B, T), int)
    v, s = dict(vocab_axis="v"), dict(sequence_axis="s")
    for options, error, told in (
        (dict(vocab_axis="x"), ValueError, "vocab_axis is 'x', and 'x' is no axis here"),
        (dict(vocab_axis=3), TypeError, "vocab_axis is 3"),
        (dict(vocab_axis="v", sequence_axis=("s", "v")), ValueError, "different axes"),
        (dict(vocab_size=8), ValueError, "vocab_size is given without vocab_axis"),
        (dict(vocab_start=8), ValueError, "vocab_start is given without vocab_axis"),
        (v | dict(vocab_size=V + 1), ValueError, f"vocab_size is {V + 1}"),
        (v | dict(vocab_start=1.5), TypeError, "vocab_start is 1.5"),
        (dict(sequence_order=jnp.arange(4)), ValueError, "given without sequence_axis"),
        (s | dict(sequence_order=jnp.arange(3)), ValueError, "sequence_order has shape [3]"),
        (s | dict(sequence_order=jnp.zeros(4)), TypeError, "sequence_order is float32"),
        (v | dict(eos_token_id=V), ValueError, "eos_token_id"),
        (dict(vocab_group=3), TypeError, "has no option 'vocab_group'"),
    ):
        run = jax.shard_map(
            functools.partial(irl.iqlearn_loss, **options),
            mesh=mesh((2, 2)),
            in_specs=(P(None, "s", "v"), P(None, "s")),
            out_specs=P(),
        )
        try:
            jax.eval_shape(run, q, labels)
        except error as found:
            assert told in str(found), found
        else:
            raise AssertionError(options)
    try:
        irl.iqlearn_loss(q, labels, vocab_axis="v")
    except ValueError as found:
        assert "a manual axis of the shard_map" in str(found), found
    else:
        raise AssertionError("an axis without a shard_map")
