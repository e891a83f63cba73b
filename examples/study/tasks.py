"""The data: sums in words in the form of GSM8k, made on the spot, or GSM8k itself."""

import ast
import json
import operator
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from text_data import Pair, jsonl_pairs, read_text

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn")
THINGS = ("apples", "books", "coins", "shells", "stamps")
MORE = ("finds {n} more", "gets {n} from a friend", "buys {n}")
LESS = ("gives {n} away", "loses {n}", "sells {n}")
STEPS = (
    "{a} {sign} {b} = <<{a}{sign}{b}={c}>>{c}.",
    "Now there are {a} {sign} {b} = <<{a}{sign}{b}={c}>>{c} {thing}.",
    "That makes {a} {sign} {b} = <<{a}{sign}{b}={c}>>{c}.",
)


class Task(NamedTuple):
    """Pairs of question and answer; ``start`` is what the initial model is made from."""

    name: str
    start: list[Pair]
    train: list[Pair]
    test: list[Pair]


def synthetic(start: int, train: int, test: int) -> Task:
    """Stories of two or three steps with small numbers; no two pairs are the same."""
    draw = random.Random(0)
    pairs: dict[str, Pair] = {}
    while len(pairs) < start + train + test:
        pair = story(draw)
        pairs.setdefault(pair.prompt, pair)
    made = list(pairs.values())
    return Task("synthetic sums", made[test + train :], made[test : test + train], made[:test])


def story(draw: random.Random) -> Pair:
    """One question with an answer: what is written between ``<<`` and ``>>`` is for the calculator.

    How each step is worded is left to chance, so that there is something to be diverse in.
    """
    name, thing, total = draw.choice(NAMES), draw.choice(THINGS), draw.randint(2, 9)
    told, steps = [f"{name} has {total} {thing}."], []
    for _ in range(draw.randint(2, 3)):
        sign = draw.choice("+-") if total > 1 else "+"
        by = draw.randint(1, min(9, total - 1) if sign == "-" else 9)
        after = total + by if sign == "+" else total - by
        told.append(f"{name} {draw.choice(MORE if sign == '+' else LESS).format(n=by)}.")
        wording = draw.choice(STEPS)
        steps.append(wording.format(a=total, sign=sign, b=by, c=after, thing=thing))
        total = after
    question = " ".join([*told, f"How many {thing} are left?"])
    return Pair(question + "\n", "\n".join([*steps, f"#### {total}"]))


def from_files(train: Path, test: Path, most_train: int, most_test: int) -> Task:
    """Question and answer of each line, as in GSM8k; the initial model sees the training data."""
    read = [list(jsonl_pairs(path, read_text(path))) for path in (train, test)]
    for pairs in read:
        random.Random(0).shuffle(pairs)
    return Task(train.stem, read[0], read[0][:most_train], read[1][:most_test])


def final_answer(text: str) -> str | None:
    """What stands behind ``####``, without commas; None where nothing does."""
    found = re.search(r"####\s*(-?[\d,.]*\d)", text)
    return found[1].replace(",", "") if found else None


def is_correct(text: str, reference: str) -> bool:
    """Whether both end in the same number."""
    return final_answer(text) is not None and final_answer(text) == final_answer(reference)


# -------------------------------------------------------------------------------------------------
# The calculator, which GSM8k's answers are written for
# -------------------------------------------------------------------------------------------------

OPERATIONS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def calculated(text: str) -> str | None:
    """What is still to come of a result: ``36>>`` behind ``<<12*3=``, ``>>`` behind ``<<12*3=36``.

    None where no calculation is open, or something else was written.
    """
    found = re.search(r"<<([\d*+\-/.(), ]+)=([^=<]*)$", text)
    if not found:
        return None
    try:
        value = evaluate(ast.parse(found[1].replace(",", "").strip(), mode="eval").body)
        result = f"{value:.10g}>>"
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError):
        return None
    begun = found[2].lstrip()  # tokenizers may put a space there
    return result.removeprefix(begun) if result.startswith(begun) else None


def evaluate(node: ast.AST) -> float:
    """The value of an expression of numbers and + - * /.

    Raises:
        ValueError: it holds anything else.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](evaluate(node.left), evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](evaluate(node.operand))
    raise ValueError(f"no number and no operation: {ast.dump(node)}")


def dumped(pairs: list[Pair], path: Path) -> None:
    """Write pairs as lines that ``irl-ops score`` reads."""
    lines = (json.dumps({"question": p.prompt.rstrip("\n"), "answer": p.completion}) for p in pairs)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
