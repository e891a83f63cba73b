"""The Triton kernels lowered into JAX programs for GPUs that are not here. Nothing runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irl_ops.jax import triton
from irl_ops.kernels import reference

# These two work where there is no GPU; the kernels are compiled by what jax-triton brings.
READY = triton.unavailable("cuda")
needs_plugin = pytest.mark.skipif(
    READY is not None, reason=f"needs jax-triton and JAX for CUDA: {READY}"
)


GIVEN = """
import sys
import jax
import irl_ops.jax as irl
from irl_ops.jax import triton

logits = jax.ShapeDtypeStruct((2, 8, int(sys.argv[1])), "bfloat16")
labels = jax.ShapeDtypeStruct((2, 8), "int32")
row = jax.ShapeDtypeStruct((2, 8), "float32")
"""

PROGRAMS = """
programs = [
    (triton.row_stats, logits, labels),
    (lambda q, y: triton.row_stats(q, y, True), logits, labels),
    (triton.row_grad, logits, labels, *[row] * 5),
    (triton.row_stats_grad, logits, row, row),
    (triton.row_stats_grad, logits, row, row, row),
    (jax.value_and_grad(irl.iqlearn_loss), logits, labels),
    (jax.vmap(jax.grad(irl.mle_loss)), logits, labels),
    (lambda q, y: irl.token_stats(q, y).reward, logits, labels),
    (jax.value_and_grad(lambda q, y: irl.iqlearn_loss(q, y, softcap=30.0)), logits, labels),
]
"""

MEASURES = """
ids = jax.ShapeDtypeStruct((2, 8, 3), "int32")
mask = jax.ShapeDtypeStruct(logits.shape, "bool")


def measured(q, y, ids, mask, row):
    asked = dict(extra_ids=ids, keep_mask=mask, keep_above=row, temperature=row)
    stats = irl.token_stats(q, y, extras=("log_sum_sq", "top1", "mean_logit"), **asked)
    fields = (stats.logprob, stats.entropy, stats.log_sum_sq, stats.mean_logit)
    return sum(x.sum() for x in (*fields, stats.extra_logprob))


programs = [
    (lambda q, y: irl.token_stats(q, y, extras=("top1",)).top1, logits, labels),
    (jax.grad(measured), logits, labels, ids, mask, row),
]
"""

LOWERED = """
for program, *given in programs:
    lowered = jax.jit(program).trace(*given).lower(lowering_platforms=("cuda",))
    print(lowered.as_text().count("@triton_kernel_call"))
"""


def lowered(programs: str, vocab: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: in this one, Triton's kernels are interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-P", "-c", GIVEN + programs + LOWERED, str(vocab)],
        env=env | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@needs_plugin
@pytest.mark.parametrize(
    ("capability", "vocab"),  # with edges, and without
    [("8.0", 50257), ("9.0", 50257), ("9.0", 151936), ("10.0", 151936)],
)
def test_programs_hold_the_kernels(capability, vocab):
    done = lowered(PROGRAMS, vocab, IRL_OPS_COMPUTE_CAPABILITY=capability)
    # under a soft cap a kernel reads the labels' logits
    assert done.stdout.split() == ["1"] * 8 + ["2"], done.stderr


@needs_plugin
def test_measures_hold_theirs():
    """With all that can be asked for, and with little; forward, and forward and back."""
    done = lowered(MEASURES, 50257, IRL_OPS_COMPUTE_CAPABILITY="9.0")
    assert done.stdout.split() == ["1", "2"], done.stderr


@needs_plugin
def test_lowering_for_nothing_says_what_to_set():
    done = lowered(PROGRAMS, 128)
    assert done.returncode and "set IRL_OPS_COMPUTE_CAPABILITY" in done.stderr


def test_what_is_missing_is_said(monkeypatch):
    assert "NVIDIA" in triton.unavailable("tpu")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "jax_triton" else found(name)
    )
    assert "pip install 'jax-triton>=0.3.1,<0.4'" in triton.unavailable("cuda")


def test_labels_are_gathered_and_scattered_as_the_reference_does():
    q = jax.random.normal(jax.random.key(0), (2, 3, 17))
    labels = jnp.asarray([[-1, 5, 17], [0, 16, 2**31 - 1]])
    elements = jnp.arange(6.0).reshape(2, 3)
    wanted = reference.label_logit(np.asarray(q), np.asarray(labels))
    np.testing.assert_array_equal(triton.gathered(q, labels), wanted)
    wanted = reference.set_label(np.asarray(q), np.asarray(labels), np.asarray(elements))
    np.testing.assert_array_equal(triton.scattered(q, labels, elements), wanted)
