"""Row kernels: what is done to each row of logits, one folder per backend.

They know nothing of sequences or losses: ``irl_ops.algebra`` does, and calls no kernel itself.
"""
