"""Bad input raises at once, and says which argument, what came and what is accepted."""

from typing import Any

import pytest
import torch
from torch import Tensor

import irl_ops.torch as irl

V = 17
LOGITS = torch.zeros(2, 3, V)
LABELS = torch.zeros(2, 3, dtype=torch.int64)
EXPERT = torch.tensor([True, False])
ROWS = torch.zeros(2, 3)
GRAD = torch.tensor(0.5, requires_grad=True)
FLOATS = "torch.float32, torch.bfloat16, torch.float16, torch.float64"
BOUNDARIES = "'terminal', 'bootstrap', 'drop'"

# (function, change of the arguments, error, what the message says)
LOGITS_AND_LABELS: list[tuple[dict[str, Any], type, str]] = [
    (dict(logits=LOGITS.tolist()), TypeError, r"logits is a list; accepted: a torch\.Tensor"),
    (dict(labels=[1, 2, 3]), TypeError, r"labels is a list; accepted: a torch\.Tensor"),
    (dict(logits=LOGITS.long()), TypeError, rf"logits is torch\.int64; accepted: {FLOATS}"),
    (dict(labels=LABELS.float()), TypeError, r"labels is torch\.float32; accepted: torch\.int32"),
    (dict(labels=LABELS.short()), TypeError, r"labels is torch\.int16; accepted: .*torch\.int64"),
    (dict(logits=torch.zeros(V)), ValueError, r"logits has shape \[17\]; accepted: \[\.\.\., T, V"),
    (dict(logits=LOGITS[..., :0]), ValueError, r"logits has shape \[2, 3, 0\]; accepted: .*V of 1"),
    (dict(labels=LABELS[:, 1:]), ValueError, r"labels has shape \[2, 2\]; accepted: \[2, 3\]"),
    (dict(labels=LABELS[0]), ValueError, r"labels has shape \[3\]; accepted: \[2, 3\]"),
    (dict(labels=LABELS.to("meta")), ValueError, r"labels is on meta; accepted: cpu"),
]
SEQUENCES: list[tuple[dict[str, Any], type, str]] = [
    (dict(ignore_index=0.5), TypeError, r"ignore_index is 0\.5; accepted: an int"),
    (dict(ignore_index=None), TypeError, r"ignore_index is None; accepted: an int"),
    (dict(ignore_index=torch.tensor(3)), TypeError, r"ignore_index is .*; accepted: an int"),
    (dict(shift=1), TypeError, r"shift is 1; accepted: True or False"),
    (dict(where=LABELS), TypeError, r"where is torch\.int64; accepted: torch\.bool"),
    (dict(where=EXPERT), ValueError, r"where has shape \[2\]; accepted: \[2, 3\]"),
    (dict(where=[True]), TypeError, r"where is a list; accepted: a torch\.Tensor"),
    (dict(where=(ROWS > 0).to("meta")), ValueError, r"where is on meta; accepted: cpu"),
    (dict(segment_ids=ROWS), TypeError, r"segment_ids is torch\.float32; accepted: torch\.int32"),
    (dict(segment_ids=LABELS[0]), ValueError, r"segment_ids has shape \[3\]; accepted: \[2, 3\]"),
    (dict(segment_ids=LABELS.to("meta")), ValueError, r"segment_ids is on meta; accepted: cpu"),
    (dict(position_ids=ROWS), TypeError, r"position_ids is torch\.float32; accepted:"),
    (dict(position_ids=LABELS[0]), ValueError, r"position_ids has shape \[3\]; accepted: \[2, 3\]"),
    (
        dict(segment_ids=LABELS, position_ids=LABELS),
        ValueError,
        "segment_ids and position_ids are given; accepted: at most one of segment_ids",
    ),
    (
        dict(segment_ids=LABELS, cu_seqlens=torch.tensor([0, 3])),
        ValueError,
        "segment_ids and cu_seqlens are given; accepted: at most one",
    ),
    (
        dict(cu_seqlens=torch.tensor([0, 3])),
        ValueError,
        r"cu_seqlens has shape \[2\] and labels \[2, 3\]; accepted: .*\[S\+1\] with logits \[N, V",
    ),
    (dict(cu_seqlens=[0, 3]), TypeError, r"cu_seqlens is a list; accepted: a torch\.Tensor"),
    (dict(cu_seqlens=torch.zeros(2)), TypeError, r"cu_seqlens is torch\.float32; accepted:"),
    (
        dict(cu_seqlens=torch.tensor([[0, 3]])),
        ValueError,
        r"cu_seqlens has shape \[1, 2\]",
    ),
]
EPISODES: list[tuple[dict[str, Any], type, str]] = [
    (dict(eos_token_id="a"), TypeError, r"eos_token_id is 'a'; accepted: an int, a sequence"),
    (dict(eos_token_id=[]), TypeError, r"eos_token_id is \[\]; accepted: an int, a sequence"),
    (dict(eos_token_id=[1, 2.0]), TypeError, r"eos_token_id is \[1, 2\.0\]; accepted: an int"),
    (dict(eos_token_id=True), TypeError, r"eos_token_id is True; accepted: an int"),
    (dict(boundary="end"), ValueError, rf"boundary is 'end'; accepted: {BOUNDARIES}"),
    (dict(boundary=None), ValueError, rf"boundary is None; accepted: {BOUNDARIES}"),
    (dict(truncated=True), TypeError, r"truncated is a bool; accepted: a torch\.Tensor"),
    (dict(truncated=LABELS), TypeError, r"truncated is torch\.int64; accepted: torch\.bool"),
    (
        dict(truncated=torch.ones(3, dtype=torch.bool)),
        ValueError,
        r"truncated has shape \[3\]; accepted: \[2, 3\], .*or that without its last axis",
    ),
    (dict(truncated=EXPERT.to("meta")), ValueError, r"truncated is on meta; accepted: cpu"),
]
HEADS: list[tuple[dict[str, Any], type, str]] = [
    (dict(gamma=1.5), ValueError, r"gamma is 1\.5; accepted: \[0\.0, 1\.0\]"),
    (dict(gamma=-0.1), ValueError, r"gamma is -0\.1; accepted: \[0\.0, 1\.0\]"),
    (dict(gamma=float("nan")), ValueError, r"gamma is nan; accepted: \[0\.0, 1\.0\]"),
    (dict(gamma="1"), TypeError, r"gamma is '1'; accepted: a number or a 0-d tensor"),
    (dict(gamma=None), TypeError, r"gamma is None; accepted: a number or a 0-d tensor"),
    (dict(gamma=torch.ones(2)), ValueError, r"gamma has shape \[2\]; accepted: a number, a 0-d"),
    (dict(gamma=torch.tensor(1j)), TypeError, r"gamma is torch\.complex64; accepted: .*floats"),
    (dict(gamma=torch.ones((), device="meta")), ValueError, r"gamma is on meta; accepted: cpu"),
    (dict(detach_next=1), TypeError, r"detach_next is 1; accepted: True or False"),
    (dict(gamma=GRAD), ValueError, r"gamma requires a gradient.*accepted: gamma\.detach\(\)"),
    (dict(values=LABELS), TypeError, rf"values is torch\.int64; accepted: {FLOATS}"),
    (dict(values=ROWS[:, 1:]), ValueError, r"values has shape \[2, 2\]; accepted: \[2, 3\]"),
    (dict(values=0.0), TypeError, r"values is a float; accepted: a torch\.Tensor"),
    (dict(next_values=ROWS[0]), ValueError, r"next_values has shape \[3\]; accepted: \[2, 3\]"),
    (dict(next_values=ROWS.to("meta")), ValueError, r"next_values is on meta; accepted: cpu"),
]
WEIGHTS: list[tuple[dict[str, Any], type, str]] = [
    (dict(token_weights=LABELS), TypeError, r"token_weights is torch\.int64; accepted:"),
    (dict(token_weights=ROWS[0]), ValueError, r"token_weights has shape \[3\]; accepted: \[2, 3\]"),
    (dict(token_weights=1.0), TypeError, r"token_weights is a float; accepted: a torch\.Tensor"),
    (dict(token_weights=ROWS.to("meta")), ValueError, r"token_weights is on meta; accepted: cpu"),
    (
        dict(token_weights=torch.ones(2, 3, requires_grad=True)),
        ValueError,
        r"token_weights requires a gradient",
    ),
    (
        dict(reduction="avg"),
        ValueError,
        "reduction is 'avg'; accepted: 'mean', 'sum', 'none'",
    ),
    (dict(entropy_coef="1"), TypeError, r"entropy_coef is '1'; accepted: a number or a 0-d"),
    (dict(entropy_coef=torch.ones(1)), ValueError, r"entropy_coef has shape \[1\]; accepted:"),
    (dict(entropy_coef=torch.tensor(True)), TypeError, r"entropy_coef is torch\.bool; accepted:"),
    (dict(inplace="no"), TypeError, r"inplace is 'no'; accepted: True or False"),
    (dict(return_metrics=None), TypeError, r"return_metrics is None; accepted: True or False"),
    (dict(inplace=True, reduction="none"), ValueError, "inplace=True with reduction='none'"),
    (dict(entropy_coef=GRAD), ValueError, r"entropy_coef requires a gradient"),
    (dict(entropy_coef=float("nan")), ValueError, r"entropy_coef is nan"),
]
ONE_NUMBER: list[tuple[dict[str, Any], type, str]] = [
    (dict(num_items=-1), ValueError, r"num_items is -1; accepted: \[0, inf\)"),
    (dict(num_items="3"), TypeError, r"num_items is '3'; accepted: a number or a 0-d tensor"),
    (dict(num_items=torch.ones(2)), ValueError, r"num_items has shape \[2\]; accepted:"),
    (dict(num_items=torch.ones((), device="meta")), ValueError, "num_items is on meta; accepted"),
    (dict(num_items=GRAD), ValueError, "num_items requires a gradient"),
    (
        dict(num_items=3, reduction="sum"),
        ValueError,
        r"num_items is given with reduction='sum'; accepted: 'mean'",
    ),
    (
        dict(num_items=3, reduction="none"),
        ValueError,
        r"num_items is given with reduction='none'; accepted: 'mean'",
    ),
]
TD: list[tuple[dict[str, Any], type, str]] = [
    (dict(lam=-0.1), ValueError, r"lam is -0\.1; accepted: \[0\.0, inf\)"),
    (dict(lam=float("inf")), ValueError, r"lam is inf; accepted: \[0\.0, inf\)"),
    (dict(lam=float("nan")), ValueError, r"lam is nan; accepted: \[0\.0, inf\)"),
    (dict(lam="0"), TypeError, r"lam is '0'; accepted: a number or a 0-d tensor"),
    (dict(lam=True), TypeError, r"lam is True; accepted: a number or a 0-d tensor"),
    (dict(lam=torch.ones(1)), ValueError, r"lam has shape \[1\]; accepted: a number, a 0-d tensor"),
    (dict(lam=GRAD), ValueError, r"lam requires a gradient.*accepted: lam\.detach\(\)"),
]
ONLINE: list[tuple[dict[str, Any], type, str]] = [
    (dict(alpha=1.0), ValueError, r"alpha is 1\.0; accepted: \[0\.0, 1\.0\)"),
    (dict(alpha=-0.1), ValueError, r"alpha is -0\.1; accepted: \[0\.0, 1\.0\)"),
    (dict(alpha="0"), TypeError, r"alpha is '0'; accepted: a number or a 0-d tensor"),
    (dict(alpha=GRAD), ValueError, r"alpha requires a gradient"),
    (dict(is_expert=True), TypeError, r"is_expert is a bool; accepted: a torch\.Tensor"),
    (dict(is_expert=LABELS), TypeError, r"is_expert is torch\.int64; accepted: torch\.bool"),
    (
        dict(is_expert=torch.ones(3, dtype=torch.bool)),
        ValueError,
        r"is_expert has shape \[3\]; accepted: \[2, 3\], .*or that without its last axis",
    ),
    (dict(is_expert=EXPERT.to("meta")), ValueError, r"is_expert is on meta; accepted: cpu"),
    (dict(num_items=3), TypeError, r"num_items is 3; accepted: the pair \(expert, agent\)"),
    (dict(num_items=(1, 2, 3)), TypeError, r"num_items is \(1, 2, 3\); accepted: the pair"),
    (dict(num_items=(1, -2)), ValueError, r"num_items is -2; accepted: \[0, inf\)"),
    (dict(num_items=(1, "2")), TypeError, r"num_items is '2'; accepted: a number"),
    (dict(num_items=(1, 2), reduction="sum"), ValueError, r"num_items is given with reduction"),
]
BACKEND: list[tuple[dict[str, Any], type, str]] = [
    (dict(backend="cuda"), ValueError, r"backend is 'cuda'; accepted: 'auto', .*'reference'"),
    (dict(backend=["native"]), ValueError, r"backend is \['native'\]; accepted: 'auto'"),
    (dict(backend=None), (ValueError, TypeError), "backend is None; accepted"),
]
READOUT: list[tuple[dict[str, Any], type, str]] = [
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
    (dict(softcap=torch.tensor(-2.0)), ValueError, r"softcap is -2\.0; accepted: a number above"),
    (dict(softcap=GRAD), ValueError, r"softcap requires a gradient.*accepted: softcap\.detach"),
]
SHARED = LOGITS_AND_LABELS + SEQUENCES + EPISODES + BACKEND + READOUT
CASES = {
    "iqlearn_loss": SHARED + WEIGHTS + ONE_NUMBER + HEADS + TD,
    "mle_loss": SHARED + WEIGHTS + ONE_NUMBER,
    "online_iqlearn_loss": SHARED + WEIGHTS + HEADS + TD + ONLINE,
    "token_stats": SHARED + HEADS,
    "IQLearnLoss": LOGITS_AND_LABELS + TD,
}


def call(name: str, **change: Any) -> Any:
    arguments = dict(logits=LOGITS, labels=LABELS)
    if name == "online_iqlearn_loss":
        arguments["is_expert"] = EXPERT
    arguments.update(change)
    if name == "IQLearnLoss":
        logits, labels = arguments.pop("logits"), arguments.pop("labels")
        return irl.IQLearnLoss(**arguments)(logits, labels)
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


def test_unknown_options() -> None:
    for name in CASES:
        with pytest.raises(TypeError, match="lambda_"):
            call(name, lambda_=1.0)
    with pytest.raises(TypeError, match="IQLearnLoss has no option 'logits'"):
        irl.IQLearnLoss(logits=LOGITS)


def test_available_backends() -> None:
    """Fastest first; the package's own build has both on a CPU."""
    names = irl.available_backends()
    assert isinstance(names, tuple) and names[-2:] == ("native", "reference")


def test_a_backend_that_cannot_serve_says_why() -> None:
    logits, labels = LOGITS.to("meta"), LABELS.to("meta")
    with pytest.raises(ValueError, match=r"backend 'native' cannot serve .* on meta: .*CPU"):
        irl.iqlearn_loss(logits, labels, backend="native")


def test_the_environment_names_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRL_OPS_BACKEND", "nothing")
    with pytest.raises(ValueError, match="IRL_OPS_BACKEND is 'nothing'; accepted"):
        irl.iqlearn_loss(LOGITS, LABELS)
    irl.iqlearn_loss(LOGITS, LABELS, backend="reference")  # overrides "auto" alone
    monkeypatch.setenv("IRL_OPS_BACKEND", "reference")
    irl.iqlearn_loss(LOGITS, LABELS)
    monkeypatch.setenv("IRL_OPS_BACKEND", "")  # as if it were not set
    irl.iqlearn_loss(LOGITS, LABELS)


@pytest.mark.parametrize("backend", irl.available_backends())
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("label", [V, -1, -99, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("name", ["iqlearn_loss", "mle_loss", "online_iqlearn_loss", "token_stats"])
def test_a_label_out_of_range_is_named(
    name: str, label: int, dtype: torch.dtype, backend: str
) -> None:
    labels = LABELS.to(dtype).clone()
    labels[1, 2] = label
    message = rf"labels\[1, 2\] is {label}; accepted: 0 to 16 .*ignore_index=-100"
    for shift in (False, True):
        for grad in (False, True):
            logits = LOGITS.clone().requires_grad_(grad)
            with pytest.raises(IndexError, match=message):
                call(name, logits=logits, labels=labels, shift=shift, backend=backend)


def test_labels_that_no_row_scores_may_be_anything() -> None:
    def finite(labels: Tensor, **options: Any) -> None:
        logits = LOGITS.clone().requires_grad_()
        loss = irl.iqlearn_loss(logits, labels, **options)
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()

    labels = LABELS.clone()
    labels[1, 0] = 999
    finite(labels, shift=True)  # the first label is dropped
    finite(labels, where=labels < V)
    finite(labels, ignore_index=999)
    labels[0, 2] = -7  # the first label of a segment is dropped
    segments = torch.tensor([[0, 0, 1], [0, 0, 0]])
    finite(labels, shift=True, segment_ids=segments)
    with pytest.raises(IndexError, match=r"labels\[0, 2\] is -7"):
        finite(labels, shift=True)
    flat = torch.tensor([1, 2, 40])
    with pytest.raises(IndexError, match=r"labels\[2\] is 40"):
        irl.iqlearn_loss(LOGITS[0], flat)
    with pytest.raises(IndexError, match=r"labels\[1\] is 2\b"):  # one column
        irl.token_stats(LOGITS[0, :, :1], torch.tensor([0, 2, 0]))
    with pytest.raises(IndexError, match=r"labels\[0, 0, 1\] is -100; .*ignore_index=-1"):
        irl.mle_loss(
            LOGITS[None],
            torch.full((1, 2, 3), -1).index_fill(2, torch.tensor([1]), -100),
            ignore_index=-1,
        )
