"""Accuracy against training steps: a method at its fast effort, distilled for longer and looked at on the way.

    python experiments/curve.py hast w4a4 --steps 0 100 200 400 800 1200 1600 --data cifar10-test.zip --out RUN

The last of ``--steps`` is how long the student is distilled; the schedule of its learning rate is stretched with it.
Real images are looked at only to report: nothing is selected by them, and training is the same without the looks.
The accuracies are kept in ``experiments/results``.
"""

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import zsq
from zsq.allocator import keep_freed_memory
from zsq.api import resolve
from zsq.core import Batch, Job, Loss, Objective, Recipe
from zsq.evaluate import Images, evaluate, read_images
from zsq.quant import Distill
from zsq.quant.quantizers import freeze
from zsq.quant.train import Descender, Gradient, LabelFilter

RESULTS = Path(__file__).parent / "results"
NETWORK = zsq.load_network("zoo:resnet20-cifar10")
PHOTOS: list[Images] = []
"""What accuracies are reported on; a recipe holds no tensors."""


@dataclass(frozen=True, kw_only=True)
class Watched(Recipe):
    """The gradients of another recipe, and the student's accuracy before some steps, in the run's log."""

    gradient: Gradient
    at: tuple[int, ...]
    """Steps taken when the student is looked at."""

    def build(self, job: Job, loss: Loss | Objective, labels: LabelFilter | None) -> Descender:
        """The function of the other recipe, watched."""
        return _Watched(job, self.at, self.gradient.build(job, loss, labels))


class _Watched:
    def __init__(self, job: Job, at: tuple[int, ...], descend: Descender) -> None:
        self.job, self.at, self.descend = job, at, descend
        self.totals = descend.totals

    def __call__(self, batch: Batch) -> Tensor:
        taken = self.job.run._done.get("distill", 0)
        if taken in self.at:
            student = copy.deepcopy(self.job.student)
            freeze(student)
            top1 = evaluate(student, PHOTOS[0], mean=NETWORK.mean, std=NETWORK.std).top1
            self.job.run.log("curve", taken, top1=top1)
            print(f"{time.strftime('%H:%M:%S')} {taken} steps: {top1:.2f}", flush=True)
        return self.descend(batch)


def stretched(method: str, at: list[int]) -> zsq.Method:
    """``method`` at its fast effort, with as many steps as the last of ``at`` and a schedule to match, watched."""
    recipe = resolve(method, effort="fast")
    distill = next(step for step in recipe.quantizer if isinstance(step, Distill))
    factor = at[-1] / distill.steps
    return recipe.override(
        {
            "quantizer.distill.steps": at[-1],
            "quantizer.distill.schedule.at": tuple(round(factor * step) for step in distill.schedule.at),
            "quantizer.distill.gradient": Watched(gradient=distill.gradient, at=tuple(at[:-1])),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("bits")
    parser.add_argument("--steps", type=int, nargs="+", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    PHOTOS.append(read_images(args.data, NETWORK.input_shape))
    recipe, at = stretched(args.method, sorted(args.steps)), sorted(args.steps)
    metrics = zsq.quantize(
        NETWORK, recipe, args.bits, seed=args.seed, device="cpu", data=PHOTOS[0], out=args.out
    ).metrics
    lines = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
    curve = {line["step"]: line["top1"] for line in lines if line["label"] == "curve"}
    curve[at[-1]] = metrics["accuracy"]["quantized"]["top1"]
    name = f"curve-{NETWORK.name.removesuffix('-cifar10')}-{args.method}-{args.bits}-{args.seed}.json"
    distill = next(step for step in recipe.quantizer if isinstance(step, Distill))
    kept = {
        "model": NETWORK.name,
        "method": args.method,
        "bits": args.bits,
        "seed": args.seed,
        "lr": distill.lr,
        "schedule": distill.schedule.at,
        "float": metrics["accuracy"]["float"]["top1"],
        "curve": [{"steps": steps, "top1": round(top1, 2)} for steps, top1 in sorted(curve.items())],
        "seconds": metrics["seconds"],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(kept, indent=1) + "\n")
    print("| " + " | ".join(str(point["steps"]) for point in kept["curve"]) + " |")
    print("| " + " | ".join(f"{point['top1']:.2f}" for point in kept["curve"]) + " |")


if __name__ == "__main__":
    main()
