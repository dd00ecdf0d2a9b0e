"""What images cost on vision transformers, with random weights: a step of PSAQ-ViT, and all of SMI.

    python benchmarks/vit_synthesis.py step vit-32
    python benchmarks/vit_synthesis.py step timm:deit_tiny_patch16_224 --rounds 5
    python benchmarks/vit_synthesis.py sparse timm:deit_tiny_patch16_224 --batch 8 --steps 80

``step``: whole steps of the synthesis (the look with attention visible, the losses, backward, Adam, the box) against
forward and backward to the image of the same network with attention in separate products, one after the other in one
process; medians. ``sparse``: SMI with its stops scaled to ``--steps``, against the same steps on all patches, each in
a process of its own; the memory is what the process grew by at its peak, also when it starts with the patches that
are left after the last stop. ``vit-32`` has 6 blocks of width 192 on 64 patches of 4 pixels.
"""

import argparse
import copy
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch

from zsq import METHODS, load_network
from zsq.allocator import keep_freed_memory
from zsq.core import Bits, Job, Run, Source, Teacher
from zsq.nets.compat import import_timm
from zsq.nets.graph import capture
from zsq.nets.load import Network
from zsq.nets.tracing import prepare


def network_of(name: str) -> Network:
    """The network ``name`` with random weights."""
    torch.manual_seed(0)
    if name != "vit-32":
        return load_network(name, pretrained=False)
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=4, num_classes=10, embed_dim=192, depth=6, num_heads=3)
    return replace(load_network(model, input_shape=(3, 32, 32)), name=name)


def job_of(network: Network, run: Run) -> Job:
    """A job on ``network``."""
    student = capture(network.module, torch.zeros(2, *network.input_shape))
    return Job(Teacher(network.module), student, Bits(), run, network.input_shape)


class Alternating:
    """A reporter that times each step of a loop, and one forward and backward of the bare network after it."""

    def __init__(self, network: Network, batch: int) -> None:
        self.bare = prepare(copy.deepcopy(network.module)).requires_grad_(False)
        self.images = torch.randn(batch, *network.input_shape, requires_grad=True)
        self.pairs: list[tuple[float, float]] = []
        self.begin = 0.0

    def progress(self, label: str, done: int, count: int) -> None:
        """One step is done."""
        ours, begin = time.perf_counter() - self.begin, time.perf_counter()
        self.bare(self.images).square().mean().backward()
        self.images.grad = None
        if done > 1:  # the first of each is warm-up
            self.pairs.append((ours, time.perf_counter() - begin))
        self.begin = time.perf_counter()


def step(args: argparse.Namespace) -> None:
    network = network_of(args.model)
    timer = Alternating(network, args.batch)
    recipe = METHODS["psaq-vit"].synthesizer.override(
        {"samples": args.batch, "batch_size": args.batch, "steps": args.rounds + 1}
    )
    Source(recipe, job_of(network, Run(device="cpu", reporter=timer))).take()
    ratio = statistics.median(ours / theirs for ours, theirs in timer.pairs)
    ours, theirs = (statistics.median(column) * 1e3 for column in zip(*timer.pairs, strict=True))
    print(f"{network.name}, batch {args.batch}, {args.threads} threads: bare {theirs:.0f} ms, psaq-vit {ours:.0f} ms")
    print(f"ratio {ratio:.2f} (median of {args.rounds} interleaved rounds)")


def peak() -> float:
    """The most memory that this process had so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(args: argparse.Namespace) -> None:
    """One synthesis, in the process that was started for it."""
    network = network_of(args.model)
    job, method = job_of(network, Run(device="cpu")), METHODS["smi"]
    counts = {"samples": args.batch, "batch_size": args.batch, "steps": args.steps}
    makes = method.synthesizer.override(counts)
    stops = tuple(max(1, round(at * args.steps / method.synthesizer.steps)) for at in makes.patches.stops)
    makes = makes.override({"patches.stops": stops} if args.way == "sparse" else {"patches": None})
    job.teacher.view(torch.zeros(1, *network.input_shape))
    before, begin = peak(), time.perf_counter()
    if args.way == "survivors":
        left = math.prod(job.teacher.landmarks.grid)
        for _ in stops:
            left = int(left * (1 - method.synthesizer.patches.share))
        tokens = torch.arange(1 + left).expand(args.batch, -1)
        images = torch.randn(args.batch, *network.input_shape, requires_grad=True)
        for _ in range(2):
            job.teacher.view(images, tokens=tokens).logits.square().mean().backward()
    else:
        Source(makes, job).take()
    print(json.dumps({"seconds": time.perf_counter() - begin, "grown": peak() - before}))


def sparse(args: argparse.Namespace) -> None:
    found = {}
    for way in ("dense", "sparse", "survivors"):
        words = [sys.executable, __file__, "alone", args.model, "--way", way, "--batch", str(args.batch)]
        words += ["--steps", str(args.steps), "--threads", str(args.threads)]
        found[way] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        took = "" if way == "survivors" else f"{found[way]['seconds']:.1f} s, "
        print(f"{way}: {took}{found[way]['grown']:.0f} MB", flush=True)
    print(f"{found['dense']['seconds'] / found['sparse']['seconds']:.2f} times faster")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "sparse", "alone"))
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--way", choices=("dense", "sparse", "survivors"), default="dense", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    {"step": step, "sparse": sparse, "alone": alone}[args.what](args)


if __name__ == "__main__":
    main()
