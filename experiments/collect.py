"""Keep the metrics of finished runs in ``experiments/results``, and print them as rows of a table.

    python experiments/collect.py runs/*

A run that was made without data has no accuracy, and is refused.
"""

import argparse
import json
from pathlib import Path

from zsq.api import find_method, protocol_of, read_metrics

RESULTS = Path(__file__).parent / "results"


def row(metrics: dict) -> str:
    accuracy = metrics["accuracy"]
    facts = [
        metrics["method"] + ("" if metrics["preset"] == "paper" else f" {metrics['preset']}"),
        metrics["bits"],
        str(metrics["seed"]),
        f"{accuracy['quantized']['top1']:.2f}",
        f"{accuracy['drop']:.2f}",
        f"{sum(metrics['seconds'].values()):.0f}",
        f"{metrics['peak_memory_mb']}",
    ]
    return f"| {' | '.join(facts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    folders = parser.parse_args().runs
    RESULTS.mkdir(exist_ok=True)
    print("| method | bits | seed | top-1 | drop | seconds | MB |\n|---|---|---|---|---|---|---|")
    for folder in folders:
        metrics = read_metrics(folder)
        model = metrics["model"].removeprefix("zoo:").removesuffix("-cifar10")
        name = f"{model}-{metrics['method'].replace('+', '-on-')}-{metrics['bits'].lower()}-{metrics['seed']}"
        if metrics["preset"] != "paper":
            name += f"-{metrics['preset']}"
        if metrics["precision"] != "float32":
            name += f"-{metrics['precision']}"
        if metrics["protocol"] != protocol_of(find_method(metrics["method"])).name:
            name += f"-{metrics['protocol']}"
        name += "".join(f"-{'-'.join(path.split('.')[-2:])}-{value}" for path, value in metrics["overrides"].items())
        print(row(metrics))
        (RESULTS / f"{name}.json").write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    main()
