"""The files that a run leaves, so written that an interrupted one can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


class OtherRunError(ValueError):
    """The file holds the scores of a run with other settings."""


class Scores:
    """``--out``: a JSON line for every answer, in the order of the data; and how it was made.

    The settings lie beside it, in OUT.run.json. Scores of other settings are not continued.

    Raises:
        OtherRunError: the file was made with other settings, or is none of this program's.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], answers: int) -> None:
        self.path = path
        self.answers = answers  # of each line of the data
        self.settings_path = path.with_name(path.name + ".run.json")
        self._check(settings)
        self.done = self._resume()
        self.settings_path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def _check(self, settings: Mapping[str, Any]) -> None:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        if not self.settings_path.exists():
            raise OtherRunError(
                f"{self.path} exists, without the settings that made it ({self.settings_path}); "
                "accepted: a file of this program, or a new one"
            )
        earlier = json.loads(self.settings_path.read_text(encoding="utf-8"))
        for name in dict.fromkeys([*settings, *earlier]):
            if earlier.get(name) != settings.get(name):
                raise OtherRunError(
                    f"{self.path} was made with {name}={earlier.get(name)!r}, and this run has "
                    f"{settings.get(name)!r}; accepted: the same, or another --out"
                )

    def _resume(self) -> set[int]:
        """The numbers of the lines that are done; what an interruption left of others goes."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return set()
        counted: dict[int, int] = {}
        kept = position = 0
        with self.path.open("rb") as file:
            for raw in file:
                position += len(raw)
                try:
                    number = json.loads(raw)["line"] if raw.endswith(b"\n") else None
                except (ValueError, KeyError, TypeError):
                    number = None
                if number is None:
                    break
                counted[number] = counted.get(number, 0) + 1
                if counted[number] == self.answers:
                    kept = position
        os.truncate(self.path, kept)
        return {number for number, times in counted.items() if times == self.answers}

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes all answers of some lines, and waits until they are on the disk."""
        text = "".join(
            json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records
        )
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All answers that are written."""
        if self.path.exists():
            with self.path.open(encoding="utf-8") as file:
                yield from map(json.loads, file)


class BadLines:
    """OUT.bad.jsonl: the lines of this run that could not be scored, with their numbers and why.

    It is there only if there are any. A run that goes on reads them again, so that it always holds
    the lines that are missing in ``--out``.
    """

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(out.name + ".bad.jsonl")
        self.path.unlink(missing_ok=True)
        self.count = 0

    def add(self, number: int, reason: str, raw: bytes) -> None:
        """Keeps a line; bytes that are not UTF-8 are escaped."""
        text = raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
        line = json.dumps({"line": number, "reason": reason, "text": text}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.count += 1
