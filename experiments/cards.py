"""The checks of the method cards that need a trained network and real images, as one recorded experiment.

    python experiments/cards.py zeroq squant dfq genie --data cifar10-test.zip

Each prints what the card expects beside what was found on ``zoo:resnet20-cifar10``, on a fixed random 2,000 of the
test images (standard error about 0.7 points). Nothing here feeds a method: real images only report or serve as the
upper bound of calibration. ``docs/experiments`` keeps the results.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import zsq
from zsq.core import Batch, Bits, Job, Recipe, Run, Teacher, needs, start
from zsq.evaluate import Images, read_images
from zsq.nets.graph import capture
from zsq.quant import AdaRound, Calibrate, InsertFakeQuant, LpError

NETWORK = zsq.load_network("zoo:resnet20-cifar10")


def top1(images: Images, method: zsq.Method | str, bits: str, **settings: Any) -> float:
    """Top-1 of the student in percent."""
    metrics = zsq.quantize(NETWORK, method, bits, data=images, **settings).metrics
    return float(metrics["accuracy"]["quantized"]["top1"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(Recipe):
    """Images that are there already; ``name`` keeps two of them apart."""

    name: str
    live = False

    def stream(self, job: Job) -> Any:
        """One batch."""
        yield Batch(GIVEN[self.name])


GIVEN: dict[str, Tensor] = {}


def with_images(method: zsq.Method, name: str, images: Tensor) -> zsq.Method:
    """``method`` fed with ``images`` instead of its own."""
    GIVEN[name] = images
    return dataclasses.replace(method, synthesizer=Given(name=name))


def real(images: Images, count: int) -> Tensor:
    """The first ``count`` real images, normalised: the upper bound, never part of a method."""
    return next(images.batches(NETWORK.mean, NETWORK.std, count))[0]


def job() -> Job:
    """A job on the network, in memory."""
    teacher = Teacher(NETWORK.module)
    student = capture(teacher.module, torch.zeros(2, *NETWORK.input_shape))
    return Job(teacher, student, Bits(), Run(), NETWORK.input_shape)


def zeroq(images: Images, rest: Images) -> None:
    """Checks 3 to 6: convergence, leaving the start, real images are not at zero, and the order of calibration sets."""
    recipe = zsq.METHODS["zeroq"].override({"synthesizer.samples": 32, "synthesizer.batch_size": 32})
    here = job()
    objective, seen = start(recipe.synthesizer.loss, here), needs(recipe.synthesizer.loss)
    first = recipe.synthesizer.pixels.draw((32, *NETWORK.input_shape), here.run.fresh("a"))
    batch = zsq.synthesize(NETWORK, recipe, 32)[0].images

    def loss(x: Tensor) -> float:
        return objective(here.teacher.view(x, seen)).item()

    say("3 loss falls at least 50x", f"{loss(first):.0f} -> {loss(batch):.1f}", loss(first) >= 50 * loss(batch))
    say("4 pixels leave the start: std above 0.5", f"{first.std():.4f} -> {batch.std():.2f}", batch.std() > 0.5)
    natural = loss(real(rest, 32))
    say("5 real images are not at zero: above the synthesized", f"{natural:.1f}", natural > loss(batch))
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
    for bits, gap in (("w4a4", 8), ("w8a8", 10)):
        sets = {"init": first, "gaussian": noise, "distilled": batch, "real": real(rest, 32)}
        found = {name: top1(images, with_images(recipe, name, x), bits) for name, x in sets.items()}
        holds = found["distilled"] - found["init"] >= gap and abs(found["distilled"] - found["real"]) <= 3
        say(f"6 {bits}: distilled - init >= {gap}, |distilled - real| <= 3", _list(found), holds)


def squant(images: Images, rest: Images) -> None:
    """Checks 6 and 7: the order of the stages at W3 and W2, and the logits at W4."""
    parts = "quantizer.insert_fake_quant.rounding"
    for bits in ("w3a32", "w2a32"):
        found = {}
        for name, k, c in (("E", False, False), ("C", False, True), ("K", True, False), ("full", True, True)):
            found[name] = top1(images, "squant", bits, overrides={f"{parts}.kernels": k, f"{parts}.channels": c})
        say(f"6 {bits}: full >= E + 5", _list(found), found["full"] >= found["E"] + 5)
    x = real(rest, 500)
    logits = NETWORK.module(x).detach()
    errors = {}
    for name, on in (("E", False), ("full", True)):
        settings = {f"{parts}.kernels": on, f"{parts}.channels": on}
        student = zsq.quantize(NETWORK, "squant", "w4a32", overrides=settings).student
        errors[name] = (student(x) - logits).square().mean().item()
    say("7 W4: the logits of full are nearer to float than those of E", _list(errors), errors["full"] < errors["E"])


def dfq(images: Images, rest: Images) -> None:
    """Checks 6 and 9: bias correction at per-tensor W4, and equalization of a balanced network (no order asserted)."""
    full = zsq.METHODS["dfq"]
    equalize, _, insert, correct, ranges = full.quantizer
    variants = {
        "plain": (insert, ranges),
        "BC": (insert, correct, ranges),
        "CLE": (equalize, insert, ranges),
        "CLE+BC": (equalize, insert, correct, ranges),
    }
    for bits in ("w4a32", "w8a32"):
        found = {k: top1(images, dataclasses.replace(full, quantizer=v), bits) for k, v in variants.items()}
        if bits == "w4a32":
            say("6 w4: BC gains at least 5 points", _list(found), found["BC"] >= found["plain"] + 5)
        else:
            say("6 w8: BC changes nothing visible (1 point)", _list(found), abs(found["BC"] - found["plain"]) <= 1)


def genie(images: Images, rest: Images) -> None:
    """Checks 7 and 8: the loss of synthesis, and the orders of image sources and of what is learned."""
    fast = zsq.METHODS["genie"].preset("fast")
    batch = zsq.synthesize(NETWORK, fast, 128)[0].images
    here = job()
    objective, seen = start(fast.synthesizer.loss, here), needs(fast.synthesizer.loss)
    noise = torch.randn(128, *NETWORK.input_shape, generator=torch.Generator().manual_seed(0))
    ends = [objective(here.teacher.view(x, seen)).item() for x in (noise, batch)]
    say(
        "7 loss at least 10x below that of the start (noise)",
        f"{ends[0]:.2f} -> {ends[1]:.3f}",
        ends[0] >= 10 * ends[1],
    )
    short = fast.override({"quantizer.reconstruct_blocks.steps": 250})
    sets = {"real": real(rest, 128), "genie": batch, "gaussian": noise}
    found = {name: top1(images, with_images(short, name, x), "w2a4") for name, x in sets.items()}
    say(
        "8 W2A4: real >= genie > noise (1 point)", _list(found), found["real"] + 1 >= found["genie"] > found["gaussian"]
    )
    insert = InsertFakeQuant(protocol=short.quantizer[0].protocol, range=LpError(), rounding=AdaRound())
    nearest = (
        dataclasses.replace(insert, rounding=zsq.METHODS["zeroq"].quantizer[0].rounding),
        Calibrate(range=LpError()),
    )
    fixed = short.override({"quantizer.reconstruct_blocks.lr_weight_scale": 0.0})
    learned = {
        "s and V": found["genie"],
        "V": top1(images, with_images(fixed, "genie", batch), "w2a4"),
        "nearest": top1(images, dataclasses.replace(with_images(short, "genie", batch), quantizer=nearest), "w2a4"),
    }
    holds = learned["s and V"] + 1 >= learned["V"] > learned["nearest"]
    say("8 W2A4: s and V >= V (1 point) > nearest rounding with the same ranges", _list(learned), holds)


def say(expected: str, found: str, holds: bool) -> None:
    """One line of the record."""
    print(f"| {expected} | {found} | {'holds' if holds else 'FALSE'} |", flush=True)


def _list(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items())


CHECKS: dict[str, Callable[[Images, Images], None]] = {"zeroq": zeroq, "squant": squant, "dfq": dfq, "genie": genie}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cards", nargs="+", choices=CHECKS)
    parser.add_argument("--data", required=True)
    args = parser.parse_args()
    every = read_images(args.data, NETWORK.input_shape)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(1))
    images, rest = (Images(every.pixels[i], every.labels[i], every.classes) for i in (order[:2000], order[2000:4000]))
    for card in args.cards:
        print(f"\n### {card}\n\n| the card expects | found | |\n|---|---|---|")
        CHECKS[card](images, rest)


if __name__ == "__main__":
    main()
