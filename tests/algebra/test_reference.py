"""irl_ops.reference in float64 against the naive formulas; irl_ops.algebra's kinds by name."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from irl_ops import algebra, reference

from .. import naive
from ..cases import Case, cases, differentiate, undecided

# NaN and inf in rows that no term uses are part of the cases
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")


def array(x: Any) -> Any:
    """NumPy has no bfloat16; every number of it is a float64."""
    if isinstance(x, torch.Tensor):
        return (x.double() if x.is_floating_point() else x).numpy()
    return tuple(map(array, x)) if isinstance(x, tuple) else x


def close(actual: Any, expected: torch.Tensor | None) -> None:
    if expected is None:
        assert actual is None or not np.any(actual)
        return
    assert actual.dtype == np.float64
    # float64 throughout; offsets of 1e4 are squared in the TD term
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-11, atol=1e-8)


@given(case=cases())
@settings(max_examples=200)
def test_losses(case: Case) -> None:
    options = {name: array(option) for name, option in case.options.items()}
    result = getattr(reference, case.name)(
        array(case.logits), array(case.labels), **options, grad_output=array(case.upstream)
    )
    expected = differentiate(
        lambda *args, **opt: naive.loss(case.name, *args, **opt)[0], case, torch.float64
    )
    close(np.asarray(result.loss), expected.loss)
    close(result.dlogits, expected.logits)
    close(result.dvalues, expected.values)
    close(result.dnext_values, expected.next_values)


@given(case=cases(garbage=False))
@settings(max_examples=100)
def test_metrics(case: Case) -> None:
    options = {name: array(option) for name, option in case.options.items()}
    result = getattr(reference, case.name)(array(case.logits), array(case.labels), **options)
    _, batch = naive.loss(case.name, case.logits.double(), case.labels, **case.options)
    coefficient = options["entropy_coef"]
    with_entropy = isinstance(coefficient, np.ndarray) or coefficient != 0
    zeta = options.get("z_loss", 0.0)
    with_z = not isinstance(zeta, float) or zeta != 0
    expected = naive.metrics(batch, case.name, with_entropy, with_z)
    assert set(result.metrics) == set(expected)
    for name, number in expected.items():
        near = undecided(case).sum().item() / max(1.0, expected["tokens"])
        error = near if name == "accuracy" else 0.0
        assert result.metrics[name] == pytest.approx(number, rel=1e-9, abs=1e-9 + error)


@given(case=cases(names=("iqlearn_loss",), garbage=False))
@settings(max_examples=100)
def test_token_stats(case: Case) -> None:
    kept = "ignore_index shift where segment_ids position_ids cu_seqlens eos_token_id boundary"
    kept += " truncated gamma values next_values logit_scale softcap temperature"
    case.options = {k: v for k, v in case.options.items() if k in kept.split()}
    options = {name: array(option) for name, option in case.options.items()}
    stats = reference.token_stats(array(case.logits), array(case.labels), **options)
    expected = naive.token_stats(case.logits.double(), case.labels, **case.options)
    for name in ("value", "logprob", "entropy", "reward", "next_value"):
        close(getattr(stats, name), expected[name])
    np.testing.assert_array_equal(stats.kind, expected["kind"])


@pytest.mark.parametrize("label", [17, -5, 2**31 - 1])
def test_a_label_out_of_range_is_nan(label: int) -> None:
    """Where no exception can be raised without a look at the data; nothing is read or written."""
    labels = np.array([1, label, 3])
    result = reference.iqlearn_loss(np.zeros((3, 17)), labels)
    assert np.isnan(result.loss)
    where = np.array([True, False, True])
    assert np.isfinite(reference.iqlearn_loss(np.zeros((3, 17)), labels, where=where).loss)


def test_kinds_have_their_numbers() -> None:
    names = ("IGNORED", "TERMINAL", "BOOTSTRAP", "NO_TD")
    assert [getattr(algebra, n) for n in names] == [getattr(naive, n) for n in names]
