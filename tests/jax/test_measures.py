"""token_stats with all that it can be asked for, in JAX, against the naive statistics."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings

import irl_ops.jax as irl
from irl_ops.jax.backends import BACKENDS as MODULES

from ..cases import Case
from ..measure_cases import Found, check, measure_cases
from .jax_cases import BACKENDS, array, tensor

SERVING = [name for name in BACKENDS if hasattr(MODULES[name], "row_measures")]
every_backend = pytest.mark.parametrize("backend", SERVING)


def run(function: Any, case: Case) -> Found:
    """The statistics and the gradient of the sum of upstream times field."""
    options = {name: array(x) for name, x in case.options.items()}
    heads = {n: options.pop(n) for n in ("values", "next_values") if n in options}
    upstream = {name: array(x) for name, x in case.upstream.items()}
    logits, labels = array(case.logits), array(case.labels)

    def total(logits: Any, heads: Any) -> Any:
        stats = function(logits, labels, **options, **heads)
        # a gradient from above of 0 where the field is infinite
        return sum((jnp.asarray(g) * getattr(stats, n)).sum() for n, g in upstream.items()), stats

    (dlogits, dheads), stats = jax.grad(total, (0, 1), has_aux=True)(jnp.asarray(logits), heads)
    found = {n: None if x is None else tensor(x) for n, x in stats._asdict().items()}
    back = (tensor(dheads[n]) if n in heads else None for n in ("values", "next_values"))
    return Found(found, tensor(dlogits), *back)


@every_backend
@given(case=measure_cases())
@settings(max_examples=25)
def test_everything(backend: str, case: Case) -> None:
    check(partial(irl.token_stats, backend=backend), case, run)
