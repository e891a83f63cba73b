"""Breaks of what crosses between processes and devices, and of losses by row statistics."""

from .mutant import ALGEBRA, JAX_SHARDS, TORCH_SHARDS, Mutant

RANKS = "tests/torch/test_parallel.py::"
LOSSES = f"{RANKS}test_loss_and_gradients"
CALLS = "tests/torch/test_parallel_calls.py::"
DEVICES = "tests/jax/test_parallel.py::test_losses_and_gradients"
SFT = "tests/torch/test_sft.py::"
SFT_LOSSES = f"{SFT}test_loss_and_gradient"
VALUE_LOSS = "tests/torch/test_value_loss.py::test_loss_and_gradient"
ADVANTAGES = "tests/algebra/test_actor_critic.py::test_advantages_are_those_of_a_loop"
POLICY = "tests/algebra/test_actor_critic.py::test_policy_rows"


def ranks(what: str, text: str, replacement: str, test: str = LOSSES) -> Mutant:
    return Mutant(f"ranks: {what}", TORCH_SHARDS, text, replacement, test)


def devices(what: str, text: str, replacement: str) -> Mutant:
    return Mutant(f"devices: {what}", JAX_SHARDS, text, replacement, DEVICES)


def algebra(what: str, text: str, replacement: str, test: str = SFT_LOSSES) -> Mutant:
    return Mutant(f"token losses: {what}", ALGEBRA, text, replacement, test)


MUTANTS = [
    ranks(
        "the losses of other ranks have no gradient here",
        "if ctx.own_losses and whole:",
        "if False and ctx.own_losses and whole:",
    ),
    ranks(
        "every rank takes the rows of the first",
        "whole.narrow(axis, sum(sizes[:rank]), sizes[rank])",
        "whole.narrow(axis, 0, sizes[rank])",
        f"{RANKS}test_measures_of_a_layer",  # whose rows are cut and in order, whatever is drawn
    ),
    ranks(
        "rows stay in the order of the ranks",
        "whole = [in_order(xp, x, order) for x in whole]",
        "whole = list(whole)",
    ),
    ranks(
        "an order with a row twice is one",
        "(order.sort(dim=-1).values == rows).all()",
        "(order.sort(dim=-1).values <= rows.max()).all()",
        f"{CALLS}test_an_order_that_is_none",
    ),
    Mutant(
        "ranks: padding has the gradient that memory held",
        ("irl_ops/torch/shards.py",),
        "dlogits[..., here.shape[-1] :] = 0.0  # padding",
        "",
        LOSSES,
    ),
    Mutant(
        "ranks: the gradient of hidden is that of the columns here",
        ("irl_ops/torch/linear_columns.py",),
        "dist.all_reduce(dhidden, group=how.columns.group)",
        "pass",
        f"{RANKS}test_linear",
    ),
    devices(
        "every device has the first columns",
        "lax.axis_index(self.axis) * width if self.start is None",
        "0 * width if self.start is None",
    ),
    devices(
        "padding has mass",
        "jnp.where(last, -jnp.inf, logits[..., width - spare :])",
        "logits[..., width - spare :]",
    ),
    devices(
        "gradients from above are parts",
        "summed: jax.Array = lax.psum(gradient, axis)",
        "summed: jax.Array = jnp.asarray(gradient)",
    ),
    devices(
        "every device takes the rows of the first",
        "lax.axis_index(self.axis) * size, size, x.ndim - 1",
        "0 * size, size, x.ndim - 1",
    ),
    devices(
        "a part of a sequence goes on with itself",
        "(index + 1) % count",
        "index % count",
    ),
    algebra(
        "NaN of a row of weight 0 reaches a formula",
        "None if x is None else xp.where(share != 0, x, 0.0)",
        "None if x is None else x",
    ),
    algebra(
        "dft's weight has a gradient",
        "-fixed(xp.exp(logprob)) * finite",
        "-xp.exp(logprob) * finite",
    ),
    algebra("eaft's gate has a gradient", "gate = fixed(entropy /", "gate = (entropy /"),
    algebra("k3 of the other direction", "xp.expm1(ahead) - ahead", "xp.expm1(-ahead) + ahead"),
    algebra(
        "psft clips below", "xp.zeros_like(ahead) + epsilon)", "xp.zeros_like(ahead) - epsilon)"
    ),
    algebra("a power is not divided", "xp.where(flat, 1.0, q)\n    return", "1.0\n    return"),
    Mutant(
        "value objective: the regulariser is linear",
        ALGEBRA,
        "drop + lam * reward * reward",
        "drop + lam * reward",
        VALUE_LOSS,
    ),
    Mutant(
        "value objective: the semi-gradient stops in Q",
        ALGEBRA,
        "reward = stop_gradient(reward) + (q - stop_gradient(q))",
        "reward = stop_gradient(reward)",
        VALUE_LOSS,
    ),
    Mutant(
        "advantages see one step twice as far ahead",
        ALGEBRA,
        "factor = factor * _ahead(xp, factor, step)",
        "factor = factor * 1.0",
        ADVANTAGES,
    ),
    Mutant(
        "advantages without the discount of the next value",
        ALGEBRA,
        "total = reward + gamma * next_value - value",
        "total = reward + next_value - value",
        ADVANTAGES,
    ),
    Mutant(
        "PPO's clip is open below",
        ALGEBRA,
        "xp.clip(ratio, 1 - clip, 1 + clip)",
        "xp.clip(ratio, 0.0, 1 + clip)",
        POLICY,
    ),
]
