"""What is said: aligned tables, JSON, and the line that shows how far a loop has come."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

    from zsq.core import Reporter


def print_json(facts: Any) -> None:
    """One object, for programs."""
    print(json.dumps(facts, indent=1))


def aligned(rows: list[list[str]]) -> list[str]:
    """The rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class _Line:
    """A Reporter: one line on the terminal that shows the loop that runs."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress
        self._task = progress.add_task("start", total=None)

    def progress(self, label: str, done: int, count: int) -> None:
        self._progress.update(self._task, description=label, completed=done, total=count)


@contextlib.contextmanager
def progress_on_terminal() -> Iterator["Reporter | None"]:
    """A reporter that draws on stderr if that is a terminal, and leaves nothing behind."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Line(progress)


def reporting(reporter: "Reporter | None") -> dict[str, Any]:
    """The keyword of functions that take a callback, if there is a terminal to draw on."""
    return {} if reporter is None else {"progress": reporter.progress}
