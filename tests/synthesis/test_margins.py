import pytest
import torch
from torch import nn
from torch.testing import assert_close

from zsq.core import Bits, Job, RecipeError, Run, Source, Teacher
from zsq.nets.graph import capture
from zsq.synthesis import DeadLeaves, Noise, ReachMargins
from zsq.synthesis.margins import margins

SHAPE = (3, 4, 4)


def job_on(network: nn.Module, seed: int = 0) -> Job:
    box = ((-2.0, 2.0),) * 3
    return Job(
        Teacher(network), capture(network, torch.zeros(2, *SHAPE)), Bits(), Run(device="cpu", seed=seed), SHAPE, box
    )


def linear() -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    nn.init.normal_(network[1].weight, std=0.2, generator=torch.Generator().manual_seed(1))
    return network.eval()


def drawn(job: Job, size: int, lead: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and leads as the recipe draws them: inside its piece, labels first."""
    rng = Run(device="cpu").fresh("margins/0/margins")
    return torch.randint(5, (size,), generator=rng), lead * torch.rand(size, generator=rng)


def test_margins_by_hand():
    logits = torch.tensor([[3.0, 1.0, 2.5], [0.0, -1.0, 4.0]])
    assert_close(margins(logits, torch.tensor([0, 1])), torch.tensor([0.5, -5.0]))


def test_every_image_leads_by_what_was_drawn_for_it():
    job = job_on(linear())
    made = Source(ReachMargins(start=Noise(pixels=DeadLeaves(), samples=32), lead=3.0, steps=20), job).take(None)
    labels, wanted = drawn(job, 32, 3.0)
    assert torch.equal(made.labels, labels)
    found = margins(job.teacher.module(made.images), labels)
    started = margins(job.teacher.module(Source(Noise(pixels=DeadLeaves(), samples=32), job).take(None).images), labels)
    assert (started < wanted).sum() > 16
    assert (found >= wanted - 1e-3).all()
    moved = started < wanted
    assert_close(found[moved], wanted[moved], atol=0.5, rtol=0)  # and not by much more


def test_an_image_that_leads_already_stays():
    job, start = job_on(linear()), Noise(pixels=DeadLeaves(std=0.5), samples=16)
    before = Source(start, job).take(None).images.clamp(-2, 2)
    made = Source(ReachMargins(start=start, lead=1e-6), job).take(None)
    leads = margins(job.teacher.module(before), made.labels) > 1e-6
    assert leads.any()
    assert not leads.all()
    assert torch.equal(made.images[leads], before[leads])
    assert all(not torch.equal(a, b) for a, b in zip(made.images[~leads], before[~leads], strict=True))


def test_images_stay_within_what_a_file_can_hold_and_the_teacher_as_it_was():
    network = linear()
    job = job_on(network)
    made = Source(ReachMargins(start=Noise(samples=8), lead=1000.0), job).take(None)
    assert made.images.min() >= -2
    assert made.images.max() <= 2
    assert not made.images.requires_grad
    assert all(p.grad is None for p in job.teacher.module.parameters())


def test_a_network_that_looks_at_nothing_moves_nothing():
    network = linear()
    nn.init.zeros_(network[1].weight)
    start = Noise(pixels=DeadLeaves(), samples=4)
    made = Source(ReachMargins(start=start), job_on(network)).take(None)
    assert made.images.isfinite().all()
    assert torch.equal(made.images, Source(start, job_on(network)).take(None).images.clamp(-2, 2))


@pytest.mark.parametrize("change", [{"steps": 0}, {"lead": 0.0}])
def test_what_cannot_be_reached_is_refused(change):
    with pytest.raises(RecipeError):
        ReachMargins(start=Noise(), **change)
