"""A synthesis step of ZeroQ against the bare loop: forward and backward to the image of the same frozen network.

    python benchmarks/synthesis_step.py zoo:resnet20-cifar10 --batch 64 --threads 2

Both run in one process, interleaved; the medians of five rounds are compared.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch.optim import Adam

from zsq import METHODS, load_network
from zsq.allocator import keep_freed_memory
from zsq.core import Bits, Job, Run, Teacher, needs, start
from zsq.nets.graph import capture


def seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    network = load_network(args.model)
    bare = copy.deepcopy(network.module).requires_grad_(False)
    teacher = Teacher(network.module)
    recipe = METHODS["zeroq"].synthesizer
    run = Run()
    pixels = recipe.pixels.draw((args.batch, *network.input_shape), run.fresh("images"))
    plain = pixels.clone().requires_grad_()
    looked = pixels.clone().requires_grad_()
    optimizers = [Adam([x], lr=recipe.lr) for x in (plain, looked)]
    student = capture(network.module, torch.zeros(2, *network.input_shape))
    objective = start(recipe.loss, Job(teacher, student, Bits(), run, network.input_shape))
    seen = needs(recipe.loss)

    def bare_loop() -> None:
        loss = bare(plain).square().mean()
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()

    def synthesis() -> None:
        loss = objective(teacher.view(looked, seen))
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()

    bare_loop(), synthesis()
    pairs = [(seconds(bare_loop), seconds(synthesis)) for _ in range(args.rounds)]
    ratio = statistics.median(ours / theirs for theirs, ours in pairs)
    theirs, ours = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
    print(f"{network.name}, batch {args.batch}, {args.threads} threads: bare {theirs:.0f} ms, zeroq {ours:.0f} ms")
    print(f"ratio {ratio:.2f} (median of {args.rounds} interleaved rounds)")


if __name__ == "__main__":
    main()
