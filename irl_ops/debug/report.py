"""What ``check`` returns: where a set-up and the reference part, in words."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table

Verdict = Literal["right", "wrong", "not shown", "not judged"]
"""``not shown``: in this batch a mistake of that kind would give the same number."""

Place = Literal[
    "shift",
    "neighbour",
    "end",
    "terms",
    "normaliser",
    "ranks",
    "accumulation",
    "dtype",
    "gradient",
    "unknown",
]
"""Where a loss goes wrong."""

PLACES: tuple[Place, ...] = (
    "shift",
    "neighbour",
    "end",
    "terms",
    "normaliser",
    "ranks",
    "accumulation",
    "dtype",
)


class CheckError(AssertionError):
    """The loss is not the one that is expected; the message is the report."""


@dataclass(frozen=True)
class Row:
    """One place where a loss goes wrong, and whether this one does."""

    place: Place
    verdict: Verdict
    words: str


@dataclass(frozen=True)
class Parting:
    """A row of a batch whose gradient is another than expected."""

    part: int  # the micro-batch
    position: tuple[int, ...]  # in [..., T]
    label: int | None  # what the row scores; None without a label
    kind: str  # "terminal", "bootstrap", ...
    expected: float  # norm of the gradient of the row
    found: float
    error: float  # norm of the difference

    def __str__(self) -> str:  # noqa: D105
        where = ", ".join(map(str, self.position))
        scores = "no label" if self.label is None else f"label {self.label}"
        batch = f"micro-batch {self.part}, " if self.part else ""
        return (
            f"{batch}row [{where}] ({scores}, {self.kind}): norm {self.found:.4g}, expected "
            f"{self.expected:.4g}, difference {self.error:.4g}"
        )


@dataclass(frozen=True)
class Report:
    """The verdict on one batch.

    ``print`` shows it as text, ``rich.print`` as a table, a notebook as HTML.

    Attributes:
        found: the loss of the set-up, as it would be differentiated.
        expected: the loss of the float64 reference.
        tolerance: by how much the two may differ.
        rows: one for each place where a loss goes wrong; a place is listed more than once where
            several mistakes give the number that was found.
        partings: the first rows of the batch whose gradients differ.
    """

    found: float
    expected: float
    tolerance: float
    rows: tuple[Row, ...]
    partings: tuple[Parting, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong

    @property
    def wrong(self) -> tuple[Row, ...]:
        """The rows that say what is wrong."""
        return tuple(row for row in self.rows if row.verdict == "wrong")

    def raise_if_wrong(self) -> Report:
        """This report, for a chain of calls.

        Raises:
            CheckError: something is wrong.
        """
        if not self.ok:
            raise CheckError(str(self))
        return self

    @property
    def headline(self) -> str:
        """Both numbers, in a line."""
        agree = "the loss is right" if self.ok else "the loss is not what is expected"
        return f"{agree}: {self.found:.6g}, reference {self.expected:.6g} ± {self.tolerance:.1g}"

    def __str__(self) -> str:  # noqa: D105
        width = max(len(row.place) for row in self.rows)
        judged = max(len(row.verdict) for row in self.rows)
        lines = [self.headline]
        lines += [f"  {r.place:<{width}}  {r.verdict:<{judged}}  {r.words}" for r in self.rows]
        return "\n".join([*lines, *(f"  gradient of {parting}" for parting in self.partings)])

    def __rich__(self) -> Table:
        """A table; needs rich."""
        from rich.table import Table

        style = {"right": "green", "wrong": "bold red"}
        caption = "\n".join(f"gradient of {parting}" for parting in self.partings).replace(
            "[", r"\["
        )
        table = Table(title=self.headline, title_justify="left", caption=caption or None)
        for name in ("where", "verdict", "in words"):
            table.add_column(name)
        for row in self.rows:
            colour = style.get(row.verdict, "dim")
            words = row.words.replace("[", r"\[")
            table.add_row(row.place, f"[{colour}]{row.verdict}[/{colour}]", words)
        return table

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{row.place}</td><td>{_strong(row)}</td><td>{html.escape(row.words)}</td></tr>"
            for row in self.rows
        )
        items = "".join(f"<li>gradient of {html.escape(str(x))}</li>" for x in self.partings)
        return (
            f"<p>{html.escape(self.headline)}</p><table><tr><th>where</th><th>verdict</th>"
            f"<th>in words</th></tr>{cells}</table>" + (f"<ul>{items}</ul>" if items else "")
        )


def _strong(row: Row) -> str:
    return f"<b>{row.verdict}</b>" if row.verdict == "wrong" else row.verdict
