"""Row kernels for JAX programs: ``pallas`` on TPUs, ``triton`` on GPUs.

They have the signatures of ``irl_ops.kernels.reference``. The losses of ``irl_ops.torch`` are not
here yet.
"""
