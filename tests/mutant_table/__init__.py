"""The breaks that tests/mutants.py makes, and the test that notices each.

A text is looked for in all files of its room, and has to be there once: code may move from file to
file without a change here.
"""

from . import array, bindings, cpp, measures, sharded, triton
from .mutant import Mutant

MUTANTS = [
    *array.MUTANTS,
    *cpp.MUTANTS,
    *triton.MUTANTS,
    *bindings.MUTANTS,
    *measures.MUTANTS,
    *sharded.MUTANTS,
]

__all__ = ["MUTANTS", "Mutant"]
