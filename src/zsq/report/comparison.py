"""What the page of a comparison shows."""

from pathlib import Path
from typing import Any

from zsq.core import RunError
from zsq.report import charts
from zsq.rows import read_rows, seconds_of_making

__all__ = ["comparison"]


def comparison(folder: Path) -> dict[str, Any]:
    """What the template of a comparison is filled with.

    Raises:
        RunError: if the rows cannot be read, or there are none.
    """
    rows = read_rows(folder)
    if not rows:
        raise RunError(f"{folder} holds no finished cell: run zsq compare first")
    cells = [_cell(row) for row in rows]
    methods = list(dict.fromkeys(cell["series"] for cell in cells if cell["bytes"] is not None))
    measured = [cell for cell in cells if cell["top1"] is not None]
    models = list(dict.fromkeys(cell["model"] for cell in measured))
    return {
        "title": "Comparison",
        "cells": cells,
        "failed": sum(cell["reason"] is not None for cell in cells),
        "data": sorted({row["data"] for row in rows if row.get("data")}),
        "estimated": any(cell["estimate"] is not None for cell in cells),
        "charts": [_charts(model, measured, methods) for model in models],
        "commands": list(dict.fromkeys(row["command"] for row in rows if "command" in row)),
        "machines": sorted({_machine(row["machine"]) for row in rows if "machine" in row}),
    }


def _cell(row: dict[str, Any]) -> dict[str, Any]:
    accuracy, estimate = row.get("accuracy", {}), row.get("estimate")
    measured = accuracy.get("quantized") or accuracy.get("float")
    real = row.get("source", "own") != "own"
    return {
        "name": row["cell"],
        "model": row.get("model", row["cell"].partition("/")[0]).rpartition(":")[2],
        "method": row.get("method", "") + (", real images" if real else ""),
        "series": row.get("method", ""),
        "real": real,
        "bits": row.get("bits", "").upper(),
        "protocol": row.get("protocol", ""),
        "seed": row.get("seed"),
        "top1": measured["top1"] if measured else None,
        "drop": accuracy.get("drop"),
        "estimate": estimate,
        "bytes": row["bytes"]["packed"] if "bytes" in row else None,
        "seconds": seconds_of_making(row),
        "reason": row.get("reason") if row.get("status") == "failed" else None,
        "float": row.get("method") == "float",
    }


def _charts(model: str, cells: list[dict[str, Any]], methods: list[str]) -> dict[str, Any]:
    """The two plots of one network."""
    mine = [cell for cell in cells if cell["model"] == model and cell["bytes"] is not None]
    exact = next((cell["top1"] for cell in cells if cell["model"] == model and cell["float"]), None)

    def plot(field: str, scale: float, x_name: str) -> str:
        points = [
            charts.Point(cell[field] / scale, cell["top1"], cell["series"], _says(cell), hollow=cell["real"])
            for cell in mine
            if cell[field]
        ]
        label = f"top-1 of {model} against {x_name}"
        rule = None if exact is None else ("float", exact)
        names = {"x_name": x_name, "y_name": "top-1, percent"}
        return charts.scatter(points, label, **names, order=methods, rule=rule) if points else ""

    real = "fed with real images" if any(cell["real"] for cell in mine) else ""
    return {
        "model": model,
        "float": exact,
        "key": charts.key(methods, {cell["series"] for cell in mine}, real),
        "size": plot("bytes", 1000.0, "kilobytes of the packed file"),
        "time": plot("seconds", 1.0, "seconds of making it"),
    }


def _says(cell: dict[str, Any]) -> str:
    seed = "" if cell["seed"] is None else f", seed {cell['seed']}"
    return f"{cell['method']} {cell['bits']} under {cell['protocol']}{seed}: {cell['top1']:.2f} %"


def _machine(machine: dict[str, Any]) -> str:
    return f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"
