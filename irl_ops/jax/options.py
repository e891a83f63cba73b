"""The options of ``irl_ops.options`` beside what only JAX has: axes of a mesh."""

from __future__ import annotations

from typing import Generic

from irl_ops import options
from irl_ops.options import Array, ParallelOptions

Axis = str | tuple[str, ...]


class AxisOptions(ParallelOptions[Array], Generic[Array], total=False):
    """The axes of a ``shard_map`` along which devices hold the other parts of the logits."""

    vocab_axis: Axis | None
    sequence_axis: Axis | None


class MLEOptions(options.MLEOptions[Array], AxisOptions[Array], total=False):
    """Of ``mle_loss``."""


class IQLearnOptions(options.IQLearnOptions[Array], AxisOptions[Array], total=False):
    """Of ``iqlearn_loss``."""


class OnlineOptions(options.OnlineOptions[Array], AxisOptions[Array], total=False):
    """Of ``online_iqlearn_loss``."""


class StatsOptions(options.StatsOptions[Array], AxisOptions[Array], total=False):
    """Of ``token_stats``."""


class LinearMLEOptions(options.LinearMLEOptions[Array], AxisOptions[Array], total=False):
    """Of ``linear_mle_loss``."""


class LinearIQLearnOptions(options.LinearIQLearnOptions[Array], AxisOptions[Array], total=False):
    """Of ``linear_iqlearn_loss``."""


class LinearOnlineOptions(options.LinearOnlineOptions[Array], AxisOptions[Array], total=False):
    """Of ``linear_online_iqlearn_loss``."""


class LinearStatsOptions(options.LinearStatsOptions[Array], AxisOptions[Array], total=False):
    """Of ``linear_token_stats``."""
