"""The checks of the method cards on vision transformers that need a trained network, as one recorded experiment.

    python experiments/cards_vit.py psaq-vit smi --data cifar10-test.zip
    python experiments/cards_vit.py psaq-vit --model zoo:vit-cifar10 --seeds 0 1 2 --data cifar10-test.zip

As ``cards.py``: what the card expects beside what was found, at effort fast. Accuracies are those of a fixed random
2,000 of the test images (standard error about 0.7 points), means over the seeds; another 2,000 are the real images of
the upper bound. ``docs/experiments`` keeps the results.
"""

import argparse
import dataclasses
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from cards import say
from torch import Tensor

import zsq
from zsq.allocator import keep_freed_memory
from zsq.api import pixel_box
from zsq.core import Batch, Bits, Job, Method, Recipe, Run, Source, Teacher, show
from zsq.evaluate import Images, evaluate, read_images
from zsq.losses import CrossEntropy, PatchSimilarityEntropy
from zsq.losses.priors import noise_variation, total_variation
from zsq.nets.graph import capture
from zsq.nets.load import Network


class Bench:
    """The network, the images that report, the real ones for the upper bound, and the seeds."""

    def __init__(self, network: Network, data: Images, seeds: list[int], keep: Path | None = None) -> None:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
        self.network, self.seeds, self.keep = network, seeds, keep
        self.test, self.rest = (Images(data.pixels[part], data.labels[part], data.classes) for part in
                                (order[:2000], order[2000:4000]))  # fmt: skip

    def job(self, seed: int = 0) -> Job:
        """A job on the network, in memory."""
        student = capture(self.network.module, torch.zeros(2, *self.network.input_shape))
        box = pixel_box(self.network)
        return Job(Teacher(self.network.module), student, Bits(), Run(seed=seed), self.network.input_shape, box)

    def made(self, recipe: Method, seed: int = 0) -> Batch:
        """The images of ``recipe``, which are kept if there is a place for them."""
        digest = hashlib.sha256(show(recipe.synthesizer).encode()).hexdigest()[:8]
        path = None if self.keep is None else self.keep / f"{recipe.name}-{digest}-{seed}.pt"
        if path is not None and path.exists():
            return Batch(**torch.load(path))
        started = time.perf_counter()
        made = Source(recipe.synthesizer, self.job(seed)).take()
        print(f"  {recipe.name}, seed {seed}: {len(made)} images in {time.perf_counter() - started:.1f} s", flush=True)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"images": made.images, "labels": made.labels, "tokens": made.tokens}, path)
        return made

    def top1(self, method: Method, bits: str, batches: list[Batch]) -> float:
        """Top-1 in percent of ``method`` on images that are there already, the mean over the seeds."""
        found = []
        for seed, batch in zip(self.seeds, batches, strict=True):
            GIVEN[seed] = batch
            recipe = dataclasses.replace(method, synthesizer=Given(seed=seed))
            student = zsq.quantize(self.network, recipe, bits, seed=seed).student
            found.append(evaluate(student, self.test, mean=self.network.mean, std=self.network.std).top1)
        return statistics.mean(found)

    def real(self, seed: int) -> Tensor:
        """32 real images, normalised: the upper bound, never part of a method."""
        batches = self.rest.batches(self.network.mean, self.network.std, 32)
        return next(images for index, (images, _) in enumerate(batches) if index == seed)

    def noise(self, seed: int) -> Tensor:
        """32 images of unit Gaussian noise."""
        return torch.randn(32, *self.network.input_shape, generator=torch.Generator().manual_seed(seed))


GIVEN: dict[int, Batch] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(Recipe):
    """Images that are there already."""

    seed: int
    live = False

    def stream(self, job: Job) -> Iterator[Batch]:
        """One batch."""
        yield GIVEN[self.seed]


def fast(name: str, **changes: object) -> Method:
    """A method at its fast effort."""
    return zsq.METHODS[name].preset("fast").override(changes)


def accuracies(bench: Bench, method: Method, images: dict[str, list[Batch]]) -> dict[tuple[str, str], float]:
    """Top-1 by source of images and bits, with noise and real images beside ``images``, one batch a seed."""
    images["noise"] = [Batch(bench.noise(seed)) for seed in bench.seeds]
    images["real"] = [Batch(bench.real(seed)) for seed in bench.seeds]
    found = {(name, bits): bench.top1(method, bits, images[name]) for name in images for bits in ("w8a8", "w4a8")}
    for bits in ("w8a8", "w4a8"):
        listed = ", ".join(f"{name} {found[name, bits]:.2f}" for name in images)
        print(f"| top-1 at {bits.upper()} | {listed} | |", flush=True)
    return found


def psaq(bench: Bench) -> None:
    """Checks 4 and 6."""
    recipe, here, entropy = fast("psaq-vit"), bench.job(), PatchSimilarityEntropy()
    batches = [bench.made(recipe, seed) for seed in bench.seeds]
    batch = batches[0]
    count = len(here.teacher.view(batch.images[:1], entropy.needs).attention)
    with torch.no_grad():
        before, after = (
            -entropy.value(here.teacher.view(x, entropy.needs)).item() / count for x in (bench.noise(0), batch.images)
        )
        cross = CrossEntropy().value(here.teacher.view(batch.images, labels=batch.labels)).item()
    say("4 mean entropy of patch similarities rises", f"{before:.3f} -> {after:.3f}", after > before)
    limit = math.log(here.classes)
    say("4 cross-entropy below ln K by a wide margin", f"{cross:.3f}, ln K {limit:.3f}", cross < limit / 2)
    scale = noise_variation((32, 3, 224, 224)) / noise_variation(tuple(batch.images.shape))
    variation = total_variation(batch.images).item() * scale
    close = 0.95 * 2500 <= variation <= 1.05 * 3000
    say("4 total variation within a few percent of a target in 2500 .. 3000", f"{variation:.0f}", close)
    low, high = torch.tensor(here.pixel_box).T[:, None, :, None, None]
    inside = bool((batch.images >= low - 1e-6).all() and (batch.images <= high + 1e-6).all())
    say("4 pixels inside the box", f"{batch.images.min():.3f} .. {batch.images.max():.3f}", inside)
    natural = total_variation(bench.real(0)).item() * scale
    say("  total variation of real images, scaled the same way", f"{natural:.0f}", True)
    found = accuracies(bench, recipe, {"psaq-vit": batches})
    made, real, noise = (found[name, "w8a8"] for name in ("psaq-vit", "real", "noise"))
    say("6 noise below synthetic at W8A8", f"{noise:.2f}, {made:.2f}", noise < made)
    say("6 synthetic within 1 point of real images at W8A8", f"{made:.2f}, {real:.2f}", abs(made - real) <= 1)
    lower = all(found[name, "w4a8"] <= found[name, "w8a8"] for name in ("noise", "psaq-vit", "real"))
    say("6 W4A8 not above W8A8 for every source", "see above", lower)


def smi(bench: Bench) -> None:
    """Check 8."""
    recipe = fast("smi")
    images = {
        name: [bench.made(each, seed) for seed in bench.seeds]
        for name, each in (("smi", recipe), ("dense", recipe.override({"synthesizer.patches": None})))
    }
    batch = images["smi"][0]
    tokens = 0 if batch.tokens is None else batch.tokens.shape[1]
    here = bench.job()
    with torch.no_grad():
        view = here.teacher.view(batch.images, tokens=batch.tokens, labels=batch.labels)
        sure = (view.logits.argmax(1) == batch.labels).float().mean().item()
    say(
        "  the teacher sees the labels in the tokens that are left",
        f"{100 * sure:.0f} % by {tokens} tokens",
        sure > 0.9,
    )
    found = accuracies(bench, recipe, images)
    noise, sparse, whole = (found[name, "w8a8"] for name in ("noise", "smi", "dense"))
    say("8 noise not above SMI at W8A8", f"{noise:.2f}, {sparse:.2f}", noise <= sparse)
    say("8 SMI within 1 point of dense inversion at W8A8", f"{sparse:.2f}, {whole:.2f}", abs(sparse - whole) < 1)
    sparse, whole = (found[name, "w4a8"] for name in ("smi", "dense"))
    say("8 SMI not below dense inversion at W4A8", f"{sparse:.2f}, {whole:.2f}", sparse >= whole)


CHECKS: dict[str, Callable[[Bench], None]] = {"psaq-vit": psaq, "smi": smi}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", nargs="+", choices=CHECKS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="zoo:vit-cifar10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a folder for the images")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    network = zsq.load_network(args.model)
    bench = Bench(network, read_images(args.data, network.input_shape), args.seeds, args.keep)
    for card in args.cards:
        print(f"\n### {card}\n\n| the card expects | found | |\n|---|---|---|", flush=True)
        CHECKS[card](bench)


if __name__ == "__main__":
    main()
