"""How far the estimate without data lies from the true drop, over finished cells of ``zsq compare``.

    python experiments/estimate.py results/*.jsonl --models resnet20-cifar10 mobilenetv2-cifar10

Prints the rank correlation, the mean absolute error where the true drop is below 20 points, how often the interval
held, the same for each network, method and source, the constant that would fit each source best, and the worst cells.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from zsq.estimate import RANGE

COUNTED = "weighted_agreement"


def read_cells(files: Sequence[Path], models: Sequence[str]) -> list[dict]:
    """The cells that have both an estimate and an accuracy, of networks whose name contains one of ``models``."""
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [
        row
        for row in rows
        if "estimate" in row and "accuracy" in row and (not models or any(name in row["model"] for name in models))
    ]


def method_of(cell: dict) -> str:
    """The method, and whether it was fed with real images."""
    return cell["method"] + ("" if cell["source"] == "own" else ", real images")


def best_constant(disagreement: np.ndarray, drop: np.ndarray) -> float:
    """The factor of ``disagreement`` with the least mean absolute error; the error is linear between the ratios."""
    ratios = drop[disagreement > 0] / disagreement[disagreement > 0]
    return float(min(ratios, key=lambda ratio: np.abs(ratio * disagreement - drop).mean()))


def line(name: str, found: np.ndarray, drop: np.ndarray) -> str:
    """One row of the table: cells, correlation, and the errors of ``found`` where the drop is below the range."""
    mild = drop < RANGE
    error = (found - drop)[mild]
    rank = spearmanr(found, drop).statistic if len(drop) > 2 else float("nan")
    if not mild.any():
        return f"{name:40} {len(drop):5} {rank:9.3f} {0:9}"
    return (
        f"{name:40} {len(drop):5} {rank:9.3f} {mild.sum():9} {np.abs(error).mean():9.2f} {error.mean():+7.2f} "
        f"{np.abs(error).max():7.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="cells.jsonl of zsq compare")
    parser.add_argument("--models", nargs="*", default=[], help="parts of the names of the networks to look at")
    parser.add_argument("--worst", type=int, default=8, help="how many cells to list")
    settings = parser.parse_args()
    cells = read_cells(settings.files, settings.models)
    if not cells:
        raise SystemExit("no cell has both an estimate and an accuracy")
    drop = np.array([cell["accuracy"]["drop"] for cell in cells])
    low, found, high = (np.array([cell["estimate"][name] for cell in cells]) for name in ("low", "drop", "high"))
    print(f"{'':40} {'cells':>5} {'Spearman':>9} {'below ' + f'{RANGE:.0f}':>9} {'error':>9} {'bias':>7} {'worst':>7}")
    print(line("all", found, drop))
    for name in (lambda cell: cell["model"], method_of):
        names = [name(cell) for cell in cells]
        for each in sorted(set(names)):
            of = np.array([each == other for other in names])
            print(line(each, found[of], drop[of]))
    mild = drop < RANGE
    held = ((low <= drop) & (drop <= high))[mild]
    said = found > RANGE
    print(f"\nthe interval holds the drop in {held.sum()} of {mild.sum()} cells below {RANGE:.0f} points")
    print(f"said to be above {RANGE:.0f}: {said.sum()} cells, of which {(said & mild).sum()} are below")
    print(f"below, of those that are above: {(~said & ~mild).sum()}\n")
    for name in cells[0]["estimate"]["sources"]:
        other = np.array([100 - cell["estimate"]["sources"][name][COUNTED] for cell in cells])
        fitted = best_constant(other[mild], drop[mild])
        print(line(f"{name}, points={fitted:.2f}", fitted * other, drop))
    print("\nworst below the range: drop, estimate, interval")
    for index in sorted(np.flatnonzero(mild), key=lambda i: -abs(found[i] - drop[i]))[: settings.worst]:
        print(f"{drop[index]:7.2f} {found[index]:7.2f} {low[index]:7.2f} {high[index]:7.2f}  {cells[index]['cell']}")


if __name__ == "__main__":
    main()
