"""Row kernels: what is done to each row of logits, one folder per backend.

They know nothing of sequences or losses. See ``irl_ops.algebra`` for those.
"""
