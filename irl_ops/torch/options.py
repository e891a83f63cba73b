"""The options of ``irl_ops.options`` beside what only torch has: process groups."""

from __future__ import annotations

from typing import Any, Generic

from irl_ops import options
from irl_ops.options import Array, ParallelOptions


class GroupOptions(ParallelOptions[Array], Generic[Array], total=False):
    """The processes that hold the other parts of the logits.

    A group is a ``torch.distributed.ProcessGroup`` or a ``DeviceMesh`` of one dimension.
    """

    vocab_group: Any
    sequence_group: Any


class MLEOptions(options.MLEOptions[Array], GroupOptions[Array], total=False):
    """Of ``mle_loss``."""


class IQLearnOptions(options.IQLearnOptions[Array], GroupOptions[Array], total=False):
    """Of ``iqlearn_loss``."""


class OnlineOptions(options.OnlineOptions[Array], GroupOptions[Array], total=False):
    """Of ``online_iqlearn_loss``."""


class StatsOptions(options.StatsOptions[Array], GroupOptions[Array], total=False):
    """Of ``token_stats``."""


class LinearMLEOptions(options.LinearMLEOptions[Array], GroupOptions[Array], total=False):
    """Of ``linear_mle_loss``."""


class LinearIQLearnOptions(options.LinearIQLearnOptions[Array], GroupOptions[Array], total=False):
    """Of ``linear_iqlearn_loss``."""


class LinearOnlineOptions(options.LinearOnlineOptions[Array], GroupOptions[Array], total=False):
    """Of ``linear_online_iqlearn_loss``."""


class LinearStatsOptions(options.LinearStatsOptions[Array], GroupOptions[Array], total=False):
    """Of ``linear_token_stats``."""
