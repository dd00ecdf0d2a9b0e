"""A training step of a method against its bare parts in a plain loop of the same networks, batch and precision.

    python benchmarks/training_step.py zoo:resnet20-cifar10 gdfq hast --batch 64 --threads 2

The bare parts are forward and backward passes without any objective worth the name: of the fake-quantized student, of
the teacher, of the generator where there is one, and of both networks to the image where the method asks for that;
and the steps of the optimizers. Both run in one process, interleaved; the medians of five rounds are compared.
On a machine with other work, ``--clock cpu`` counts the process's seconds on one thread instead of the wall's.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from zsq import load_network
from zsq.allocator import keep_freed_memory
from zsq.api import find_method
from zsq.core import Batch, Bits, Job, Run, Source, Teacher
from zsq.nets.graph import capture
from zsq.quant import Distill, InsertFakeQuant, Perturbed, TrackRanges
from zsq.synthesis import Noise, TrainGenerator

STEPS = 5
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(work: Callable[[], None], clock: Callable[[], float]) -> float:
    begin = clock()
    work()
    return (clock() - begin) / STEPS


def size_of(logits: Tensor) -> Tensor:
    return logits.square().mean()


class Plain:
    """The bare parts, as a loop without a library."""

    def __init__(self, job: Job, distill: Distill, synthesizer: object, batch: int) -> None:
        self.run = job.run
        self.teacher = copy.deepcopy(job.teacher.module)
        self.student = copy.deepcopy(job.student)
        self.optimizer = SGD([p for p in self.student.parameters() if p.requires_grad], 1e-9, 0.9, nesterov=True)
        self.images = torch.randn(batch, *job.input_shape)
        self.perturbed = isinstance(distill.gradient, Perturbed)
        self.generator: nn.Module | None = None
        if isinstance(synthesizer, TrainGenerator):
            self.code = synthesizer.latents.build(job, job.classes)
            self.generator = synthesizer.trunk.build(self.code.size, job.input_shape, job.classes)
            self.drawn = synthesizer.latents.draw(batch, job.classes, self.code, torch.Generator().manual_seed(0))
            parts = [*self.code.parameters(), *self.generator.parameters()]
            self.adam = Adam(parts, 1e-3)

    def __call__(self) -> None:
        for _ in range(STEPS):
            with self.run.autocast():
                self.step()

    def step(self) -> None:
        images = self.images
        if self.generator is not None:
            images = self.generator(self.code(self.drawn), self.drawn)
            self.adam.zero_grad()
            size_of(self.teacher(images)).backward()
            self.adam.step()
            images = images.detach()
        self.optimizer.zero_grad()
        if self.perturbed:
            images = images.requires_grad_()
            (size_of(self.teacher(images)) + size_of(self.student(images))).backward()
            images = images.detach()
        if self.generator is None:
            with torch.no_grad():
                self.teacher(images)
        size_of(self.student(images)).backward()
        self.optimizer.step()


class Ours:
    """The passes of the method, a few steps at a time."""

    def __init__(self, job: Job, distill: Distill, source: Source, batch: int) -> None:
        self.job, self.source = job, source
        self.distill = distill.override({"steps": STEPS, "batch_size": batch})

    def __call__(self) -> None:
        self.job.run = Run(device="cpu", precision=self.job.run.precision)
        self.distill.apply(self.job, self.source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    clock = CLOCKS[args.clock]
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    network = load_network(args.model)
    for name in args.methods:
        recipe = find_method(name).preset("fast")
        insert, _, *_, distill = recipe.quantizer
        assert isinstance(insert, InsertFakeQuant)
        assert isinstance(distill, Distill)
        teacher = Teacher(network.module)
        student = capture(teacher.module, torch.zeros(2, *network.input_shape))
        job = Job(teacher, student, Bits(4, 4), Run(device="cpu", precision=args.precision), network.input_shape)
        insert.apply(job, Source(Noise(), job))
        TrackRanges(steps=3, batch_size=args.batch).apply(job, Source(Noise(samples=args.batch), job))
        live = isinstance(recipe.synthesizer, TrainGenerator)
        images = recipe.synthesizer.override({"batch_size": args.batch}) if live else Noise(samples=4 * args.batch)
        source = Source(images, job)
        if not live:  # as if the method had made them
            labels = torch.randint(job.classes, (4 * args.batch,), generator=torch.Generator().manual_seed(0))
            pool = source.take()
            source = Source(_Given(Batch(pool.images, labels)), job)
        ours = Ours(job, distill, source, args.batch)
        ours()
        for parameter_name, parameter in job.student.named_parameters():
            parameter.requires_grad_(not parameter_name.endswith("scale"))
        plain = Plain(job, distill, images, args.batch)
        plain()
        pairs = [(seconds(plain, clock), seconds(ours, clock)) for _ in range(args.rounds)]
        ratio = statistics.median(mine / theirs for theirs, mine in pairs)
        theirs, mine = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
        about = f"{network.name}, {name}, batch {args.batch}, {args.threads} threads, {args.precision}, {args.clock}"
        print(f"{about}: parts {theirs:.0f} ms, step {mine:.0f} ms")
        print(f"ratio {ratio:.2f} (median of {args.rounds} interleaved rounds of {STEPS} steps)", flush=True)


class _Given:
    live = False

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def stream(self, job: Job):
        yield self.batch


if __name__ == "__main__":
    main()
