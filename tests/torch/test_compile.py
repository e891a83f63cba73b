"""The losses under a compiler: one graph, the numbers of eager mode, no look at the data."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_fw_bw_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

import irl_ops.torch as irl
from irl_ops.torch import ops

BACKENDS = irl.available_backends()
V = 33


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(2, 5, V, generator=generator).to(dtype)
    labels = torch.randint(V, (2, 5), generator=generator)
    labels[0, 1] = -100
    return logits.requires_grad_(), labels


SEGMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])
VALUES = torch.linspace(-1, 1, 10).reshape(2, 5)
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "entropy": dict(entropy_coef=0.1, reduction="sum"),
    "none": dict(reduction="none"),
    "segments": dict(segment_ids=SEGMENTS, shift=True, boundary="bootstrap"),
    "positions": dict(position_ids=SEGMENTS, eos_token_id=[3, 4], truncated=VALUES[:, 0] > 0),
    "weights": dict(token_weights=VALUES.abs(), where=VALUES > -0.5, num_items=torch.tensor(7.0)),
    "heads": dict(values=VALUES, next_values=2 * VALUES, detach_next=False),
    "bent": dict(logit_scale=0.5, softcap=3.0),
    "detached": dict(detach_next=True, boundary="drop", gamma=torch.tensor(0.9)),
}


def step(function: Callable[..., Any], logits: Tensor, labels: Tensor, **options: Any) -> list:
    """Loss, metrics and the gradient of the leaf; the logits are computed from it."""
    logits.grad = None
    loss, metrics = function(logits, labels, **options)
    (3 * loss).sum().backward()
    return [loss.detach(), logits.grad, *(metrics[name] for name in sorted(metrics))]


def iqlearn(leaf: Tensor, labels: Tensor, **options: Any) -> Any:
    return irl.iqlearn_loss(leaf * 2, labels, return_metrics=True, **options)


def assert_same(actual: list, expected: list) -> None:
    # a compiler may fuse a multiplication with an addition, and round a scaled gradient once
    dtype = expected[1].dtype
    rounding = 2**-20 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=rounding, atol=2**-20)


@pytest.mark.parametrize(
    ("backend", "compiler", "name"),  # aot_eager captures what eager does, and goes on from there
    [
        *((backend, "aot_eager", name) for backend in ("native", "reference") for name in OPTIONS),
        *((backend, "aot_eager", "default") for backend in BACKENDS[2:]),  # as "reference"
        ("native", "eager", "heads"),
        ("reference", "eager", "heads"),
    ],
)
def test_one_graph(backend: str, compiler: str, name: str) -> None:
    logits, labels = batch()
    options = dict(OPTIONS[name], backend=backend)
    expected = step(iqlearn, logits, labels, **options)
    compiled = torch.compile(iqlearn, fullgraph=True, backend=compiler)
    assert_same(step(compiled, logits, labels, **options), expected)


@pytest.mark.parametrize("name", ["none", "segments", "heads"])
def test_inductor(name: str) -> None:
    logits, labels = batch()
    expected = step(iqlearn, logits, labels, **OPTIONS[name])
    compiled = torch.compile(iqlearn, fullgraph=True)
    assert_same(step(compiled, logits, labels, **OPTIONS[name]), expected)


@pytest.mark.parametrize(
    ("dtype", "compiler"),
    [
        (torch.bfloat16, "aot_eager"),
        (torch.float16, "aot_eager"),
        (torch.bfloat16, "inductor"),
    ],
)
def test_low_precision(dtype: torch.dtype, compiler: str) -> None:
    logits, labels = batch(dtype)
    expected = step(iqlearn, logits, labels)
    compiled = torch.compile(iqlearn, fullgraph=True, backend=compiler)
    assert_same(step(compiled, logits, labels), expected)


@pytest.mark.parametrize(
    ("backend", "compiler"),
    [("native", "inductor"), *((backend, "aot_eager") for backend in BACKENDS)],
)
def test_inplace(backend: str, compiler: str) -> None:
    logits, labels = batch()
    options = dict(entropy_coef=0.1, backend=backend, gamma=0.9)
    expected = step(iqlearn, logits, labels, **options)
    compiled = torch.compile(iqlearn, fullgraph=True, backend=compiler)
    assert_same(step(compiled, logits, labels, **options, inplace=True), expected)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_inplace_on_an_input_of_the_graph(compiler: str) -> None:
    """Logits that were computed outside: their storage is taken all the same, or loudly not."""
    leaf, labels = batch()
    expected = step(iqlearn, leaf, labels)

    @torch.compile(fullgraph=True, backend=compiler)
    def loss(logits: Tensor) -> Any:
        return irl.iqlearn_loss(logits, labels, inplace=True, return_metrics=True)

    try:
        actual = step(lambda leaf, _: loss(2 * leaf), leaf, labels)
    except RuntimeError as error:
        assert "inplace" in str(error) or "in-place" in str(error) or "mutat" in str(error)
    else:
        assert_same(actual, expected)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_other_functions(compiler: str) -> None:
    logits, labels = batch()
    expert = torch.tensor([True, False])

    def online(q: Tensor, labels: Tensor) -> Any:
        return irl.online_iqlearn_loss(q, labels, expert, alpha=0.2, return_metrics=True)

    def mle(q: Tensor, labels: Tensor) -> Any:
        return irl.mle_loss(q, labels, entropy_coef=0.1, return_metrics=True)

    def stats(q: Tensor, labels: Tensor) -> Any:
        s = irl.token_stats(q, labels, gamma=0.9)
        return s.reward.square().mean() - s.logprob.mean() + s.entropy.mean(), {"kind": s.kind}

    for function in (online, mle, stats) if compiler == "aot_eager" else (stats,):
        expected = step(function, logits, labels)
        compiled = torch.compile(function, fullgraph=True, backend=compiler)
        assert_same(step(compiled, logits, labels), expected)


def test_without_a_gradient() -> None:
    logits, labels = batch()
    compiled = torch.compile(iqlearn, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        loss, metrics = compiled(logits, labels)
        expected, expected_metrics = iqlearn(logits, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics, expected_metrics)


def test_annealing_compiles_nothing_anew() -> None:
    counter = CompileCounter()
    logits, labels = batch()

    @torch.compile(fullgraph=True, backend=counter)
    def loss(logits: Tensor, lam: Tensor, gamma: Tensor, kappa: Tensor, items: Tensor) -> Tensor:
        return irl.iqlearn_loss(
            logits, labels, lam=lam, gamma=gamma, entropy_coef=kappa, num_items=items
        )

    results = []
    for i in range(4):
        numbers = [torch.tensor(x) for x in (0.1 * i, 1 - 0.1 * i, 0.2 * i, 3.0 + i)]
        results.append(loss(logits, *numbers).item())
        expected = irl.iqlearn_loss(
            logits,
            labels,
            **dict(zip(("lam", "gamma", "entropy_coef", "num_items"), numbers, strict=True)),
        )
        assert results[-1] == pytest.approx(expected.item(), rel=1e-6)
    assert counter.frame_count == 1 and len(set(results)) == 4

    module = torch.compile(irl.IQLearnLoss(lam=torch.tensor(0.1)), backend=counter)
    counter.clear()
    for lam in (0.1, 0.2, 0.4):
        module.options["lam"].fill_(lam)
        expected = irl.iqlearn_loss(logits, labels, lam=lam).item()
        assert module(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    assert counter.frame_count == 1


def test_varying_lengths() -> None:
    """Batches of another length need at most one more graph."""
    counter = CompileCounter()
    compiled = torch.compile(iqlearn, fullgraph=True, backend=counter)
    for length in (4, 5, 7, 9, 12):
        labels = torch.randint(V, (2, length))
        leaf = torch.randn(2, length, V, requires_grad=True)
        assert_same(step(compiled, leaf, labels), step(iqlearn, leaf, labels))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("shift", [False, True])
def test_a_label_out_of_range_is_named(shift: bool) -> None:
    logits, labels = batch()
    labels[1, 2] = V
    compiled = torch.compile(iqlearn, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=rf"labels\[1, 2\] is {V}"):
        compiled(logits, labels, shift=shift)


@pytest.mark.parametrize("name", OPTIONS)
def test_no_value_is_looked_at(name: str) -> None:
    """On the meta device there are no values: a look at one, as a host sync takes, raises."""
    logits, labels = batch()
    options = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in OPTIONS[name].items()}
    leaf = logits.detach().to("meta").requires_grad_()
    for inplace in (False, True) if name != "none" else (False,):
        loss, gradient, *metrics = step(
            iqlearn, leaf, labels.to("meta"), **options, inplace=inplace, backend="reference"
        )
        assert loss.shape == (labels.shape if name == "none" else ())
        assert gradient.shape == leaf.shape and all(m.shape == () for m in metrics)
    stats = irl.token_stats(leaf, labels.to("meta"), eos_token_id=[1, 2])
    asked = [x for x in stats if x is not None]
    assert all(x.shape == labels.shape for x in asked) and stats.kind.dtype == torch.int8


def test_fake_tensors() -> None:
    """Every operator answers for tensors without data, also on the native backend."""
    with FakeTensorMode():
        leaf = torch.randn(2, 5, V, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(2, 5, dtype=torch.int64)
        for options in (dict(reduction="none"), dict(entropy_coef=0.1), dict(inplace=True)):
            loss, gradient, *_ = step(iqlearn, leaf, labels, **options)
            assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(2, 3, V),
    "strided": lambda: torch.randn(3, 2, V + 3).movedim(0, 1)[..., 1:-2],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("layout", "dtype"), [("contiguous", torch.bfloat16), ("strided", torch.float32)]
)
def test_operators(backend: str, layout: str, dtype: torch.dtype) -> None:
    """torch.library.opcheck: schema, fake tensors, autograd registration, AOT dispatch."""
    logits = LAYOUTS[layout]().to(dtype)
    labels = torch.tensor([[1, -1, 3], [4, 5, V - 1]])
    row = torch.rand(2, 3)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    every = (*tests, "test_aot_dispatch_dynamic")
    for entropy in (False, True):
        arguments = (logits, labels, entropy, backend)
        torch.library.opcheck(ops.row_stats, arguments, test_utils=every)
        differentiable = (logits.detach().requires_grad_(), *arguments[1:])
        torch.library.opcheck(ops.row_stats, differentiable, test_utils=every)
    arguments = (labels, labels, None, V, -100, False)
    torch.library.opcheck(ops.check_labels, arguments, test_utils=every)
    stats = ops.row_stats(logits, labels, True, backend)
    arguments = (logits, labels, stats[0], stats[1], row, row, row, backend)
    torch.library.opcheck(ops.row_grad, arguments, test_utils=every)


ANNEALED: dict[str, list[Any]] = {
    "lam": [0.1, 0.2, 0.3, 0.4],
    "gamma": [0.5, 0.6, 0.7, 0.8],
    "entropy_coef": [0.1, 0.2, 0.3, 0.4],
    "z_loss": [0.1, 0.2, 0.3, 0.4],
    "num_items": [5, 7, 9, 11],
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_over_numbers_and_shapes(
    dynamic: bool | None, dtype: torch.dtype, inplace: bool
) -> None:
    """With default settings the compiler takes the first value of a number for a constant."""

    def loss(logits: Tensor, labels: Tensor, numbers: dict[str, Any]) -> Any:
        return irl.iqlearn_loss(logits * 1, labels, **numbers, inplace=inplace)

    counter = CompileCounter()
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=dynamic)
    for i in range(4):
        logits, labels = torch.randn(2, 5 + i, V), torch.randint(V, (2, 5 + i))
        leaf = logits.to(dtype).requires_grad_()
        numbers = {name: values[i] for name, values in ANNEALED.items()}
        actual, expected = compiled(leaf, labels, numbers), loss(leaf, labels, numbers)
        torch.testing.assert_close(actual, expected, rtol=2**-20, atol=2**-20)
        actual.backward()
    assert counter.frame_count == (1 if dynamic else 2)


@pytest.mark.parametrize("name", ["mle_loss", "online_iqlearn_loss", "token_stats", "tensors"])
def test_one_graph_in_every_function(name: str) -> None:
    expert = torch.tensor([True, False])

    def run(logits: Tensor, labels: Tensor, x: Any) -> Any:
        if name == "mle_loss":
            return irl.mle_loss(logits, labels, entropy_coef=x)
        if name == "online_iqlearn_loss":
            return irl.online_iqlearn_loss(logits, labels, expert, alpha=x, num_items=(3, 4))
        if name == "token_stats":
            return irl.token_stats(logits, labels, gamma=x).reward.sum()
        return irl.iqlearn_loss(logits, labels, lam=x, num_items=10 * x)

    counter = CompileCounter()
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    logits, labels = batch()
    for x in (0.1, 0.2, 0.3, 0.4):
        given = torch.tensor(x) if name == "tensors" else x
        torch.testing.assert_close(
            compiled(logits, labels, given), run(logits, labels, given), rtol=2**-20, atol=2**-20
        )
    assert counter.frame_count == (1 if name == "tensors" else 2)


OPERATORS = {  # of a backend, in the forward and in the backward pass
    "native": ("loss", "claim"),
    "reference": ("row_stats", "row_grad"),
}


@pytest.mark.parametrize(
    ("backend", "dtype"), [("native", torch.bfloat16), ("reference", torch.float32)]
)
def test_the_compiler_makes_no_buffer_of_the_logits_size(backend: str, dtype: torch.dtype) -> None:
    """What is read and written is what one operator in each pass reads and writes.

    Native: 1 read and 1 write, both in the forward pass. Others: 2 reads, 1 write.
    """
    logits, labels = batch(dtype)

    @torch.compile(fullgraph=True)
    def loss(logits: Tensor) -> Any:
        return 3 * irl.iqlearn_loss(logits, labels, entropy_coef=0.1, backend=backend)

    _, codes = run_fw_bw_and_get_code(lambda: loss(logits))
    assert len(codes) == 2  # forward and backward
    made = "empty_strided_cpu((2, 5, 33)", "empty_strided((2, 5, 33)", "clone", "copy_("
    for code, operator in zip(codes, OPERATORS[backend], strict=True):
        body = code[code.index("def call(") :]
        called = re.findall(r"torch\.ops\.irl_ops\.(\w+)\.default\(", body)
        assert [name for name in called if name != "check_labels"] == [operator], body
        assert not [word for word in made if word in body], body
        if operator in ("loss", "claim"):  # and none of it is saved for the backward pass
            assert "check_labels" not in called
            saved = body[body.index("return (") :] if operator == "loss" else body.split("\n", 1)[1]
            assert "primals" not in saved.split("\n")[0], body


def test_errors_keep_their_text() -> None:
    logits, labels = batch()
    for fullgraph in (True, False):
        compiled = torch.compile(
            lambda q: irl.iqlearn_loss(q, labels, lam=-1.0), fullgraph=fullgraph, backend="eager"
        )
        with pytest.raises(Exception, match=r"lam is -1\.0; accepted: \[0\.0, inf\)"):
            compiled(logits)
