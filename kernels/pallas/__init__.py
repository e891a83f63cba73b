"""The row kernels in Pallas, for TPUs.

Read ``softmax.py`` for the arithmetic, ``tiles.py`` for how a block is walked, then the kernels;
``generations.py`` says what each generation of TPUs gets. Arithmetic, labels and edges are as in
``irl_ops.kernels.reference``, in float32; labels are int32.

No kernel ran on a TPU. What is known of them is what the TPU's compiler says of them
(``make aot-tpu``) and what Pallas's interpreter makes of them (the tests).
"""
