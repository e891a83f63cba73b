"""The stages of ``irl_ops.algebra`` in Triton, around a row kernel; one file per stage.

Operation by operation the array form would be eighty launches. Here it is four, without a host in
between: ``align`` and ``coefficients`` before the row kernel, ``finish`` and ``total`` behind it;
``weigh`` is part of both ``coefficients`` and ``finish``. What touches one logit per row goes with
them: ``align`` reads the label's logit, ``finish`` writes the label's element of the gradient.
Without a gradient ``coefficients`` is left out.

Arrays are flat, [n] = [B * T]; the neighbours of row i are i - 1 and i + 1 where T lets them be.
Sums go block by block and are added up in one order, so that the same call gives the same bits.

Nothing here is imported by ``irl_ops.algebra``: Triton may be absent.
"""
