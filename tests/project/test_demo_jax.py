"""The JAX demo: one run of it from end to end, and its model."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "jax_finetune.py"
sys.path.insert(0, str(DEMO.parent))  # the examples are scripts, not a package

import jax_decoder  # noqa: E402
import jax_finetune  # noqa: E402

EOS = 3


@pytest.fixture(scope="module")
def model():
    return jax_decoder.Decoder(11, 16, 2, rngs=nnx.Rngs(0))


def test_no_position_sees_what_comes_later(model):
    ids = jnp.array([[4, 5, 6, 7, 8]])
    changed = ids.at[0, 3].set(9)
    difference = jnp.abs(model(ids) - model(changed)).max(-1)[0]
    assert (difference[:3] == 0).all() and (difference[3:] > 0).all()


def test_steps_with_a_cache_give_the_logits_of_the_whole(model):
    ids = jnp.array([[4, 5, 6, 7], [5, 5, 1, 2]])
    caches = [(jnp.zeros((2, 4, 4, 4)), jnp.zeros((2, 4, 4, 4))) for _ in model.blocks]
    rows = []
    for position in range(4):
        starts = jnp.zeros(2, int)
        logits, caches = model.step(ids[:, position], jnp.array(position), starts, caches)
        rows.append(logits)
    # float32 products summed in another order, through two layers
    np.testing.assert_allclose(jnp.stack(rows, 1), model(ids), atol=1e-5)


def test_decoding_goes_on_from_left_padded_prompts_until_the_end_token(model):
    prompts, starts = jnp.array([[0, 0, 4, 5], [6, 7, 8, 9]]), jnp.array([2, 0])
    key = jax.random.key(1)
    out = jax_decoder.decode(model, prompts, starts, 40, EOS, key)
    assert out.shape == (2, 40)
    for row in out.tolist():
        if EOS in row:
            assert set(row[row.index(EOS) :]) == {EOS}
    padding = prompts.at[0, 0].set(10)  # what lies before a prompt is not looked at
    np.testing.assert_array_equal(jax_decoder.decode(model, padding, starts, 40, EOS, key), out)


def test_maximum_likelihood_is_iqlearn_without_its_td_term():
    logits = jax.random.normal(jax.random.key(0), (2, 6, 11))
    labels = jnp.array([[-100, 4, 5, 6, EOS, -100], [-100, -100, 1, 2, 3, 4]])
    iqlearn = jax_finetune.loss_of(0.1, 1.0, EOS)
    without = jax_finetune.functools.partial(iqlearn, lam=0.0)
    np.testing.assert_allclose(without(logits, labels), jax_finetune.mle(logits, labels), rtol=1e-6)
    assert iqlearn(logits, labels) > without(logits, labels)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEMO), *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return numbers(list(value.values()))
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.slow
def test_a_quick_run_leaves_a_table_a_figure_and_finite_numbers(tmp_path):
    out = tmp_path / "out"
    options = ("--quick", "--lams", "0", "0.5", "--gamma", "0.9", "--save-models")
    finished = run(*options, "--out", str(out))
    assert finished.returncode == 0, finished.stderr
    for word in ("NLL", "TD²", "Self-", "MLE", "IQLearn λ=0.5", "One seed", "optax"):
        assert word in finished.stdout
    assert (out / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [run["lam"] for run in results["runs"]] == [0.0, 0.5]
    assert all(map(math.isfinite, numbers(results)))
    for one in results["runs"]:
        assert one["curve"][0] == results["runs"][0]["curve"][0]  # one starting point
        assert one["curve"][-1] == [results["steps"], one["nll"], one["td"]]
        low, high = one["loss_ms_quartiles"]
        assert 0 < low <= one["loss_ms"] <= high
        with np.load(out / one["model"] / "model.npz") as weights:
            assert sum(weights[name].size for name in weights) == results["parameters"]
            assert "embed/embedding" in weights
        assert one["loss_mb"] > 0 and one["step_ms"] > 0
    assert results["runs"][0]["curve"] != results["runs"][1]["curve"]  # the loss was taken up
    assert {"jax", "flax", "optax", "irl_ops"} <= results["versions"].keys()
    samples = json.loads((out / "samples.json").read_text(encoding="utf-8"))
    assert [len(one["samples"]) for one in samples] == [results["prompts"]] * 2


def test_a_bad_file_ends_in_one_message(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{", encoding="utf-8")
    finished = run("--quick", "--data", str(path))
    assert finished.returncode == 1
    # not at the start: plugins of JAX may have logged something before
    assert f"error: {path}, line 1: not JSON" in finished.stderr
    assert "Traceback" not in finished.stderr
