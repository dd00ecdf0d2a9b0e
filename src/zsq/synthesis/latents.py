"""Images by descent in latent vectors and a generator of their own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import StepLR

from zsq.core import Batch, Job, Loss, Objective, Recipe, check_counts, check_positive, needs, start
from zsq.synthesis.images import Piece, Plateau, batch_sizes, made
from zsq.synthesis.networks import UpsampleGenerator

__all__ = ["Change", "OptimizeLatents"]


class Change(Protocol):
    """A change of the network that is made for synthesis only."""

    def build(self, job: Job) -> Callable[[nn.Module], nn.Module]:
        """A function that changes a copy of the teacher's network."""


@dataclass(frozen=True, kw_only=True)
class OptimizeLatents(Recipe):
    """Descend an objective in latent vectors and a throw-away generator together, one generator a batch.

    The generator ties the images of a batch together while each keeps its own latent. The images of the last
    forward pass are kept. Labels and jitters have no place here: the objective reads statistics alone.
    """

    loss: Loss | Objective
    change: Change | None = None
    """How the teacher is changed while it is looked at."""
    generator: UpsampleGenerator = UpsampleGenerator()
    samples: int = 1024
    """Images in all."""
    batch_size: int = 128
    """Images that share a generator."""
    steps: int = 4_000
    """Steps a batch."""
    lr_latents: float = 0.1
    """Adam learning rate of the latents, lowered on plateaus."""
    lr_generator: float = 0.01
    """Adam learning rate of the generator, multiplied by ``decay`` every ``decay_every`` steps."""
    schedule: Plateau = Plateau()
    decay: float = 0.95
    decay_every: int = 100

    live: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(self, "samples", "batch_size", "steps", "decay_every")
        check_positive(self, "lr_latents", "lr_generator", "decay")

    def stream(self, job: Job) -> Iterator[Batch]:
        """The batches, each a piece of work of its own."""
        sizes = enumerate(batch_sizes(self.samples, self.batch_size))
        makes = {f"images/{index}": partial(self._optimize, size, job) for index, size in sizes}
        return map(made, job.run.pieces(makes))

    def _optimize(self, size: int, job: Job) -> Piece:
        teacher = job.teacher.changed(self.change.build(job)) if self.change else job.teacher
        rng = job.run.generator("latents")
        latents = torch.randn(size, self.generator.latent, generator=rng).to(job.run.device).requires_grad_()
        with job.run.seeded("generator"):
            generator = self.generator.build(job.input_shape).to(job.run.device)
        drive_latents = Adam([latents], lr=self.lr_latents)
        drive_generator = Adam(generator.parameters(), lr=self.lr_generator)
        plateau = self.schedule.build(drive_latents, self.steps)
        decay = StepLR(drive_generator, self.decay_every, self.decay)
        objective, seen = start(self.loss, job), needs(self.loss)
        images = torch.empty(0)
        for step in job.run.progress(self.steps, "synthesize"):
            images = generator(latents)
            loss = objective(teacher.view(images, seen))
            objective.check("synthesize", step)
            drive_latents.zero_grad()
            drive_generator.zero_grad()
            loss.backward()
            drive_latents.step()
            drive_generator.step()
            plateau(loss.item())
            decay.step()
            if step % 100 == 0 or step + 1 == self.steps:
                job.run.log("synthesize", step, loss=loss.item())
        return {"images": images.detach(), "labels": torch.empty(0)}
