"""The row kernels in Triton, for GPUs of NVIDIA, AMD and Intel.

Read ``dispatch.py`` for which form serves what, ``resident.py`` for the kernel that matters most,
and ``columns.py`` and ``softmax.py`` for the pieces. Nothing here knows a framework: a launcher
passes pointers, sizes and strides. Arithmetic, labels and edges are as in
``irl_ops.kernels.reference``; row vectors are contiguous, in float32, and labels in int64.

No kernel was timed on a GPU. What is known of them is what compilers say of them (``make aot-gpu``)
and what Triton's interpreter makes of them (the tests).
"""
