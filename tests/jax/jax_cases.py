"""The batches of ``cases`` for irl_ops.jax."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from torch import Tensor

import irl_ops.jax as irl
from irl_ops.jax import backends

from .. import cases
from ..cases import Case, Outcome

BACKENDS = tuple(  # those that serve the device that JAX computes on: the CPU, unless it is told
    name
    for name in irl.available_backends()
    if backends.BACKENDS[name].unavailable(jax.default_backend()) is None
)


def array(x: Any) -> Any:
    """A torch tensor as a NumPy array of the same dtype; anything else as it is."""
    if isinstance(x, tuple):
        return tuple(map(array, x))
    if not isinstance(x, Tensor):
        return x
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.contiguous().numpy()


def tensor(x: Any) -> Tensor:
    x = np.asarray(x)
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def arrays(case: Case) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    return (
        array(case.logits),
        array(case.labels),
        {name: array(x) for name, x in case.options.items()},
    )


def differentiate(function: Callable[..., Any], case: Case) -> Outcome:
    """The loss and its gradients, with the gradient from above put in as JAX does."""
    logits, labels, options = arrays(case)
    heads = {n: options.pop(n) for n in ("values", "next_values") if options.get(n) is not None}

    @jax.jit
    def run(logits: Any, heads: Any, upstream: Any) -> Any:
        loss, pull = jax.vjp(lambda q, h: function(q, labels, **options, **h), logits, heads)
        return loss, *pull(jnp.broadcast_to(jnp.asarray(upstream, loss.dtype), loss.shape))

    loss, dlogits, dheads = run(logits, heads, array(case.upstream))
    back = (tensor(dheads[n]) if n in heads else None for n in ("values", "next_values"))
    return Outcome(tensor(loss), tensor(dlogits), *back)


def check(function: Callable[..., Any], case: Case) -> None:
    """Loss and gradients of ``function`` against the naive loss and its autograd."""
    cases.check(function, case, differentiate)
