"""Which function does a whole call of a loss, by backend.

``loss(call, logits, labels, dlogits, above)`` returns an ``Outcome``. Into ``dlogits``, which may
be the logits themselves, it writes the gradient of ``above`` (None for 1, 0-d or ``[..., T]``)
times the loss; without ``dlogits`` the logits are read once and no gradient is computed.
"""

from __future__ import annotations

from collections.abc import Callable

from irl_ops.torch import native_loss, plain_loss, triton_loss
from irl_ops.torch.outcome import Outcome

WHOLE: dict[str, Callable[..., Outcome]] = {
    "triton": triton_loss.loss,
    "native": native_loss.loss,
    "reference": plain_loss.loss,
}
