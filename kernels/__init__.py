"""Row kernels: what is done to each row of logits, one folder per backend.

They take rows, labels and coefficients per row. Which row follows which, and which loss the
coefficients stand for, is known to ``irl_ops.algebra`` alone, which calls no kernel itself.
"""
