"""The table of `make mutants` fits the code: texts are found once, breaks differ, tests exist."""

import pytest

from ..mutant_table import MUTANTS, Mutant
from ..mutants import ROOT, place
from ..named_cases import CASES

FORMS = ("algebra", "C++", "Triton", "bindings")  # of the losses
OTHERS = ("measures in C++", "measures in Triton", "ranks", "devices", "token losses")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_a_break_can_be_made(mutant: Mutant) -> None:
    assert place(ROOT, mutant.room, mutant.text).is_file()
    assert mutant.replacement != mutant.text


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_the_test_is_there(mutant: Mutant) -> None:
    file, *classes, test = mutant.test.split("::")
    function, _, parameters = test.rstrip("]").partition("[")
    text = (ROOT / file).read_text(encoding="utf-8")
    if classes:  # which may inherit the test from a file beside it
        assert f"class {classes[0]}(" in text
        text = "".join(p.read_text(encoding="utf-8") for p in (ROOT / file).parent.glob("*.py"))
    assert f"def {function}(" in text
    if function == "test_torch":
        assert parameters.split("-", 2)[2] in CASES


def test_breaks_are_many_and_named_apart() -> None:
    assert len({mutant.what for mutant in MUTANTS}) == len(MUTANTS) >= 40
    for form in FORMS:
        assert sum(mutant.what.startswith(f"{form}: ") for mutant in MUTANTS) >= 10, form
    for form in OTHERS:
        assert sum(mutant.what.startswith(f"{form}: ") for mutant in MUTANTS) >= 5, form
