"""How the logits that a call is given become its Q-values.

The row kernels do this while they read: no algebra, and nothing else of a call, knows of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Readout(NamedTuple):
    """q = softcap tanh(logit_scale x / softcap), or logit_scale x without a soft cap.

    Numbers above 0, when a call has been checked. An x of -inf stays -inf.
    """

    logit_scale: Any = 1.0
    softcap: Any = None

    def over(self, temperature: float) -> Readout:
        """That of q / temperature: both numbers divided, since c tanh(s x / c) / T is of c / T."""
        cap = self.softcap
        return Readout(self.logit_scale / temperature, None if cap is None else cap / temperature)

    @property
    def plain(self) -> bool:
        """Whether q = x."""
        return self == PLAIN

    @property
    def keywords(self) -> dict[str, Any]:
        """What the row kernels are given beside their arrays: nothing where q = x."""
        return {} if self.plain else self._asdict()


PLAIN = Readout()
