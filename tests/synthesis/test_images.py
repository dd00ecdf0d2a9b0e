from dataclasses import dataclass, replace

import pytest
import tiny
import torch

from zsq.core import Loss, RecipeError, Run, Teacher
from zsq.losses import BNStatistics, CrossEntropy, ImageStatistics
from zsq.synthesis import (
    GaussianPixels,
    InTurn,
    Noise,
    OptimizeImages,
    Plateau,
    ShiftAndFlip,
    UniformLabels,
    UniformPixels,
    WarmUpCosine,
)
from zsq.synthesis.images import batch_sizes

SMALL = OptimizeImages(loss=BNStatistics(), samples=6, batch_size=4, steps=4)


def images_of(recipe, job):
    return list(recipe.stream(job))


def value(loss, network, images):
    return loss.value(Teacher(network).view(images, loss.needs)).item()


def test_descent_reduces_the_loss_fivefold(cnn, job_for):
    recipe = replace(SMALL, samples=8, batch_size=8, steps=100, lr=0.1)
    job = job_for(cnn)
    start = value(recipe.loss, cnn, GaussianPixels().draw((8, *tiny.SHAPE), job.run.fresh("x")))
    (batch,) = images_of(recipe, job)
    assert value(recipe.loss, cnn, batch.images) < start / 5


def test_images_come_in_batches_without_gradients(cnn, job_for):
    made = images_of(SMALL, job_for(cnn))
    assert [tuple(batch.images.shape) for batch in made] == [(4, 3, 8, 8), (2, 3, 8, 8)]
    assert all(batch.labels is None and not batch.images.requires_grad for batch in made)


def test_the_seed_decides_every_bit(cnn, job_for):
    def made(seed):
        recipe = replace(
            SMALL, labels=UniformLabels(), jitter=ShiftAndFlip(limit=1 / 4), loss=CrossEntropy() + SMALL.loss
        )
        return images_of(recipe, job_for(cnn, Run(device="cpu", seed=seed)))

    for a, b, other in zip(made(1), made(1), made(2), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert not torch.equal(a.images, other.images)
    assert not torch.equal(made(1)[0].images[:2], made(1)[1].images)  # batches do not repeat each other


def test_a_batch_does_not_depend_on_those_before_it(cnn, job_for, tmp_path):
    whole = images_of(SMALL, job_for(cnn, Run(tmp_path / "a", device="cpu")))
    (tmp_path / "a" / "pieces" / "images" / "0.pt").unlink()  # as if the first had been lost
    again = images_of(SMALL, job_for(cnn, Run(tmp_path / "a", device="cpu")))
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole, again, strict=True))


def test_a_kept_batch_comes_back_with_its_labels(cnn, job_for, tmp_path):
    recipe = replace(SMALL, labels=UniformLabels(), loss=CrossEntropy())
    first = images_of(recipe, job_for(cnn, Run(tmp_path, device="cpu")))
    again = images_of(recipe, job_for(cnn, Run(tmp_path, device="cpu")))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.labels.dtype == torch.int64
        assert set(a.labels.tolist()) <= set(range(5))


def test_labels_make_the_teacher_see_their_classes(cnn, job_for):
    recipe = OptimizeImages(loss=CrossEntropy(), labels=UniformLabels(), samples=8, batch_size=8, lr=0.1)
    costs = []
    for steps in (1, 60):
        (batch,) = images_of(replace(recipe, steps=steps), job_for(cnn))
        costs.append(CrossEntropy().value(Teacher(cnn).view(batch.images, labels=batch.labels)).item())
    assert costs[1] < costs[0] / 2


def test_a_loss_that_reads_labels_needs_some():
    with pytest.raises(RecipeError, match="the loss reads labels"):
        replace(SMALL, loss=CrossEntropy())


def test_a_jitter_moves_what_is_looked_at_and_not_the_image(cnn, job_for):
    @dataclass(frozen=True, kw_only=True)
    class Still(Loss):
        """No gradient: the image must come back as it started."""

        def value(self, view):
            return 0 * view.images.sum()

    recipe = replace(SMALL, loss=Still(), jitter=ShiftAndFlip(limit=3 / 8), samples=4)
    (moved,) = images_of(recipe, job_for(cnn))
    (still,) = images_of(replace(recipe, jitter=None), job_for(cnn))
    assert torch.equal(moved.images, still.images)


def test_a_plateau_lowers_the_learning_rate_and_stops_at_the_least():
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    slow = Plateau(factor=0.1, patience=2, min_lr=0.05).build(optimizer, 8)
    rates = []
    for loss in [5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]:  # the third step in vain is one too many
        slow(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.05])


def test_the_schedule_reaches_the_pixels(cnn, job_for):
    eager = replace(SMALL, samples=4, steps=30, schedule=Plateau(patience=0, factor=0.01, min_lr=0.0), lr=2.0)
    (slowed,) = images_of(eager, job_for(cnn))
    (free,) = images_of(replace(eager, schedule=None), job_for(cnn))
    assert not torch.equal(slowed.images, free.images)


def rates(schedule, base, steps):
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=base)
    slow, found = schedule.build(optimizer, steps), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        slow(0.0)
    return found


def test_a_rate_that_warms_up_and_falls_in_two_rounds():
    # card of PSAQ-ViT, check 3: 2 x 500 steps, the first 100 of each rising
    found = rates(WarmUpCosine(rounds=2, warm_up=0.2), 0.2, 1000)
    assert [found[step] for step in (0, 99, 100, 300, 500)] == pytest.approx([0.002, 0.2, 0.2, 0.1, 0.002])
    assert 0 < found[499] < 1e-5
    assert found[500:] == pytest.approx(found[:500])


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_a_few_steps_have_a_rate_too(steps):
    assert all(0 <= rate <= 1 for rate in rates(WarmUpCosine(rounds=2, warm_up=0.2), 1.0, steps))


def test_moments_outlive_the_rounds():
    pixel = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.Adam([pixel], lr=1.0)
    slow = WarmUpCosine(rounds=2).build(optimizer, 6)
    for _ in range(6):
        pixel.grad = torch.ones(1)
        optimizer.step()
        slow(0.0)
    state = optimizer.state[pixel]
    assert state["step"] == 6
    assert state["exp_avg"].item() == pytest.approx(1 - 0.9**6)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"warm_up": 1.0}, {"warm_up": -0.1}])
def test_rounds_that_make_no_sense_are_refused(wrong):
    with pytest.raises(RecipeError, match=r"rounds must be at least 1|warm_up must lie in"):
        WarmUpCosine(**wrong)


def test_pixels_are_kept_in_the_box_of_their_channel(cnn, job_for):
    job = job_for(cnn)
    job.pixel_box = ((-0.1, 0.2), (-1.0, 0.3), (0.0, 0.1))
    (boxed,) = images_of(replace(SMALL, samples=4, clamp=True), job)
    for channel, (low, high) in enumerate(job.pixel_box):
        values = boxed.images[:, channel]
        assert values.min().item() == pytest.approx(low)
        assert values.max().item() == pytest.approx(high)
    (free,) = images_of(replace(SMALL, samples=4), job)
    assert free.images.abs().max() > 1


def test_the_first_step_of_adam_does_not_depend_on_its_betas_and_the_third_does(cnn, job_for):
    def images(steps, betas):
        return images_of(replace(SMALL, samples=4, steps=steps, betas=betas), job_for(cnn))[0].images

    assert torch.allclose(images(1, (0.9, 0.999)), images(1, (0.5, 0.9)), atol=1e-5)
    assert not torch.allclose(images(3, (0.9, 0.999)), images(3, (0.5, 0.9)), atol=1e-2)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.5, -0.1)])
def test_betas_outside_of_0_to_1_are_refused(betas):
    with pytest.raises(RecipeError, match=r"betas must lie in \[0, 1\)"):
        replace(SMALL, betas=betas)


def test_jitters_take_turns_in_the_loop(cnn, job_for):
    turns = InTurn(first=ShiftAndFlip(limit=0.0, flip=False), second=ShiftAndFlip(limit=0.5))
    recipe = replace(SMALL, samples=4, steps=4, jitter=turns)
    moved = []

    @dataclass(frozen=True, kw_only=True)
    class Watch(Loss):
        """Whether the images of a look are the pixels."""

        def value(self, view):
            moved.append(not torch.equal(view.images, view.pixels))
            return view.images.square().sum()

    images_of(replace(recipe, loss=Watch()), job_for(cnn))
    assert moved[:2] == [False, False]
    assert any(moved[2:])


@pytest.mark.parametrize("factor", [0.0, 1.0, -0.5])
def test_a_plateau_that_lowers_nothing_is_refused(factor):
    with pytest.raises(RecipeError, match="factor must lie between 0 and 1"):
        Plateau(factor=factor)


def test_noise_is_one_batch_in_the_shape_of_the_network(cnn, job_for):
    (batch,) = images_of(Noise(samples=5), job_for(cnn))
    assert batch.images.shape == (5, 3, 8, 8)
    (flat,) = images_of(Noise(pixels=UniformPixels(low=2.0, high=3.0), samples=5), job_for(cnn))
    assert flat.images.min() >= 2
    assert flat.images.max() <= 3


@pytest.mark.parametrize("name", ["samples", "batch_size", "steps"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(RecipeError, match=rf"OptimizeImages.{name} must be at least 1, got 0"):
        replace(SMALL, **{name: 0})


@pytest.mark.parametrize(
    ("samples", "batch_size", "sizes"), [(8, 4, [4, 4]), (9, 4, [4, 4, 1]), (3, 4, [3]), (4, 4, [4]), (3, 1, [1, 1, 1])]
)
def test_batch_sizes(samples, batch_size, sizes):
    assert batch_sizes(samples, batch_size) == sizes


def test_the_teacher_has_no_gradients_afterwards(cnn, job_for):
    job = job_for(cnn)
    images_of(replace(SMALL, loss=BNStatistics() + ImageStatistics()), job)
    assert all(parameter.grad is None for parameter in job.teacher.module.parameters())
