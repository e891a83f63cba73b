"""What ``token_stats`` can be asked for beside its plain statistics, all from the same read."""

from __future__ import annotations

from typing import Any, NamedTuple

EXTRAS = ("log_sum_sq", "top1", "mean_logit")
"""The statistics that ``extras`` names, which are fields of ``TokenStats``."""


class Measures(NamedTuple):
    """One call's. Arrays have a number per row ``[..., T]``, or as said."""

    temperature: Any = 1.0  # once checked None: a number is part of the readout, if it can be
    extra_ids: Any = None  # [..., T, K]
    keep_mask: Any = None  # bool [..., T, V]
    keep_above: Any = None
    entropy_grad: bool = True
    extras: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether the plain row kernels serve."""
        arrays = (self.temperature, self.extra_ids, self.keep_mask, self.keep_above)
        return all(x is None for x in arrays) and not self.extras

    def wanted(self, entropy: bool) -> tuple[str, ...]:
        """The statistics that the row kernel is asked for."""
        return (("entropy",) if entropy else ()) + self.extras
