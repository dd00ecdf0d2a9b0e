"""Rows: what ``zsq compare`` measured, one JSON object a line, one line a finished cell."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zsq.core.errors import RunError
from zsq.core.run import save_atomically

__all__ = ["CONTROL", "FILE", "Row", "read_rows", "seconds_of_making", "write_rows"]

FILE = "cells.jsonl"
"""The rows of a comparison, in its folder."""

CONTROL = "nearest"
"""The method that stands in every table."""

Row = Mapping[str, Any]

_JUDGING = ("estimate", "evaluate")
"""Stages that look at a student that is finished."""


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file, or of the ``cells.jsonl`` in a folder; of two for one cell the later.

    A last line that was torn while it was written is left out.

    Raises:
        RunError: if there is no such file, or a line of it is no row.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    try:
        text = file.read_text()
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({error}): give a folder or a file of zsq compare") from error
    rows: dict[str, dict[str, Any]] = {}
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[row["cell"]] = row
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise RunError(f"line {number} of {file} is no row of zsq compare: restore the file") from error
    return list(rows.values())


def write_rows(path: Path, rows: Iterable[Row], order: Sequence[str] = ()) -> None:
    """Write ``rows`` so that the file holds all of them or what it held before.

    Cells stand in ``order``, behind those that are not listed there.

    Raises:
        RunError: if the file cannot be written.
    """
    place = {cell: index for index, cell in enumerate(order)}
    lines = [json.dumps(row) for row in sorted(rows, key=lambda row: place.get(row["cell"], -1))]
    save_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def seconds_of_making(row: Row) -> float | None:
    """What it took to make the student of ``row``, without what judges it; None where nothing was made.

    >>> seconds_of_making({"seconds": {"synthesize": 2.0, "calibrate": 1.0, "evaluate": 30.0}})
    3.0
    """
    stages = row.get("seconds")
    return sum(seconds for stage, seconds in stages.items() if stage not in _JUDGING) if stages else None
