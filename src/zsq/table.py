"""Tables of what ``zsq compare`` measured: rows are methods and their controls, columns are bits."""

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from zsq.core.errors import RecipeError, RunError
from zsq.literature import published
from zsq.rows import CONTROL, Row, read_rows, seconds_of_making

__all__ = ["Entry", "Line", "Table", "brief", "facts", "markdown", "select", "tables", "updated"]

REAL = ", real images"
"""What marks the control that is fed with real images."""
MARK = re.compile(
    r"^```.*?^```$|^(?P<begin><!-- zsq table (?P<words>[^\n]*?) -->\n).*?(?P<end>^<!-- end -->)",
    re.DOTALL | re.MULTILINE,
)
"""A generated part of a Markdown file, with what to read and what to show of it; or a block of code, to be left."""


@dataclass(frozen=True)
class Entry:
    """One method at one width, over seeds."""

    top1: float
    """Mean, in percent."""
    spread: float | None
    """Standard deviation over the seeds; None for one seed."""
    drop: float
    """Mean of what float has more, in percentage points."""
    seeds: int


@dataclass(frozen=True)
class Line:
    """One method, or a control."""

    name: str
    entries: Mapping[str, Entry]
    """By bits; those that failed or were not asked for are missing."""
    seconds: float | None
    """Mean of all stages that make a student; None where none is known."""
    memory: int | None
    """Most at any time, in MB."""
    published: Mapping[str, Sequence[tuple[float, str]]]
    """By bits, drops that papers report under this protocol, each with its source."""


@dataclass(frozen=True)
class Table:
    """What was measured under one protocol on one network."""

    model: str
    protocol: str
    data: str
    effort: str
    float_top1: float
    """In percent."""
    images: int
    """That were measured on."""
    bits: tuple[str, ...]
    lines: tuple[Line, ...]
    missing: tuple[str, ...]
    """Which cells failed, and why."""
    notes: tuple[str, ...]
    """Which methods have no control, and by which commands the rows were made."""

    @property
    def conditions(self) -> str:
        """What was measured on what, whatever the protocol."""
        return f"effort {self.effort}, {self.images:,} images of {self.data}"


def tables(rows: Iterable[Row]) -> list[Table]:
    """One table for each network, protocol, effort and data among ``rows``, in their order; of equal cells the last."""
    rows = list({(row["cell"], row.get("recipe"), row.get("data_digest")): row for row in rows}.values())
    exact = {(row["model"], row["data"]): row for row in rows if row["method"] == "float" and row["status"] == "done"}
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["method"] != "float":
            key = tuple(str(row[name]) for name in ("model", "protocol", "effort", "data"))
            groups.setdefault(key, []).append(row)
    return [_table(key, group, exact.get((key[0], key[3]))) for key, group in groups.items()]


def markdown(found: Sequence[Table]) -> str:
    """The tables as Markdown; empty if there are none."""
    return "\n\n".join(map(_whole, found))


def brief(found: Sequence[Table]) -> str:
    """Their accuracies alone, one table for each network: neither costs nor published drops nor commands."""
    groups: dict[tuple[str, str], list[Table]] = {}
    for table in found:
        groups.setdefault((table.model, table.conditions), []).append(table)
    return "\n\n".join(map(_brief, groups.values()))


def select(rows: Iterable[Row], only: Sequence[str]) -> list[Row]:
    """The rows that fit every ``key=value,value`` of ``only``.

    Raises:
        RecipeError: if one has another form, or no row has its key.
    """
    rows = list(rows)
    for rule in only:
        key, equals, values = rule.partition("=")
        if not equals or not any(key in row for row in rows):
            keys = sorted({key for row in rows for key, value in row.items() if isinstance(value, str | int)})
            raise RecipeError(f"--only {rule}: write KEY=VALUE,VALUE with one of {', '.join(keys)}")
        kept = [value.lower() for value in values.split(",")]
        rows = [row for row in rows if row["method"] == "float" or str(row.get(key)).lower() in kept]
    return rows


def updated(path: Path) -> str:
    """The text of a Markdown file with its generated tables made anew.

    What stands between ``<!-- zsq table FILE... [--only KEY=VALUE] [--brief] -->`` and ``<!-- end -->`` is generated. A
    FILE is looked for in the folder of the Markdown file and in those above it.

    Raises:
        RunError: if the file, or one that it names, cannot be read.
        RecipeError: if it names rows that do not exist.
    """
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error})") from error

    def made(match: re.Match[str]) -> str:
        if match["words"] is None:
            return match[0]
        rows, only, text = _read(match["words"], path)
        shown = text(tables(select(rows, only)))
        if not shown:
            raise RecipeError(f"{path}: no rows for <!-- zsq table {match['words']} -->")
        return f"{match['begin']}\n{shown}\n\n{match['end']}"

    return MARK.sub(made, text)


def _read(words: str, path: Path) -> tuple[list[Row], list[str], Callable[[Sequence[Table]], str]]:
    """The rows and the rules of a marker in the Markdown file ``path``, and what makes text of their tables."""
    rows: list[Row] = []
    only = []
    text = markdown
    left = shlex.split(words)
    while left:
        word = left.pop(0)
        if word == "--only" and left:
            only.append(left.pop(0))
            continue
        if word == "--brief":
            text = brief
            continue
        places = [folder / word for folder in path.resolve().parents]
        place = next((place for place in places if place.exists()), None)
        if place is None:
            raise RunError(f"{path} names {word}, which is neither in its folder nor in one above it")
        rows += read_rows(place)
    return rows, only, text


# --- what is shown ------------------------------------------------------------------------------------------------


def _table(key: tuple[str, ...], rows: list[Row], exact: Row | None) -> Table:
    model, protocol, effort, data = key
    done = [row for row in rows if row["status"] == "done"]
    measured = exact or next(iter(done), None)
    accuracy: Mapping[str, Any] = {"top1": 0.0, "images": 0} if measured is None else measured["accuracy"]["float"]
    lines = []
    for name in _order(rows):
        own = next(row for row in rows if _name(row) == name)
        papers = published(model, own["method"], own["preset"], protocol) if own["source"] == "own" else {}
        lines.append(_line(name, [row for row in done if _name(row) == name], papers))
    return Table(
        model=model,
        protocol=protocol,
        data=data,
        effort=effort,
        float_top1=accuracy["top1"],
        images=accuracy["images"],
        bits=tuple(sorted({str(row["bits"]) for row in rows}, key=_widths, reverse=True)),
        lines=tuple(lines),
        missing=tuple(_failures(rows)),
        notes=(*_no_real(rows), *_made(rows)),
    )


def _order(rows: list[Row]) -> list[str]:
    """What the lines are called: the control first, each method before what it makes of real images."""
    methods = list(dict.fromkeys(_name(row).removesuffix(REAL) for row in rows))
    methods.sort(key=CONTROL.__ne__)
    names = set(map(_name, rows))
    return [name for method in methods for name in (method, method + REAL) if name in names]


def _name(row: Row) -> str:
    name = str(row["method"]) if row["preset"] == "paper" else f"{row['method']}:{row['preset']}"
    return name + (REAL if row["source"] == "real" else "")


def _widths(bits: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", bits)))


def _line(name: str, rows: list[Row], papers: Mapping[str, Sequence[tuple[float, str]]]) -> Line:
    by_bits: dict[str, list[Row]] = {}
    for row in rows:
        by_bits.setdefault(str(row["bits"]), []).append(row)
    spent = [seconds for row in rows if (seconds := seconds_of_making(row)) is not None]
    memory = [row["peak_memory_mb"] for row in rows if row.get("peak_memory_mb") is not None]
    return Line(
        name=name,
        entries={bits: _entry(each) for bits, each in by_bits.items()},
        seconds=mean(spent) if spent else None,
        memory=max(memory, default=None),
        published={bits: papers[bits] for bits in by_bits if bits in papers},
    )


def _entry(rows: list[Row]) -> Entry:
    top1 = [row["accuracy"]["quantized"]["top1"] for row in rows]
    drop = mean(row["accuracy"]["drop"] for row in rows)
    return Entry(mean(top1), stdev(top1) if len(top1) > 1 else None, drop, len(top1))


def _no_real(rows: list[Row]) -> list[str]:
    """Which methods have no control on real images, and why."""
    fed = {row["method"] for row in rows if row["source"] == "real"}
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["source"] == "own" and row["method"] not in fed and row.get("no_real"):
            names = reasons.setdefault(row["no_real"], [])
            if f"`{_name(row)}`" not in names:
                names.append(f"`{_name(row)}`")
    said = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    return [f"No control on real images for {said}."] if said else []


def _failures(rows: list[Row]) -> list[str]:
    failed = [row for row in rows if row["status"] == "failed"]
    return [f"Failed: `{_name(row)}` {row['bits']}, seed {row['seed']}: {row['reason']}." for row in failed]


def _made(rows: list[Row]) -> list[str]:
    """Each command that made rows, and where."""
    found: dict[str, None] = {}
    for row in rows:
        machine = row["machine"]
        threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
        found[f"By `{row['command']} --out DIR` on {machine['processor']}, {threads}."] = None
    return list(found)


def _whole(table: Table) -> str:
    header = ["method", *table.bits, "seconds", "MB"]
    sources = list(dict.fromkeys(s for line in table.lines for drops in line.published.values() for _, s in drops))
    body = [["float", *([f"{table.float_top1:.2f}"] * len(table.bits)), "", ""]]
    for line in table.lines:
        cells = [_cell(line.entries.get(bits)) for bits in table.bits]
        seconds = "-" if line.seconds is None else f"{line.seconds:.1f}"
        body.append([_shown(line.name), *cells, seconds, "-" if line.memory is None else f"{line.memory:,}"])
        if line.published:
            papers = [_paper_cell(line.published.get(bits, ()), sources) for bits in table.bits]
            body.append([f"{_shown(line.name)}, published", *papers, "", ""])
    named = "; ".join(f"[{number}] {source}" for number, source in enumerate(sources, 1))
    about = [f"Published drops under this protocol: {named}. Float networks and effort differ."] if sources else []
    title = f"`{table.model}` under `{table.protocol}`, {table.conditions}:"
    return "\n\n".join([title, _grid(header, body, 1), _legend([table]), *about, *table.missing, *table.notes])


def _brief(group: Sequence[Table]) -> str:
    first = group[0]
    columns = sorted({bits for table in group for bits in table.bits}, key=_widths, reverse=True)
    body = [["", "float", *([f"{first.float_top1:.2f}"] * len(columns))]]
    for table in group:
        for index, line in enumerate(table.lines):
            protocol = "" if index else f"`{table.protocol}`"
            body.append([protocol, _shown(line.name), *(_cell(line.entries.get(bits)) for bits in columns)])
    missing = [text for table in group for text in table.missing]
    title = f"`{first.model}`, {first.conditions}:"
    return "\n\n".join([title, _grid(["protocol", "method", *columns], body, 2), _legend(group), *missing])


def _grid(header: list[str], body: list[list[str]], left: int) -> str:
    """A table of which the first ``left`` columns are words."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *body)]
    lines.insert(1, "|---" * left + "|--:" * (len(header) - left) + "|")
    return "\n".join(lines)


def _legend(group: Sequence[Table]) -> str:
    entries = [entry for table in group for line in table.lines for entry in line.entries.values()]
    spread = any(entry.spread is not None for entry in entries)
    end = "; ± is the standard deviation over n seeds." if spread else "."
    return f"Top-1 in percent, behind it the drop in points{end}"


def _paper_cell(drops: Sequence[tuple[float, str]], sources: list[str]) -> str:
    """The drops of papers, from the least to the most, and which papers."""
    if not drops:
        return "-"
    least, most = drops[0][0], drops[-1][0]
    numbers = ", ".join(str(sources.index(source) + 1) for _, source in drops)
    return f"({least:.2f}) [{numbers}]" if least == most else f"({least:.2f} to {most:.2f}) [{numbers}]"


def _shown(name: str) -> str:
    method, comma, rest = name.partition(",")
    return f"`{method}`{comma}{rest}"


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return "-"
    if entry.spread is None:
        return f"{entry.top1:.2f} ({entry.drop:.2f})"
    return f"{entry.top1:.2f} ± {entry.spread:.2f} ({entry.drop:.2f}; n = {entry.seeds})"


def facts(found: Sequence[Table]) -> list[dict[str, Any]]:
    """The tables for programs."""
    from dataclasses import asdict

    return [asdict(table) for table in found]
