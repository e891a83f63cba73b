"""Bad input raises when it is traced, and says which argument, what came and what is accepted."""

import inspect
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import irl_ops.jax as irl
import irl_ops.torch
from irl_ops.jax import native, pallas, triton

V = 17
LOGITS = jnp.zeros((2, 3, V))
LABELS = jnp.zeros((2, 3), jnp.int32)
EXPERT = jnp.array([True, False])
ROWS = jnp.zeros((2, 3))
FLOATS = "float32, bfloat16, float16, float64"

# (change of the arguments, error, what the message says)
Bad = list[tuple[dict[str, Any], type, str]]
SHARED: Bad = [
    (dict(logits=LOGITS.tolist()), TypeError, r"logits is a list; accepted: a jax\.Array"),
    (dict(labels=[1, 2, 3]), TypeError, r"labels is a list; accepted: a jax\.Array"),
    (
        dict(logits=np.zeros((2, 3, V))),
        TypeError,
        "logits is float64 and JAX's 64-bit types are off",
    ),
    (dict(logits=LOGITS.astype(int)), TypeError, rf"logits is int32; accepted: {FLOATS}"),
    (dict(labels=ROWS), TypeError, r"labels is float32; accepted: int32, int64"),
    (dict(labels=LABELS.astype("int16")), TypeError, r"labels is int16; accepted: int32, int64"),
    (dict(logits=jnp.zeros(V)), ValueError, r"logits has shape \[17\]; accepted: \[\.\.\., T, V"),
    (dict(logits=LOGITS[..., :0]), ValueError, r"logits has shape \[2, 3, 0\]; accepted: .*V of 1"),
    (dict(labels=LABELS[:, 1:]), ValueError, r"labels has shape \[2, 2\]; accepted: \[2, 3\]"),
    (dict(ignore_index=0.5), TypeError, r"ignore_index is 0\.5; accepted: an int"),
    (dict(shift=1), TypeError, r"shift is 1; accepted: True or False"),
    (dict(where=LABELS), TypeError, r"where is int32; accepted: bool"),
    (dict(where=EXPERT), ValueError, r"where has shape \[2\]; accepted: \[2, 3\]"),
    (dict(segment_ids=ROWS), TypeError, r"segment_ids is float32; accepted: int32"),
    (dict(position_ids=LABELS[0]), ValueError, r"position_ids has shape \[3\]; accepted: \[2, 3\]"),
    (
        dict(segment_ids=LABELS, position_ids=LABELS),
        ValueError,
        "segment_ids and position_ids are given; accepted: at most one of segment_ids",
    ),
    (
        dict(cu_seqlens=jnp.array([0, 3])),
        ValueError,
        r"cu_seqlens has shape \[2\] and labels \[2, 3\]; accepted: .*\[S\+1\] with logits \[N, V",
    ),
    (dict(cu_seqlens=[0, 3]), TypeError, r"cu_seqlens is a list; accepted: a jax\.Array"),
    (dict(eos_token_id="a"), TypeError, r"eos_token_id is 'a'; accepted: an int, a sequence"),
    (dict(eos_token_id=[]), TypeError, r"eos_token_id is \[\]; accepted: an int, a sequence"),
    (dict(eos_token_id=True), TypeError, r"eos_token_id is True; accepted: an int"),
    (dict(boundary="end"), ValueError, "boundary is 'end'; accepted: 'terminal', 'bootstrap', 'd"),
    (dict(truncated=True), TypeError, r"truncated is a bool; accepted: a jax\.Array"),
    (
        dict(truncated=jnp.ones(3, bool)),
        ValueError,
        r"truncated has shape \[3\]; accepted: \[2, 3\], .*or that without its last axis",
    ),
    (dict(backend="cuda"), ValueError, r"backend is 'cuda'; accepted: 'auto', 'pallas', 'triton'"),
    (dict(eos_token_id=V), ValueError, r"eos_token_id is 17; accepted: tokens from 0 to 16"),
    (dict(z_coef=9.0), TypeError, r"\w+ has no option 'z_coef'; accepted: .*ignore_index"),
    (dict(backend=None), ValueError, "backend is None; accepted"),
]
READOUT: Bad = [
    (dict(logit_scale=0.0), ValueError, r"logit_scale is 0\.0; accepted: a number above 0 \(in"),
    (dict(logit_scale=-1), ValueError, r"logit_scale is -1; accepted: a number above 0"),
    (dict(logit_scale=float("nan")), ValueError, "logit_scale is nan; accepted: a number above 0"),
    (dict(logit_scale=float("inf")), ValueError, "logit_scale is inf; accepted: a number above 0"),
    (dict(logit_scale="1"), TypeError, "logit_scale is '1'; accepted: a number or a 0-d"),
    (dict(logit_scale=None), TypeError, "logit_scale is None; accepted: a number or a 0-d"),
    (dict(logit_scale=ROWS), ValueError, r"logit_scale has shape \[2, 3\]; accepted: a number"),
    (dict(softcap=0.0), ValueError, r"softcap is 0\.0; accepted: a number above 0, or None \(in"),
    (dict(softcap=1e-300), ValueError, r"softcap is 1e-300; accepted: .*in float32: 1\.18e-38"),
    (dict(softcap=True), TypeError, "softcap is True; accepted: a number or a 0-d"),
    (dict(softcap=jnp.array(-2.0)), ValueError, r"softcap is -2\.0; accepted: a number above"),
]
HEADS: Bad = [
    (dict(gamma=1.5), ValueError, r"gamma is 1\.5; accepted: \[0\.0, 1\.0\]"),
    (dict(gamma=float("nan")), ValueError, r"gamma is nan; accepted: \[0\.0, 1\.0\]"),
    (dict(gamma=jnp.array(2.0)), ValueError, r"gamma is 2\.0; accepted: \[0\.0, 1\.0\]"),
    (dict(gamma=np.float32(2)), ValueError, r"gamma is 2\.0; accepted: \[0\.0, 1\.0\]"),
    (dict(gamma="1"), TypeError, r"gamma is '1'; accepted: a number or a 0-d array"),
    (dict(gamma=jnp.ones(2)), ValueError, r"gamma has shape \[2\]; accepted: a number, a 0-d"),
    (dict(gamma=jnp.array(1j)), TypeError, r"gamma is complex64; accepted: .*floats"),
    (dict(detach_next=1), TypeError, r"detach_next is 1; accepted: True or False"),
    (dict(values=LABELS), TypeError, rf"values is int32; accepted: {FLOATS}"),
    (dict(values=0.0), TypeError, r"values is a float; accepted: a jax\.Array"),
    (dict(next_values=ROWS[0]), ValueError, r"next_values has shape \[3\]; accepted: \[2, 3\]"),
]
WEIGHTS: Bad = [
    (dict(token_weights=LABELS), TypeError, r"token_weights is int32; accepted:"),
    (dict(token_weights=ROWS[0]), ValueError, r"token_weights has shape \[3\]; accepted: \[2, 3\]"),
    (dict(reduction="avg"), ValueError, "reduction is 'avg'; accepted: 'mean', 'sum', 'none'"),
    (dict(entropy_coef="1"), TypeError, r"entropy_coef is '1'; accepted: a number or a 0-d"),
    (dict(entropy_coef=jnp.array(True)), TypeError, r"entropy_coef is bool; accepted:"),
    (dict(inplace="no"), TypeError, r"inplace is 'no'; accepted: True or False"),
    (dict(return_metrics=None), TypeError, r"return_metrics is None; accepted: True or False"),
    (dict(inplace=True, reduction="none"), ValueError, "inplace=True with reduction='none'"),
]
ONE_NUMBER: Bad = [
    (dict(num_items=-1), ValueError, r"num_items is -1; accepted: \[0, inf\)"),
    (dict(num_items=jnp.ones(2)), ValueError, r"num_items has shape \[2\]; accepted:"),
    (
        dict(num_items=3, reduction="sum"),
        ValueError,
        r"num_items is given with reduction='sum'; accepted: 'mean'",
    ),
]
TD: Bad = [
    (dict(lam=-0.1), ValueError, r"lam is -0\.1; accepted: \[0\.0, inf\)"),
    (dict(lam=np.array(-1.0)), ValueError, r"lam is -1\.0; accepted: \[0\.0, inf\)"),
    (dict(lam=np.int64(-1)), ValueError, r"lam is -1\.0; accepted: \[0\.0, inf\)"),
    (dict(lam=float("inf")), ValueError, r"lam is inf; accepted: \[0\.0, inf\)"),
    (dict(lam=True), TypeError, r"lam is True; accepted: a number or a 0-d array"),
    (dict(lam=jnp.ones(1)), ValueError, r"lam has shape \[1\]; accepted: a number, a 0-d array"),
]
ONLINE: Bad = [
    (dict(alpha=1.0), ValueError, r"alpha is 1\.0; accepted: \[0\.0, 1\.0\)"),
    (dict(is_expert=True), TypeError, r"is_expert is a bool; accepted: a jax\.Array"),
    (dict(is_expert=LABELS), TypeError, r"is_expert is int32; accepted: bool"),
    (dict(num_items=3), TypeError, r"num_items is 3; accepted: the pair \(expert, agent\)"),
    (dict(num_items=(1, -2)), ValueError, r"num_items is -2; accepted: \[0, inf\)"),
]
CASES = {
    "iqlearn_loss": SHARED + READOUT + WEIGHTS + ONE_NUMBER + HEADS + TD,
    "mle_loss": SHARED + READOUT + WEIGHTS + ONE_NUMBER,
    "online_iqlearn_loss": SHARED + READOUT + WEIGHTS + HEADS + TD + ONLINE,
    "token_stats": SHARED + READOUT + HEADS,
}


def call(name: str, **change: Any) -> Any:
    arguments = dict(logits=LOGITS, labels=LABELS)
    if name == "online_iqlearn_loss":
        arguments["is_expert"] = EXPERT
    arguments.update(change)
    return getattr(irl, name)(**arguments)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [(name, *case) for name, cases in CASES.items() for case in cases],
)
def test_bad_input(name: str, change: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call(name, **change)


@pytest.mark.parametrize("name", CASES)
def test_the_arguments_are_good_otherwise(name: str) -> None:
    call(name)
    with pytest.raises(TypeError, match="lambda_"):
        call(name, lambda_=1.0)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([3, 6], r"cu_seqlens\[0\] is 3; accepted: offsets"),
        ([0, 4, 2, 6], r"cu_seqlens\[2\] is 2 behind 4; accepted: offsets"),
        ([0, 4], r"cu_seqlens\[1\] is 4; accepted: offsets .* the 6 rows"),
    ],
)
def test_offsets(offsets: list[int], message: str) -> None:
    logits, labels = LOGITS.reshape(6, V), LABELS.reshape(6)
    given = jnp.array(offsets)
    for function in (irl.iqlearn_loss, irl.mle_loss, irl.token_stats):
        with pytest.raises(ValueError, match=f"^{message}"):
            function(logits, labels, cu_seqlens=given)
    # of traced ones nothing is known: every label counts as a bad one
    assert jnp.isnan(jax.jit(lambda x: irl.iqlearn_loss(logits, labels, cu_seqlens=x))(given))


@pytest.mark.parametrize("one", [np.float32(0.5), np.array(0.5), np.float64(0.5), jnp.array(0.5)])
def test_numbers_of_numpy_and_jax(one: Any) -> None:
    wanted = irl.iqlearn_loss(LOGITS, LABELS, lam=0.5, gamma=0.5)
    assert irl.iqlearn_loss(LOGITS, LABELS, lam=one, gamma=one) == wanted
    assert jax.jit(lambda x: irl.iqlearn_loss(LOGITS, LABELS, lam=x, gamma=x))(one) == wanted


def test_what_kernels_are_made_for_is_not_traced() -> None:
    wanted = irl.iqlearn_loss(LOGITS + 1, LABELS, logit_scale=0.5, softcap=0.5)
    for one in (np.float32(0.5), np.array(0.5), jnp.array(0.5)):
        assert irl.iqlearn_loss(LOGITS + 1, LABELS, logit_scale=one, softcap=one) == wanted
    for name in ("logit_scale", "softcap"):
        program = jax.jit(lambda x, name=name: irl.iqlearn_loss(LOGITS, LABELS, **{name: x}))
        with pytest.raises(ValueError, match=f"^{name} is traced, .*; accepted: a number, or an"):
            program(0.5)


@pytest.mark.parametrize("name", CASES)
def test_signatures_are_those_of_torch(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (irl, irl_ops.torch))
    groups = {"vocab_group": "vocab_axis", "sequence_group": "sequence_axis"}
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (groups.get(p.name, p.name), p.kind, p.default) for p in theirs.values()
    ]
    assert "options" not in ours and "backend" in ours


def test_bad_input_raises_while_a_program_is_traced() -> None:
    with pytest.raises(ValueError, match=r"labels has shape \[2, 2\]; accepted: \[2, 3\]"):
        jax.jit(irl.iqlearn_loss)(LOGITS, LABELS[:, 1:])


def test_available_backends() -> None:
    names = irl.available_backends()
    assert isinstance(names, tuple) and names[-2:] == ("native", "reference")


def test_a_backend_that_cannot_serve_says_why() -> None:
    with pytest.raises(ValueError, match="backend 'triton' cannot serve logits on cpu: jax-triton"):
        irl.iqlearn_loss(LOGITS, LABELS, backend="triton")
    # of traced logits the device is known when the program is lowered
    program = jax.jit(lambda q: irl.iqlearn_loss(q, LABELS, backend="triton"))
    with pytest.raises(
        ValueError, match=r"kernels for cuda, .* lowered for cpu; accepted: backend"
    ):
        program(LOGITS)
    assert pallas.unavailable("cuda") and native.unavailable("tpu") and triton.unavailable("cpu")


def test_the_environment_names_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRL_OPS_BACKEND", "nothing")
    with pytest.raises(ValueError, match="IRL_OPS_BACKEND is 'nothing'; accepted"):
        irl.iqlearn_loss(LOGITS, LABELS)
    irl.iqlearn_loss(LOGITS, LABELS, backend="reference")  # overrides "auto" alone
    monkeypatch.setenv("IRL_OPS_BACKEND", "reference")
    irl.iqlearn_loss(LOGITS, LABELS)


def test_programs_are_lowered_for_the_platform_that_is_asked_for() -> None:
    """The kernel of each platform, from one traced program."""
    logits = jax.ShapeDtypeStruct((2, 16, 256), "bfloat16")
    labels = jax.ShapeDtypeStruct((2, 16), "int32")
    traced = jax.jit(jax.value_and_grad(irl.iqlearn_loss)).trace(logits, labels)
    texts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu", "rocm")
    }
    assert "tpu_custom_call" in texts["tpu"] and "irl_ops_row_stats_grad" in texts["cpu"]
    assert "custom_call" not in texts["rocm"]


def test_import_needs_no_other_framework() -> None:
    code = "import sys, irl_ops.jax; print(*(n for n in sys.modules if n.count('.') < 2))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(done.stdout.split())
    assert "irl_ops.jax" in loaded
    assert not loaded & {"torch", "triton", "jax_triton", "flax", "jax.experimental.pallas"}
