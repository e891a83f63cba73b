"""A torch module as the set-up, such as a Transformers model after ``apply_iqlearn``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from irl_ops.debug.arrays import as_is, dtype_name
from irl_ops.debug.documents import documents
from irl_ops.debug.seen import BATCH_KEYS, Part, Seen, Slopes

LOSS_ALONE = (
    "labels", "shift_labels", "num_items_in_batch", "segment_ids", "token_weights", "truncated",
    "where", "values",
)  # fmt: skip
"""What a batch holds for the loss, and a forward that makes logits is not given."""


def see_module(model: nn.Module, batch: Any, gradient: bool) -> Seen:
    """Calls ``model(**batch)``, and the same without labels for its logits."""
    if not isinstance(batch, Mapping) or batch.get("labels") is None:
        given = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"batch={given}; accepted for a module: a mapping that has 'labels'")
    inputs = dict(batch)
    items = inputs.get("num_items_in_batch")
    with unrecorded(model):
        part, loss = see_step(model, inputs, lambda: loss_of(model(**inputs)), gradient)
    return Seen(
        found=float(loss.detach()),
        dtype=dtype_name(loss),
        parts=[part],
        defaults=given_options(model),
        shift=shifts(model, inputs),
        num_items=None if items is None else float(torch.as_tensor(items).flatten()[0]),
        recomputed=True,
    )


def see_step(
    model: nn.Module, inputs: dict[str, Any], step: Callable[[], Any], gradient: bool
) -> tuple[Part, Any]:
    """The loss that ``step`` makes by calling the model, and the logits of a second forward.

    Both run under the same random numbers, so that dropout drops the same. The values of a value
    head (``apply_iqlearn(model, value_head=True)``) are those that the loss was given; no gradient
    goes back through them, so that what is compared is the one through the logits.
    """
    labels = inputs["labels"] if inputs.get("shift_labels") is None else inputs["shift_labels"]
    devices = [labels.device] if labels.device.type == "cuda" else []
    asked: list[Tensor] = []
    watched: list[Tensor] = []
    called: list[dict[str, Any]] = []
    values: list[Tensor] = []
    with torch.random.fork_rng(devices), head_inputs(model, asked), _grad(gradient):
        with arguments(model, called), value_head_outputs(model, values):
            loss = step()
    added = {name: x for name, x in (called or [{}])[0].items() if name == "use_cache"}
    plain = without_labels(model, {**inputs, **added})  # a cache changes how packing is seen
    with torch.random.fork_rng(devices), head_inputs(model, watched), _grad(gradient):
        logits = logits_of(model(**plain))
    part = Part(logits.detach(), labels, facts(inputs))
    if values:
        part.facts.setdefault("values", as_is(values[0][..., 0]))
    if gradient and len(asked) == 1 and len(watched) == 1 and asked[0].requires_grad:
        (found,) = torch.autograd.grad(loss, asked[0], allow_unused=True, retain_graph=False)
        found = torch.zeros_like(asked[0]) if found is None else found
        pulled = _pull_back(logits, watched[0])
        name = "the last layer's input"
        part.slopes = Slopes(name, _float32(found), pulled, dtype_name(logits))
    return part, loss.detach()


def _pull_back(logits: Tensor, hidden: Tensor) -> Callable[[Any], NDArray[np.float32]]:
    def pulled(dlogits: NDArray[np.float32]) -> NDArray[np.float32]:
        above = torch.from_numpy(dlogits).to(logits)
        (slope,) = torch.autograd.grad(logits, hidden, above, retain_graph=True)
        return _float32(slope)

    return pulled


def _float32(x: Tensor) -> NDArray[np.float32]:
    plain: NDArray[np.float32] = x.detach().to("cpu", torch.float32).numpy()
    return plain


def _grad(gradient: bool) -> Any:
    return torch.set_grad_enabled(gradient)


@contextmanager
def arguments(model: nn.Module, called: list[dict[str, Any]]) -> Generator[None]:
    """Appends what the model is called with, which a Trainer may have added to."""
    names = list(inspect.signature(unwrapped(model).forward).parameters)

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.append({**dict(zip(names, args, strict=False)), **kwargs})

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def head_inputs(model: nn.Module, watched: list[Tensor]) -> Generator[None]:
    """Appends what the last layer is given; nothing where the model does not say which it is."""
    named = getattr(unwrapped(model), "get_output_embeddings", None)
    head = None if named is None else named()
    if not isinstance(head, nn.Module):
        yield
        return
    handle = head.register_forward_pre_hook(lambda module, args: watched.extend(args[:1]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def value_head_outputs(model: nn.Module, values: list[Tensor]) -> Generator[None]:
    """Appends what a value head returns, and cuts the graph in front of it."""
    head = getattr(unwrapped(model), "value_head", None)
    if not isinstance(head, nn.Module):
        yield
        return
    handles = (
        head.register_forward_pre_hook(lambda module, args: tuple(x.detach() for x in args)),
        head.register_forward_hook(lambda module, args, out: values.append(out.detach())),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without_labels(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch for a forward that computes logits and no loss."""
    plain = {name: x for name, x in inputs.items() if name not in LOSS_ALONE}
    inner = unwrapped(model)
    config = getattr(inner, "config", None)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in plain:
        prepare: Any = inner.prepare_decoder_input_ids_from_labels
        plain["decoder_input_ids"] = prepare(labels=inputs["labels"].clone())
    return plain


def loss_of(outputs: Any) -> Tensor:
    """The loss in a module's outputs."""
    if isinstance(outputs, Tensor):
        return outputs.reshape(())
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(
            f"the module returned {type(outputs).__name__} with loss={type(loss).__name__}; "
            "accepted: a loss, a tuple that begins with one, or a mapping with 'loss'"
        )
    return loss.reshape(())


def logits_of(outputs: Any) -> Tensor:
    """The logits in a module's outputs."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(logits, Tensor):
        raise TypeError(
            "without labels the module returns no logits; accepted: a tensor, a tuple that begins "
            "with one, or a mapping with 'logits'"
        )
    return logits


def facts(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a batch says of its rows, as options of the loss."""
    found = {
        name: as_is(inputs[name])
        for name in BATCH_KEYS
        if name not in ("position_ids", "cu_seqlens", "num_items") and inputs.get(name) is not None
    }
    if "segment_ids" not in found:
        ids = documents(inputs)
        if ids is not None:
            found["segment_ids"] = ids
    return found


def shifts(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether logits[t] scores labels[t + 1], as decoders of Transformers have it."""
    config = getattr(unwrapped(model), "config", None)
    coded = getattr(config, "is_encoder_decoder", False)
    return not coded and inputs.get("shift_labels") is None


def given_options(model: nn.Module) -> dict[str, Any]:
    """The options of ``apply_iqlearn``, where the model is one of it."""
    loss = _applied(model)
    options = {} if loss is None else dict(loss.options)
    return {name: as_is(x) for name, x in options.items() if name not in ("inplace", "backend")}


@contextmanager
def unrecorded(model: nn.Module) -> Generator[None]:
    """Leaves the metrics of ``apply_iqlearn`` as they were: what is checked is no step."""
    loss = _applied(model)
    if loss is None:
        yield
        return
    sums, kept = dict(loss._sums), {n: x for n, x in vars(loss).items() if n != "_sums"}
    try:
        yield
    finally:
        vars(loss).update(kept)
        loss._sums.clear()
        loss._sums.update(sums)


def _applied(model: nn.Module) -> Any:
    """What ``apply_iqlearn`` has put on a model, whoever wraps it."""
    for module in model.modules():
        forward = vars(module).get("_iqlearn")
        if forward is not None:
            return forward.loss
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP1, torch.compile and PEFT."""
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return unwrapped(inner)
    base = getattr(model, "get_base_model", None)
    return model if base is None else base()
