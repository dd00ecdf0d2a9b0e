from dataclasses import dataclass, replace

import pytest
import torch
from torch.testing import assert_close

from zsq.core import Recipe, RecipeError, Run, Teacher
from zsq.losses import BNStatistics, ImageStatistics
from zsq.synthesis import OptimizeLatents, UpsampleGenerator

LOSS = BNStatistics(over="batch", channels="mean")
SMALL = OptimizeLatents(
    loss=LOSS + ImageStatistics(), generator=UpsampleGenerator(latent=8, wide=6, narrow=4),
    samples=10, batch_size=6, steps=4,
)  # fmt: skip


def images_of(recipe, job):
    return list(recipe.stream(job))


def test_descent_reduces_the_loss_threefold(cnn, job_for):
    recipe = replace(SMALL, loss=LOSS, samples=16, batch_size=16)
    losses = {}
    for steps in (1, 120):
        (batch,) = images_of(replace(recipe, steps=steps), job_for(cnn))
        losses[steps] = LOSS.value(Teacher(cnn).view(batch.images, LOSS.needs)).item()
    assert losses[120] < losses[1] / 3


def test_images_come_in_batches_normalised_by_the_generator(cnn, job_for):
    made = images_of(SMALL, job_for(cnn))
    assert [tuple(batch.images.shape) for batch in made] == [(6, 3, 8, 8), (4, 3, 8, 8)]
    for batch in made:
        assert batch.labels is None
        assert not batch.images.requires_grad
        assert_close(batch.images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
        assert_close(batch.images.var((0, 2, 3), correction=0), torch.ones(3), atol=2e-2, rtol=0)


def test_the_seed_decides_every_bit(cnn, job_for):
    def made(seed):
        return images_of(SMALL, job_for(cnn, Run(device="cpu", seed=seed)))

    for a, b, other in zip(made(1), made(1), made(2), strict=True):
        assert torch.equal(a.images, b.images)
        assert not torch.equal(a.images, other.images)


def test_a_lost_batch_is_made_again_with_the_same_bits(cnn, job_for, tmp_path):
    whole = images_of(SMALL, job_for(cnn, Run(tmp_path, device="cpu")))
    (tmp_path / "pieces" / "images" / "1.pt").unlink()
    again = images_of(SMALL, job_for(cnn, Run(tmp_path, device="cpu")))
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole, again, strict=True))


def test_a_change_is_made_for_synthesis_only(cnn, job_for):
    changed = []

    @dataclass(frozen=True, kw_only=True)
    class Zero(Recipe):
        def build(self, job):
            def change(network):
                with torch.no_grad():
                    network[0].weight.zero_()
                changed.append(network)
                return network

            return change

    job = job_for(cnn)
    before = job.teacher.digest()
    (with_change, _) = images_of(replace(SMALL, change=Zero()), job)
    (without, _) = images_of(SMALL, job)
    assert len(changed) == 2  # one copy a batch
    assert job.teacher.digest() == before
    assert not torch.equal(with_change.images, without.images)


@pytest.mark.parametrize("name", ["samples", "batch_size", "steps", "decay_every"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(RecipeError, match=rf"OptimizeLatents.{name} must be at least 1, got 0"):
        replace(SMALL, **{name: 0})
