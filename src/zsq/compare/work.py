"""The work: one cell after the other, wherever an engine runs it, and a row of each."""

import os
import platform
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from zsq.api import protocol_of, quantize
from zsq.compare.grid import Cell, Comparison, Grid, plan, without_folders
from zsq.core import Reporter, Run, ZsqError
from zsq.core.run import locked
from zsq.engines import Engine, Lost, Processes
from zsq.evaluate import evaluate, read_images
from zsq.nets.load import load_network
from zsq.rows import FILE, write_rows

__all__ = ["Work", "compare"]


def compare(
    grid: Grid, out: str | Path, *, engine: Engine | None = None, reporter: Reporter | None = None
) -> Comparison:
    """Do what is left of ``grid`` and return it with its rows; ``out`` holds them in ``cells.jsonl``.

    Cells are done once: the same call after an interruption goes on, with the file alone or with the unfinished runs
    beside it. A cell that fails becomes a row that says why, and is tried again by the next call.

    Raises:
        ZsqError: before work starts, as ``plan`` says; if another process works in ``out``.
    """
    folder, place = Path(out), engine or Processes()
    with locked(folder / "lock", wait=False):
        found = plan(grid, out)
        due = found.due
        works = [Work(cell=cell, grid=grid, folder=str(folder.resolve())) for cell in due]
        order = [cell.id for cell in found.cells]
        done = len(order) - len(due)
        telling = _Counting(reporter, done, len(order)) if reporter else None
        for index, result in place.results(works, telling):
            row = works[index].failed(result.reason) if isinstance(result, Lost) else result
            if "peak_memory_mb" in row and not place.apart:
                row["peak_memory_mb"] = None  # it is that of all cells until now
            found.rows[row["cell"]] = row
            write_rows(folder / FILE, found.rows.values(), order)
            if telling:
                telling.done += 1
                telling.progress(f"{row['cell']} {row['status']}", 1, 1)
    return found


@dataclass(frozen=True, kw_only=True)
class Work:
    """The task of one cell: everything that a worker must know."""

    cell: Cell
    grid: Grid
    folder: str

    @property
    def kin(self) -> str:
        """Cells that need the same images."""
        return self.cell.images

    def run(self, reporter: Reporter | None) -> dict[str, Any]:
        """The row of the cell. What goes wrong is its reason; a traceback, if it is a surprise, lies in the folder."""
        cell, folder = self.cell, Path(self.folder)
        named = _Named(reporter, cell.id) if reporter else None
        try:
            with warnings.catch_warnings(record=True) as said:
                metrics = self._float() if cell.recipe is None else self._quantize(named)
        except ZsqError as error:
            return self.failed(str(error))
        except Exception as error:
            place = folder / "runs" / f"{cell.id}.traceback"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(traceback.format_exc())
            return self.failed(f"{type(error).__name__}: {error}")
        metrics["model"] = without_folders(cell.model)
        if metrics.get("checkpoint") is not None:
            metrics["checkpoint"] = Path(metrics["checkpoint"]).name
        row = {"cell": cell.id, "status": "done", **metrics, **self._facts(), "machine": _machine()}
        if said:
            row["warnings"] = list(dict.fromkeys(" ".join(str(each.message).split()) for each in said))
        return row

    def failed(self, reason: str) -> dict[str, Any]:
        """The row of the cell where it could not be done."""
        cell, grid = self.cell, self.grid
        facts: dict[str, Any] = {
            "cell": cell.id,
            "status": "failed",
            "reason": " ".join(reason.split()),
            "model": without_folders(cell.model),
        }
        facts |= {"method": cell.method, "bits": cell.bits}
        if cell.recipe is not None:
            facts |= {"method": cell.recipe.name, "protocol": protocol_of(cell.recipe).name, "preset": cell.preset}
            facts |= {"effort": grid.effort, "seed": cell.seed}
        return {**facts, **self._facts(), "machine": _machine()}

    def _facts(self) -> dict[str, Any]:
        cell = self.cell
        facts: dict[str, Any] = {"source": cell.source, "recipe": cell.digest, "teacher": cell.teacher}
        facts |= {"data": Path(self.grid.data).name, "data_digest": cell.data, "command": self.grid.command}
        return facts | ({"no_real": cell.no_real} if cell.no_real else {})

    def _float(self) -> dict[str, Any]:
        network = load_network(self.cell.model, **self.grid.settings)
        images = read_images(self.grid.data, network.input_shape)
        device = Run(device=self.grid.device).device
        exact = evaluate(network.module, images, mean=network.mean, std=network.std, device=device)
        return {"method": self.cell.method, "bits": self.cell.bits, "accuracy": {"float": asdict(exact)}}

    def _quantize(self, reporter: Reporter | None) -> dict[str, Any]:
        cell, folder = self.cell, Path(self.folder)
        return quantize(
            cell.model,
            cell.method,
            cell.bits,
            preset=cell.preset,
            effort=self.grid.effort,
            protocol=cell.protocol,
            data=self.grid.data,
            out=folder / "runs" / cell.id,
            seed=cell.seed,
            device=self.grid.device,
            reporter=reporter,
            synthesizer=cell.real,
            shared=folder / "images",
            **self.grid.settings,
        ).metrics


@dataclass
class _Named:
    """A Reporter that says of which cell a loop is."""

    reporter: Reporter
    cell: str

    def progress(self, label: str, done: int, count: int) -> None:
        self.reporter.progress(f"{self.cell} {label}", done, count)


@dataclass
class _Counting:
    """A Reporter that says how many cells are done."""

    reporter: Reporter
    done: int
    count: int

    def progress(self, label: str, done: int, count: int) -> None:
        self.reporter.progress(f"{self.done} of {self.count} cells, {label}", done, count)


def _machine() -> dict[str, Any]:
    """The processor, its cores, and how many threads were used."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(names, None) or platform.processor() or platform.machine()
    return {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
