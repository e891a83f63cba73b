"""Inverse-RL losses for language models at the cost of maximum likelihood.

Import the framework you use: ``import irl_ops.torch as irl``.
"""

__version__ = "0.2.0"
