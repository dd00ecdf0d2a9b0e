"""The orders of accuracies that the cards of the training systems expect, as one recorded experiment.

    python experiments/cards_orders.py intraq hast synq ait qimera --seeds 0 --data cifar10-test.zip --keep FOLDER

On ``zoo:resnet20-cifar10``: top-1 on all 10,000 test images of variants of one method that differ in what its card
compares, from the same seed. Those of ``intraq``, ``hast`` and ``synq`` train at W3A3 on 256 images, for 200 steps
(``synq`` for 100); those of ``ait`` and ``qimera`` are whole runs of the fast effort at W4A4. ``--keep`` holds images
and progress, and the same call continues; ``--only`` takes some of the variants. Accuracies are kept in
``experiments/results``, and the table printed at the end is of all that are there.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch

import zsq
from zsq.allocator import keep_freed_memory
from zsq.core import Batch, Bits, Job, Recipe, Run, Source, Synthesizer, Teacher
from zsq.evaluate import Images, evaluate, read_images
from zsq.losses import CamAlignment, CrossEntropy, Distillation, EasyLabels, StudentCrossEntropy
from zsq.nets.graph import capture
from zsq.quant import Once, Perturbed
from zsq.synthesis import CropAndFlip, LowPass, Noise

RESULTS = Path(__file__).parent / "results"
NETWORK = zsq.load_network("zoo:resnet20-cifar10")
FEW = {"samples": 256}
"""Half of the fast effort's images."""


@dataclass(frozen=True)
class Place:
    """Where the variants of one seed find and leave their work."""

    seed: int
    keep: Path


@dataclass(frozen=True, kw_only=True)
class Given(Recipe):
    """Images that are there already; ``name`` keeps two sets apart."""

    name: str
    live: ClassVar[bool] = False

    def stream(self, job: Job) -> Iterator[Batch]:
        """One batch."""
        yield GIVEN[self.name]


GIVEN: dict[str, Batch] = {}


def images(name: str, synthesizer: Synthesizer, place: Place) -> Given:
    """Images that are made once."""
    teacher = Teacher(NETWORK.module)
    student = capture(teacher.module, torch.zeros(2, *NETWORK.input_shape))
    run = Run(place.keep / f"images-{name}-{place.seed}", seed=place.seed, device="cpu")
    GIVEN[name] = Source(synthesizer, Job(teacher, student, Bits(), run, NETWORK.input_shape)).take()
    return Given(name=name)


def fast(name: str, **distill: Any) -> zsq.Method:
    """A method at its fast effort, with changes of its distillation."""
    return zsq.METHODS[name].preset("fast").override({f"quantizer.distill.{key}": v for key, v in distill.items()})


def short(method: zsq.Method, given: Given, steps: int = 200) -> zsq.Method:
    """``method`` on images that are there, for few steps."""
    changes = {"quantizer.distill.steps": steps, "quantizer.distill.schedule.at": (steps * 3 // 4,)}
    return replace(method.override(changes), synthesizer=given)


def intraq(place: Place) -> Iterator[tuple[str, Callable[[], zsq.Method]]]:
    """Check 7: what each idea of the images adds. Images that were made for no labels teach none."""
    full = replace(fast("intraq").synthesizer, **FEW)
    bn = full.loss.terms[0]
    hard = replace(full, loss=bn + CrossEntropy(), jitter=None)
    bare = replace(full, loss=bn, labels=None, jitter=None)
    yield "BN alone", lambda: short(fast("intraq", loss=20 * Distillation()), images("bn", bare, place))
    yield "+ label", lambda: short(fast("intraq"), images("label", hard, place))
    crops = replace(hard, jitter=full.jitter)
    yield "+ crops", lambda: short(fast("intraq"), images("crops", crops, place))
    yield "full", lambda: short(fast("intraq"), images("intraq", full, place))


def hast(place: Place) -> Iterator[tuple[str, Callable[[], zsq.Method]]]:
    """Check 8: what hard images and the rest of the training are good for."""
    full = replace(fast("hast").synthesizer, **FEW)
    easy = full.override({"loss.hard_cross_entropy.focus": 0.0})
    plain = fast("hast", loss=20 * Distillation(), gradient=Once())
    yield "full", lambda: short(fast("hast"), images("hast", full, place))
    yield "focus 0", lambda: short(fast("hast"), images("easy", easy, place))
    yield "noise", lambda: short(fast("hast"), images("noise", Noise(**FEW), place))
    yield "KL alone", lambda: short(plain, images("hast", full, place))


def synq(place: Place) -> Iterator[tuple[str, Callable[[], zsq.Method]]]:
    """Check 9: each idea alone, and all, on the images of HAST with its perturbation."""
    made = replace(fast("hast").synthesizer, **FEW)
    crop, kl = CropAndFlip(scale=0.5), 20 * Distillation()
    parts: dict[str, dict[str, Any]] = {
        "base": {},
        "filter": {"transforms": (crop, LowPass())},
        "CAM": {"gradient": Perturbed(beside=50 * CamAlignment())},
        "mask": {"loss": kl + 0.5 * StudentCrossEntropy(), "labels": EasyLabels()},
    }
    base = fast("hast", loss=kl)
    for name, changes in parts.items():
        method = base.override({f"quantizer.distill.{key}": value for key, value in changes.items()})
        yield name, lambda method=method: short(method, images("hast", made, place), 100)
    yield "all", lambda: short(fast("synq"), images("hast", made, place), 100)


def ait(place: Place) -> Iterator[tuple[str, Callable[[], zsq.Method]]]:
    """Check 6: the label loss and the inundation, on GDFQ."""
    both = fast("gdfq").quantizer[-1].loss
    kl = both.terms[0]
    yield "CE + KL", lambda: fast("gdfq")
    yield "KL", lambda: fast("gdfq", loss=kl)
    yield "KL + GI", lambda: fast("ait")
    yield "CE + KL + GI", lambda: fast("ait", loss=both)


def qimera(place: Place) -> Iterator[tuple[str, Callable[[], zsq.Method]]]:
    """Check 8."""
    yield "gdfq", lambda: fast("gdfq")
    yield "qimera", lambda: fast("qimera")


Found = Mapping[str, float]
VARIANTS = {"intraq": intraq, "hast": hast, "synq": synq, "ait": ait, "qimera": qimera}
BITS = {"intraq": "w3a3", "hast": "w3a3", "synq": "w3a3", "ait": "w4a4", "qimera": "w4a4"}
EXPECTED: dict[str, list[tuple[str, set[str], Callable[[Found], bool]]]] = {
    "intraq": [
        ("7 BN alone < + label", {"BN alone", "+ label"}, lambda f: f["BN alone"] < f["+ label"]),
        ("7 + label < + crops", {"+ label", "+ crops"}, lambda f: f["+ label"] < f["+ crops"]),
        ("7 + crops <= full", {"+ crops", "full"}, lambda f: f["+ crops"] <= f["full"]),
    ],
    "hast": [
        ("8 HAST's images > the same with focus 0", {"full", "focus 0"}, lambda f: f["full"] > f["focus 0"]),
        ("8 focus 0 > noise", {"focus 0", "noise"}, lambda f: f["focus 0"] > f["noise"]),
        ("8 full > KL alone", {"full", "KL alone"}, lambda f: f["full"] > f["KL alone"]),
    ],
    "synq": [
        (
            "9 each idea >= base - 0.3",
            {"base", "filter", "CAM", "mask"},
            lambda f: min(f["filter"], f["CAM"], f["mask"]) >= f["base"] - 0.3,
        ),
        (
            "9 all >= best single - 0.3",
            {"filter", "CAM", "mask", "all"},
            lambda f: f["all"] >= max(f["filter"], f["CAM"], f["mask"]) - 0.3,
        ),
    ],
    "ait": [
        ("6 KL without inundation < CE + KL", {"KL", "CE + KL"}, lambda f: f["KL"] < f["CE + KL"]),
        ("6 KL with inundation >= CE + KL", {"KL + GI", "CE + KL"}, lambda f: f["KL + GI"] >= f["CE + KL"]),
    ],
    "qimera": [("8 Qimera >= GDFQ", {"qimera", "gdfq"}, lambda f: f["qimera"] >= f["gdfq"])],
}
"""What a card expects, the variants it is about, and whether their accuracies are so."""


def kept(card: str, seed: int) -> Path:
    return RESULTS / f"order-{card}-{BITS[card]}-{seed}.json"


def run(card: str, place: Place, photos: Images, only: list[str] | None) -> None:
    """Find the accuracies of one card and one seed, and keep each as it is found."""
    path = kept(card, place.seed)
    found = json.loads(path.read_text()) if path.exists() else {}
    for name, method in VARIANTS[card](place):
        if only and name not in only:
            continue
        folder = place.keep / f"{card}-{name}-{place.seed}".replace(" ", "")
        student = zsq.quantize(NETWORK, method(), BITS[card], seed=place.seed, device="cpu", out=folder).student
        found[name] = round(evaluate(student, photos, mean=NETWORK.mean, std=NETWORK.std).top1, 2)
        print(f"{card}, seed {place.seed}, {name}: {found[name]:.2f}", flush=True)
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


def report(card: str) -> None:
    """What was found at all seeds, and what holds for the means over the seeds that have what is compared."""
    rows = {int(path.stem.rpartition("-")[2]): json.loads(path.read_text()) for path in RESULTS.glob(f"order-{card}-*")}
    names = [name for name, _ in VARIANTS[card](Place(0, Path()))]
    print(f"\n### {card}\n\n| {BITS[card].upper()} | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for seed, row in sorted(rows.items()):
        print(f"| seed {seed} | {' | '.join(f'{row[name]:.2f}' if name in row else '' for name in names)} |")
    print("\n| the card expects | |\n|---|---|")
    for words, compared, holds in EXPECTED[card]:
        told = [row for row in rows.values() if row.keys() >= compared]
        verdict = "not run"
        if told:
            verdict = "holds" if holds({name: fmean(row[name] for row in told) for name in compared}) else "FALSE"
        print(f"| {words} | {verdict} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", nargs="+", choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--data", required=True)
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    photos = read_images(args.data, NETWORK.input_shape)
    for card in args.cards:
        for seed in args.seeds:
            run(card, Place(seed, args.keep), photos, args.only)
    for card in args.cards:
        report(card)


if __name__ == "__main__":
    main()
