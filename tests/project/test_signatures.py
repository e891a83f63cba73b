"""irl_ops.jax has the functions of irl_ops.torch, with the same arguments."""

import importlib
import inspect
from typing import Any

import pytest

import irl_ops.torch as irl
from irl_ops.torch import sft

jax = pytest.importorskip("irl_ops.jax", reason="needs JAX")
jax_sft = importlib.import_module("irl_ops.jax.sft")

TORCH_ONLY = {  # torch.nn.Module has no counterpart; JAX's autodiff needs none
    name for name in irl.__all__ if isinstance(getattr(irl, name), type) and name.endswith("Loss")
}
SHARED = sorted(set(irl.__all__) - TORCH_ONLY)
# Where a framework names what only it has: process groups there, axes of a mesh here.
RENAMED = {
    "vocab_group": "vocab_axis",
    "sequence_group": "sequence_axis",
}


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [
        (RENAMED.get(p.name, p.name), p.kind, p.default)
        for p in inspect.signature(function).parameters.values()
    ]


def test_the_same_names() -> None:
    assert sorted(jax.__all__) == SHARED
    assert sorted(jax.__all__) == jax.__all__ and sorted(irl.__all__) == irl.__all__


@pytest.mark.parametrize("name", SHARED)
def test_the_same_arguments(name: str) -> None:
    """Names, order, kinds and defaults."""
    ours, theirs = getattr(irl, name), getattr(jax, name)
    if isinstance(ours, type):  # a NamedTuple of results
        assert ours._fields == theirs._fields
        assert ours._field_defaults == theirs._field_defaults
    else:
        assert parameters(ours) == parameters(theirs)


@pytest.mark.parametrize("name", sft.__all__)
def test_the_same_arguments_of_losses_for_fine_tuning(name: str) -> None:
    assert jax_sft.__all__ == sft.__all__
    assert parameters(getattr(sft, name)) == parameters(getattr(jax_sft, name))


@pytest.mark.parametrize("name", [name for name in SHARED if name.endswith(("_loss", "_stats"))])
def test_options_are_named(name: str) -> None:
    """Arrays may be given by position; everything else has a name and a default."""
    for parameter in inspect.signature(getattr(irl, name)).parameters.values():
        assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        assert (parameter.kind is parameter.KEYWORD_ONLY) == (
            parameter.default is not parameter.empty
        )
