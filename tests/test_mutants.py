"""The table of `make mutants` fits the code: every text is found once, every break differs."""

import pytest

from .mutant_table import MUTANTS, Mutant
from .mutants import ROOT, place


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_a_break_can_be_made(mutant: Mutant) -> None:
    assert place(ROOT, mutant.room, mutant.text).is_file()
    assert mutant.replacement != mutant.text


def test_breaks_are_many_and_named_apart() -> None:
    assert len({mutant.what for mutant in MUTANTS}) == len(MUTANTS) >= 40
