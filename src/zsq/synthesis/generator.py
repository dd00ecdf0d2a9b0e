"""A generator that learns beside the student."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.optim import Adam

from zsq.core import (
    Batch,
    Job,
    Loss,
    MultiStep,
    Objective,
    Recipe,
    RecipeError,
    check_counts,
    check_positive,
    needs,
    start,
)
from zsq.synthesis.networks import ConvTrunk, LabelTimesNoise, Latents, Trunk

__all__ = ["TrainGenerator"]


@dataclass(frozen=True, kw_only=True)
class TrainGenerator(Recipe):
    """Yield the batches of a class-conditional generator that makes one learning step for each.

    The objective may read the student as it is at that moment. The batch is that of the step, with the teacher's
    logits on it, so the teacher looks at it once.
    """

    loss: Loss | Objective
    latents: Latents = LabelTimesNoise()
    trunk: Trunk = ConvTrunk()
    batch_size: int = 64
    """Images a step."""
    lr: float = 1e-3
    """Adam learning rate."""
    betas: tuple[float, float] = (0.5, 0.999)
    schedule: MultiStep = MultiStep()

    live: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(self, "batch_size")
        check_positive(self, "lr")

    def stream(self, job: Job) -> Iterator[Batch]:
        """Batches without end. Everything that changes is tracked, so that a resumed loop goes on from its step."""
        run, classes = job.run, job.classes
        if classes < 2:
            raise RecipeError("a class-conditional generator needs at least 2 classes, this network has 1 logit")
        with run.seeded("generator"):
            code = self.latents.build(job, classes)
            trunk = self.trunk.build(int(code.size), job.input_shape, classes)  # type: ignore[arg-type]  # a LatentCode
        parts = nn.ModuleList([code, trunk]).to(run.device).train()
        run.track("generator/network", parts)
        optimizer = run.track("generator/optimizer", Adam(parts.parameters(), self.lr, self.betas))
        schedule = run.track("generator/schedule", self.schedule.build(optimizer))
        rng = run.generator("generator")
        objective, seen = start(self.loss, job), needs(self.loss)
        step = schedule.last_epoch  # the steps that are behind, also after an interruption
        while True:
            drawn = self.latents.draw(self.batch_size, classes, code, rng).to(run.device)
            with torch.enable_grad():
                with run.autocast():
                    images = trunk(code(drawn), drawn).float()
                view = job.view(Batch(images, drawn.targets(classes)), seen)
                loss = objective(view)
                objective.check("generator", step)
                optimizer.zero_grad()
                loss.backward()
            run.average(parts)  # alike on every rank, but for devices that add in no fixed order
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                run.log("generator", step, loss=loss.item(), **objective.numbers())
            step += 1
            yield Batch(images.detach(), view.labels, view.logits.detach())
