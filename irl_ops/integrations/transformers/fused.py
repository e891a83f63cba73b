"""Logits that are never stored: the model's last layer gives way to the loss of its input.

During a forward that trains, the last layer is replaced by one that returns a stand-in for its
output. What the model does with the logits (a scale, a soft cap, a bias) the stand-in takes down;
anything else raises. The loss then calls the layer itself, whose forward is for that call the loss
of hidden states and weight: inside it FSDP and ZeRO have gathered the weight, and adapters have
chosen theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from irl_ops.torch import linear_iqlearn_loss

Function = TypeVar("Function", bound=Callable[..., Any])

ACCEPTED = "accepted: fused_linear=False, which stores the logits"

# Those of their forward hooks leave what a layer returns as it is, up to its dtype.
HOOKS = ("torch.distributed.fsdp.", "deepspeed.")


def uncompiled(function: Function) -> Function:
    """``torch.compile`` leaves this out, and compiles what is before and behind it."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return, no-untyped-call]


class LinearLogits(NamedTuple):
    """q = softcap tanh(scale x / softcap), x = hidden weight^T + bias: logits as what makes them.

    Only while the last layer's forward runs: afterwards a sharded weight is gone.
    """

    hidden: Tensor  # [B, T, D]
    weight: Tensor  # [V, D]
    layer: dict[str, Any]  # bias, logit_scale, softcap

    @property
    def device(self) -> torch.device:
        """That of all of them."""
        return self.hidden.device

    def iqlearn_loss(self, labels: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """``irl_ops.torch.iqlearn_loss`` of the logits, with its metrics."""
        found: tuple[Tensor, dict[str, Tensor]] = linear_iqlearn_loss(
            self.hidden, self.weight, labels, return_metrics=True, **self.layer, **options
        )
        return found


class Made(NamedTuple):
    """How logits come out of the layer: q = bound tanh(factor x), or factor x without a bound."""

    layer: nn.Module
    hidden: Tensor
    bias: Tensor | None = None  # beside the layer's own
    factor: Any = 1.0
    bound: Any = None


class UnstoredLogits(Tensor):
    """Stands for logits [B, T, V]: it has their shape, dtype and device, and no elements."""

    made: Made

    @staticmethod
    @uncompiled
    def __new__(cls, made: Made, dtype: torch.dtype) -> UnstoredLogits:
        """Of the shape that ``made.layer`` would return."""
        shape = (*made.hidden.shape[:-1], made.layer.out_features)
        logits = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=made.hidden.device)
        logits.made = made
        return logits

    def __repr__(self) -> str:  # type: ignore[override]  # noqa: D105
        return f"UnstoredLogits({list(self.shape)}, {self.dtype})"

    @classmethod
    @uncompiled
    def __torch_function__(  # noqa: D105
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # an attribute: its name is that of the descriptor
            name = func.__self__.__name__
        if name in READ:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs or {})
        if name not in RULES:
            _refuse(name)
        return RULES[name](*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # noqa: D105
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        _refuse(str(func))

    @uncompiled
    def within_layer(self, compute: Callable[[LinearLogits], Tensor]) -> Tensor:
        """``compute`` of the logits, called where the layer has its weight."""
        made = self.made

        def of(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
            def forward(hidden: Tensor) -> Tensor:
                # a clone: FSDP hangs a hook on it, which a view would lose where a Trainer scales
                # it; what is no tensor, a loss with its metrics, is left to who computes it
                found = compute(_logits(made, linear, hidden))
                return found.clone() if isinstance(found, Tensor) else found

            return forward

        with ExitStack() as stack:
            for linear in linears(made.layer):
                stack.enter_context(_forward_of(linear, of(linear)))
            found: Tensor = made.layer(made.hidden)
            return found


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        f"fused_linear=True: the model calls {what} on its logits; accepted: a scale, a soft cap, "
        "a bias before them, a cast, or fused_linear=False, which stores the logits"
    )


def _logits(made: Made, linear: nn.Linear, hidden: Tensor) -> LinearLogits:
    weight = linear.weight
    whole = (linear.out_features, linear.in_features)
    if type(weight) not in (nn.Parameter, Tensor) or weight.shape != whole:
        raise NotImplementedError(
            f"fused_linear=True: the last layer's weight is a {type(weight).__name__} of shape "
            f"{list(weight.shape)} where its forward runs, parted over devices or of another kind; "
            f"accepted: a plain tensor {list(whole)}, or fused_linear=False, which stores them"
        )
    bias: Tensor | None = linear.bias
    if made.bias is not None:
        added = made.bias.to(device=hidden.device, dtype=weight.dtype)
        bias = added if bias is None else bias + added
    scale = made.factor if made.bound is None else made.factor * made.bound
    layer = {"bias": bias, "logit_scale": scale, "softcap": made.bound}
    return LinearLogits(hidden, weight, layer)


# -------------------------------------------------------------------------------------------------
# What may become of logits
# -------------------------------------------------------------------------------------------------


def _number(name: str, value: Any) -> Any:
    """A factor: not by which anything is differentiated, and one for all logits."""
    if isinstance(value, Tensor) and (value.numel() != 1 or value.requires_grad):
        _refuse(f"{name} by a tensor that is trained or no single number")
    return value.detach().reshape(()) if isinstance(value, Tensor) else value


def _scaled(logits: UnstoredLogits, by: Any, name: str, inverse: bool = False) -> UnstoredLogits:
    made, by = logits.made, _number(name, by)
    if not by > 0:
        _refuse(f"{name} by {by}")
    by = 1 / by if inverse else by
    if made.bound is None:
        made = made._replace(factor=made.factor * by)
    else:
        made = made._replace(bound=made.bound * by)
    return UnstoredLogits(made, logits.dtype)


def _mul(x: Any, y: Any) -> UnstoredLogits:
    logits, by = (x, y) if isinstance(x, UnstoredLogits) else (y, x)
    return _scaled(logits, by, "mul")


def _div(x: Any, y: Any) -> UnstoredLogits:
    if not isinstance(x, UnstoredLogits):
        _refuse("div with them as the divisor")
    return _scaled(x, y, "div", inverse=True)


def _tanh(x: UnstoredLogits) -> UnstoredLogits:
    if x.made.bound is not None:
        _refuse("tanh twice")
    return UnstoredLogits(x.made._replace(bound=1.0), x.dtype)


def _add(x: Any, y: Any) -> UnstoredLogits:
    logits, bias = (x, y) if isinstance(x, UnstoredLogits) else (y, x)
    made = logits.made
    untouched = made.bound is None and isinstance(made.factor, float) and made.factor == 1.0
    row = isinstance(bias, Tensor) and bias.numel() == bias.shape[-1] == logits.shape[-1]
    if not untouched or not row or isinstance(bias, UnstoredLogits):
        _refuse("add of what is no bias [V], or after a scale")
    bias = bias.reshape(-1)
    return UnstoredLogits(
        made._replace(bias=bias if made.bias is None else made.bias + bias), logits.dtype
    )


def _cast(x: UnstoredLogits, *args: Any, **kwargs: Any) -> UnstoredLogits:
    """``to`` in all its forms; the loss rounds to the layer's dtype and computes in float32."""
    for given in (*args, *kwargs.values()):
        dtype = given.dtype if isinstance(given, Tensor) else given
        if isinstance(dtype, torch.dtype):
            return UnstoredLogits(x.made, dtype)
    return x


def _same(x: UnstoredLogits, *args: Any, **kwargs: Any) -> UnstoredLogits:
    return x


def _all_of(x: UnstoredLogits, index: Any) -> UnstoredLogits:
    """An index that takes everything."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is Ellipsis or part in (slice(None), slice(0, None)) for part in parts):
        _refuse(f"the index {index}")
    return x


def _in_place(
    rule: Callable[..., UnstoredLogits],
) -> Callable[..., UnstoredLogits]:
    def apply(x: UnstoredLogits, *args: Any) -> UnstoredLogits:
        x.made = rule(x, *args).made
        return x

    return apply


RULES: dict[str, Callable[..., UnstoredLogits]] = {
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _mul),
    **dict.fromkeys(("mul_", "__imul__"), _in_place(_mul)),
    **dict.fromkeys(("div", "true_divide", "__truediv__"), _div),
    **dict.fromkeys(("div_", "__itruediv__"), _in_place(_div)),
    **dict.fromkeys(("add", "__add__", "__radd__"), _add),
    "tanh": _tanh,
    "tanh_": _in_place(_tanh),
    "to": _cast,
    "float": lambda x: _cast(x, torch.float32),
    **dict.fromkeys(("contiguous", "clone"), _same),
    "__getitem__": _all_of,
}
"""By the name of a function of torch."""

READ = {
    *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu"),
    *("size", "dim", "numel", "is_floating_point", "__len__", "__repr__"),
}
"""What tells of the logits, and reads none."""


# -------------------------------------------------------------------------------------------------
# The last layer
# -------------------------------------------------------------------------------------------------


class StandIn(nn.Module):
    """In the place of the last layer, whose attributes it shows."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @uncompiled
    def forward(self, hidden: Tensor) -> UnstoredLogits:
        """The logits of ``hidden`` [B, T, D], as what is known of them."""
        kind = hidden.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else hidden.dtype
        return UnstoredLogits(Made(self.layer, hidden), dtype)

    def __getattr__(self, name: str) -> Any:  # noqa: D105
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


@contextmanager
def unstored_logits(model: Any) -> Iterator[None]:
    """While it lasts, ``model`` computes no logits: its last layer returns ``UnstoredLogits``."""
    layer = last_layer(model)
    stand_in = uncompiled(StandIn)(layer)
    places = [
        (module, name)
        for module in model.modules()
        for name, child in module._modules.items()
        if child is layer
    ]
    for module, name in places:
        module._modules[name] = stand_in
    try:
        yield
    finally:
        for module, name in places:
            module._modules[name] = layer


@contextmanager
def input_of(layer: Any) -> Iterator[list[Tensor]]:
    """While it lasts, keeps what ``layer`` was called with last."""
    seen: list[Tensor] = []

    def keep(module: Any, args: tuple[Tensor, ...]) -> None:
        seen[:] = args[:1]

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def last_layer(model: Any) -> nn.Module:
    """The layer that makes the logits: ``nn.Linear``, or PEFT's trained copy of one.

    Raises:
        NotImplementedError: it is something else, or others have changed what it returns.
    """
    layer = model.get_output_embeddings()
    found = linears(layer)
    if not found:
        raise NotImplementedError(
            f"fused_linear=True: the output embeddings of {type(model).__name__} are "
            f"{type(layer).__name__}, and its loss takes those of an nn.Linear (PEFT may keep a "
            "copy of it by modules_to_save, and may not put LoRA on it); " + ACCEPTED
        )
    for module in {layer, *found}:
        hooks = [
            hook
            for hook in module._forward_hooks.values()
            if not (getattr(hook, "__module__", None) or "").startswith(HOOKS)
        ]
        hooks += [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
        if hooks:
            raise NotImplementedError(
                f"fused_linear=True: the last layer has the hook {hooks[0]!r}, which waits for "
                "logits or their gradient; accepted: those of FSDP2 and DeepSpeed, or "
                "fused_linear=False, which stores the logits"
            )
    return layer  # type: ignore[no-any-return]


def fits(model: Any) -> bool:
    """Whether the logits of the model can be left out, as far as its last layer shows."""
    try:
        last_layer(model)
    except NotImplementedError:
        return False
    return True


def linears(layer: Any) -> list[nn.Linear]:
    """The layers one of which ``layer`` calls; none if it does more than that."""
    inner = [layer]
    if type(layer).__name__ == "ModulesToSaveWrapper":
        inner = [layer.original_module, *layer.modules_to_save.values()]
    plain = (isinstance(x, nn.Linear) and type(x).forward is nn.Linear.forward for x in inner)
    return inner if all(plain) else []


@contextmanager
def _forward_of(layer: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, ``layer`` calls ``forward``."""
    # accelerate, where it spreads a model over devices, has put its own around the layer's.
    name = "_old_forward" if "_hf_hook" in vars(layer) else "forward"
    earlier = vars(layer).get(name)
    if earlier is not None and getattr(earlier, "__func__", None) is not nn.Linear.forward:
        raise NotImplementedError(
            "fused_linear=True: the forward of the last layer has been replaced by "
            f"{earlier!r}; " + ACCEPTED
        )
    vars(layer)[name] = forward
    try:
        yield
    finally:
        if earlier is None:
            del vars(layer)[name]
        else:
            vars(layer)[name] = earlier


def without_logits(outputs: Any) -> Any:
    """A model's outputs, None in the place of logits that were never there; tuples drop them."""
    if isinstance(outputs, tuple):
        return tuple(x for x in outputs if not isinstance(x, UnstoredLogits))
    kept = {k: None if isinstance(v, UnstoredLogits) else v for k, v in outputs.items()}
    return type(outputs)(**kept)
