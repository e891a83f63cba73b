"""Memory for gradients."""

from __future__ import annotations

import torch

empty_like = torch.empty_like
