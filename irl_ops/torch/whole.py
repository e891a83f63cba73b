"""How a backend does a whole call of a loss.

``loss(call, logits, labels, dlogits, above)`` returns an ``Outcome``. Into ``dlogits``, which may
be the logits themselves, it writes the gradient of ``above`` (None for 1, 0-d or ``[..., T]``)
times the loss; without ``dlogits`` the logits are read once and no gradient is computed.

A backend may do so in two parts, for a gradient that comes behind the loss: its ``loss_keeping``
leaves row statistics, and ``gradient`` does not compute them again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from irl_ops.call import Call
from irl_ops.torch import native_loss, stepwise, triton_loss
from irl_ops.torch.backends import BACKENDS
from irl_ops.torch.outcome import Outcome

COMPILED: dict[str, Callable[..., Outcome]] = {  # that have the algebra compiled as well
    "triton": triton_loss.loss,
    "native": native_loss.loss,
}


def loss_for_later(
    backend: str, call: Call, logits: Tensor, labels: Tensor
) -> tuple[Outcome, native_loss.Kept]:
    """The loss without a gradient, and what saves ``gradient_later`` a part of its work."""
    if loss_by(backend) is native_loss.loss:
        return native_loss.loss_keeping(call, logits, labels)
    return loss_by(backend)(call, logits, labels, None, None), native_loss.NOTHING


def gradient_later(
    backend: str,
    call: Call,
    logits: Tensor,
    labels: Tensor,
    dlogits: Tensor,
    above: Tensor,
    kept: native_loss.Kept,
) -> tuple[Tensor | None, Tensor | None]:
    """Writes the gradient of ``above`` times the loss; those of values and next values."""
    if kept[0] is not None:
        return native_loss.gradient(call, logits, labels, dlogits, above, kept)
    outcome = loss_by(backend)(call, logits, labels, dlogits, above)
    return outcome.dvalues, outcome.dnext_values


def loss_by(backend: str) -> Callable[..., Outcome]:
    """The function that does a whole call with the backend's row kernels."""
    return COMPILED.get(backend) or functools.partial(stepwise.loss, BACKENDS[backend])
