"""Is my loss right? ``check`` compares it with the float64 reference, and says where they part.

``irl_ops.debug.callback.CheckCallback`` does it before the first step of a Trainer.
"""

from irl_ops.debug.check import check
from irl_ops.debug.report import CheckError, Parting, Report, Row

__all__ = ["CheckError", "Parting", "Report", "Row", "check"]
