"""Row kernels: what is done to each row of logits, one folder per backend.

A row kernel takes the coefficients of its row, and knows nothing of sequences or losses: those are
the subject of ``irl_ops.algebra``. ``triton/transitions.py`` is that algebra once more, for GPUs.
"""
