"""The checks of the method cards of the training systems that need a trained network, as one recorded experiment.

    python experiments/cards_training.py gdfq qimera ait intraq hast synq --data cifar10-test.zip

As ``cards.py``: on ``zoo:resnet20-cifar10``, what the card expects beside what was found. Images are made with short
settings (128 images, 200 steps; generators 300 steps). ``docs/experiments`` keeps the results.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from cards import NETWORK, job, real, say
from torch import Tensor
from torch.nn import functional as F

from zsq.allocator import keep_freed_memory
from zsq.api import find_method
from zsq.core import Batch, Job, Method, Source
from zsq.evaluate import Images, read_images
from zsq.losses import CrossEntropy, Distillation, StudentCrossEntropy
from zsq.quant import Distill, Nesterov
from zsq.quant.quantizers import float_weight, weight_quantizers
from zsq.synthesis import LowPass, OptimizeImages


def fast(name: str, **changes: object) -> Method:
    """A method at its fast effort, with 128 images."""
    recipe = find_method(name).preset("fast")
    if not recipe.synthesizer.live:
        recipe = recipe.override({"synthesizer.samples": 128, "synthesizer.steps": 200})
    return recipe.override(changes)


def stream(recipe: Method, here: Job, steps: int) -> Iterator[Batch]:
    """The first batches of a live synthesizer."""
    batches = recipe.synthesizer.stream(here)
    for _ in range(steps):
        yield next(batches)


def gdfq(rest: Images) -> None:
    """Check 7: the generator learns."""
    here, recipe = job(), fast("gdfq")
    bn = next(term for term in recipe.synthesizer.loss.terms if type(term).__name__ == "BNStatistics")
    right, match = [], []
    for batch in stream(recipe, here, 300):
        right.append((batch.logits.argmax(1) == batch.labels).float().mean().item())
        match.append(bn.value(here.teacher.view(batch.images, bn.needs)).item())
    found = sum(right[-20:]) / 20
    say("7 teacher's accuracy on asked labels above 95 % within 300 steps", f"{100 * found:.1f} %", found > 0.95)
    first, last = match[0], sum(match[-20:]) / 20
    say("7 BN statistics fall more than 5x", f"{first:.3f} -> {last:.3f}", first > 5 * last)


def qimera(rest: Images) -> None:
    """Check 7: superposed images are uncertain to the teacher."""
    here, entropy = job(), dict[bool, list[float]]()
    for step, batch in enumerate(stream(fast("qimera"), here, 400)):
        if step >= 300:
            p = batch.logits.softmax(1)
            mixed = batch.labels.dim() == 2
            entropy.setdefault(mixed, []).append(-(p * p.clamp(min=1e-12).log()).sum(1).mean().item())
    plain, mixed = (sum(entropy[key]) / len(entropy[key]) for key in (False, True))
    say("7 entropy of mixed batches at least 3x that of plain ones", f"{plain:.3f}, {mixed:.3f}", mixed >= 3 * plain)


def ait(rest: Images) -> None:
    """Checks 4 and 7: integers that change in a step, and the angle between the gradients of the two losses."""
    recipe = fast("ait")
    shares: dict[str, list[float]] = {}
    large: list[float] = []
    for name, optimizer in (("inundated", None), ("plain", Nesterov(weight_decay=0.0))):
        here = prepared(recipe)
        distill = next(step for step in recipe.quantizer if isinstance(step, Distill))
        changes = {"steps": 1, "lr": 1e-6} | ({} if optimizer is None else {"optimizer": optimizer})
        if optimizer is None:
            changes["optimizer.capped_steps"] = 0
        source, least = Source(recipe.synthesizer, here), []
        for _ in range(20):
            before = codes(here)
            here.run._done.clear()
            here.run._tracked = {k: v for k, v in here.run._tracked.items() if not k.startswith("distill/")}
            distill.override(changes).apply(here, source)
            for a, b in zip(before, codes(here), strict=True):
                least.append((a != b).float().mean().item())
                if name == "inundated" and a.numel() >= 1_000:
                    large.append(least[-1])
        shares[name] = least
    low = min(shares["inundated"])
    say("4 least share of changed integers over layers and steps at least T / 2 = 5e-4", f"{low:.1e}", low >= 5e-4)
    say("4 the same over layers of 1 / T weights or more", f"{min(large):.1e}", min(large) >= 5e-4)
    plain = sum(shares["plain"]) / len(shares["plain"])
    say("4 without inundation orders below", f"{plain:.1e}", plain < 1e-4)
    here = prepared(recipe)
    cosines = {"generated": [], "real": []}
    made = list(stream(recipe, here, 20))[10:]
    photos = [Batch(x, y) for x, y in rest.batches(NETWORK.mean, NETWORK.std, 32)][:10]
    for name, batches in (("generated", made), ("real", photos)):
        for batch in batches:
            gradients = []
            for loss in (StudentCrossEntropy(), Distillation()):
                here.student.zero_grad()
                loss.value(here.view(replace(batch, logits=None), loss.needs)).backward()
                gradients.append(torch.cat([p.grad.flatten() for p in here.student.parameters() if p.grad is not None]))
            cosines[name].append(F.cosine_similarity(*gradients, dim=0).item())
    mean = {name: sum(values) / len(values) for name, values in cosines.items()}
    say(
        "7 cosine of CE and KL gradients near or below 0 on generated images",
        f"{mean['generated']:.2f}",
        mean["generated"] < 0.1,
    )
    say("7 clearly larger on real ones", f"{mean['real']:.2f}", mean["real"] > mean["generated"] + 0.1)


def prepared(recipe: Method) -> Job:
    """A job whose student has quantizers, and ranges from real-sized noise, and may learn."""
    here = job()
    insert, ranges, *_ = recipe.quantizer
    insert.apply(here, Source(recipe.synthesizer, here))
    ranges.override({"steps": 20}).apply(here, Source(recipe.synthesizer, job()))
    here.student.requires_grad_(True)
    return here


def codes(here: Job) -> list[Tensor]:
    return [q.codes_at(float_weight(layer).detach()) for layer, q in weight_quantizers(here.student).values()]


def intraq(rest: Images) -> None:
    """Check 8: heterogeneity within classes."""
    full = fast("intraq").synthesizer
    terms = [term for term in full.loss.terms if type(term).__name__ == "BNStatistics"]
    hard = replace(full, loss=terms[0] + CrossEntropy(), jitter=None)
    found = {
        "BN + hard label": heterogeneity(hard),
        "+ crops": heterogeneity(replace(hard, jitter=full.jitter)),
        "full": heterogeneity(full),
        "real": spread(real(rest, 128), rest.labels[:128]),
    }
    listed = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    say(
        "8 mean intra-class cosine distance from under 0.2 to over 0.3",
        listed,
        found["BN + hard label"] < 0.2 and found["full"] > 0.3,
    )
    say("8 crops alone raise it", listed, found["+ crops"] > found["BN + hard label"])


def heterogeneity(synthesizer: OptimizeImages) -> float:
    batch = made(synthesizer)
    return spread(batch.images, batch.labels)


def made(synthesizer: OptimizeImages) -> Batch:
    return Source(synthesizer, job()).take()


def spread(images: Tensor, labels: Tensor) -> float:
    """Mean cosine distance of the features of two images of one class."""
    here = job()
    with torch.no_grad():
        features = F.normalize(here.teacher.view(images, frozenset({"features"})).features, dim=1)
    pairs = (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool)
    return (1 - features @ features.T)[pairs].mean().item()


def hast(rest: Images) -> None:
    """Check 7: more images of middling difficulty, and BN statistics that fall."""
    full = fast("hast").synthesizer
    easy = full.override({"loss.hard_cross_entropy.focus": 0.0})
    found = {}
    for name, synthesizer in (("focus 2", full), ("focus 0", easy)):
        batch = made(synthesizer)
        logits = job().teacher.view(batch.images).logits
        p = logits.softmax(1).gather(1, batch.labels[:, None])[:, 0]
        found[name] = ((1 - p > 0.2) & (1 - p < 0.8)).float().mean().item(), p.mean().item()
    listed = ", ".join(
        f"{name}: {100 * middle:.0f} % in [0.2, 0.8], mean p {p:.3f}" for name, (middle, p) in found.items()
    )
    say("7 more mass of 1 - p in [0.2, 0.8] than without the weight", listed, found["focus 2"][0] > found["focus 0"][0])
    bn, here = full.loss.terms[0], job()
    noise = torch.randn(128, *NETWORK.input_shape, generator=torch.Generator().manual_seed(0))
    ends = [bn.value(here.teacher.view(x, bn.needs)).item() for x in (noise, made(full).images)]
    say("7 BN statistics fall more than 10x from noise", f"{ends[0]:.3f} -> {ends[1]:.4f}", ends[0] > 10 * ends[1])


def synq(rest: Images) -> None:
    """Check 7: high frequencies before and after the filter."""
    batch = made(fast("hast").synthesizer)
    shares = {
        "synthetic": high(batch.images),
        "filtered": high(LowPass().move(batch.images, torch.Generator())),
        "real": high(real(rest, 128)),
    }
    listed = ", ".join(f"{name} {value:.3f}" for name, value in shares.items())
    say("7 filtering lowers the share beyond half of Nyquist", listed, shares["filtered"] < shares["synthetic"])
    say("7 real images have less of it than synthetic ones", listed, shares["real"] < shares["synthetic"])


def high(images: Tensor) -> float:
    """The share of the amplitude at frequencies beyond half of Nyquist."""
    size = images.shape[-1]
    spectrum = torch.fft.fft2(images).abs()
    f = torch.fft.fftfreq(size)
    far = (f[:, None] ** 2 + f**2).sqrt() > 0.25
    return (spectrum[..., far].sum() / spectrum.sum()).item()


CHECKS: dict[str, Callable[[Images], None]] = {
    "gdfq": gdfq,
    "qimera": qimera,
    "ait": ait,
    "intraq": intraq,
    "hast": hast,
    "synq": synq,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", nargs="+", choices=CHECKS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    rest = read_images(args.data, NETWORK.input_shape)
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(1))[2000:4000]
    rest = Images(rest.pixels[order], rest.labels[order], rest.classes)
    for card in args.cards:
        print(f"\n### {card}\n\n| the card expects | found | |\n|---|---|---|", flush=True)
        CHECKS[card](rest)


if __name__ == "__main__":
    main()
