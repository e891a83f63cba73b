"""How a backend does a whole call of a loss.

``loss(call, logits, labels, dlogits, above)`` returns an ``Outcome``. Into ``dlogits``, which may
be the logits themselves, it writes the gradient of ``above`` (None for 1, 0-d or ``[..., T]``)
times the loss; without ``dlogits`` the logits are read once and no gradient is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from irl_ops.torch import native_loss, stepwise, triton_loss
from irl_ops.torch.backends import BACKENDS
from irl_ops.torch.outcome import Outcome

COMPILED: dict[str, Callable[..., Outcome]] = {  # that have the algebra compiled as well
    "triton": triton_loss.loss,
    "native": native_loss.loss,
}


def loss_by(backend: str) -> Callable[..., Outcome]:
    """The function that does a whole call with the backend's row kernels."""
    return COMPILED.get(backend) or functools.partial(stepwise.loss, BACKENDS[backend])
