"""IQLearn in LLaMA-Factory: a callback for ``run_exp``.

::

    from llamafactory.train.tuner import run_exp

    run_exp(callbacks=[IQLearn(lam=0.1, gamma=0.99)])
"""

from irl_ops.integrations.transformers import ApplyIQLearn as IQLearn

__all__ = ["IQLearn"]
