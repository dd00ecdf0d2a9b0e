from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from torch import nn
from torch.testing import assert_close

from zsq.core import Batch, Bits, Job, Loss, MultiStep, RecipeError, Run, RunError, Source, Teacher
from zsq.losses import BNStatistics, CrossEntropy
from zsq.nets.graph import capture
from zsq.synthesis import ConvTrunk, LabelTimesNoise, TrainGenerator
from zsq.zoo import load_weights

STATISTICS = BNStatistics(over="batch", spread="var", unbiased=False, channels="mean", layers="mean")
SMALL = TrainGenerator(
    loss=CrossEntropy() + 0.1 * STATISTICS, latents=LabelTimesNoise(latent=8), trunk=ConvTrunk(wide=6, narrow=4),
    batch_size=8,
)  # fmt: skip


class Open(Run):
    """A run that shows what it tracks."""

    def __init__(self, **settings):
        super().__init__(device="cpu", **settings)
        self.things = {}

    def track(self, name, thing):
        self.things[name] = super().track(name, thing)
        return thing


def batches(recipe, job, count):
    source = Source(recipe, job)
    return [source.batch(step, 1) for step in range(count)]


def counted(module):
    """A list that grows with every call of ``module``."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_batches_have_the_shape_of_the_network_and_come_with_labels_and_logits(cnn, job_for):
    for batch in batches(SMALL, job_for(cnn), 3):
        assert batch.images.shape == (8, *tiny.SHAPE)
        assert batch.labels.shape == (8,)
        assert set(batch.labels.tolist()) <= set(range(5))
        assert batch.logits.shape == (8, 5)
        assert not batch.images.requires_grad
        assert not batch.logits.requires_grad


def test_every_batch_is_one_learning_step(cnn, job_for):
    run = Open()
    source = Source(replace(SMALL, schedule=MultiStep(at=(2,))), job_for(cnn, run))
    weights = []
    for step in range(3):
        source.batch(step, 1)
        optimizer = run.things["generator/optimizer"]
        assert {int(state["step"]) for state in optimizer.state.values()} == {step + 1}
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 if step < 1 else 1e-4)
        weights.append(torch.cat([p.detach().flatten() for p in run.things["generator/network"].parameters()]))
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_the_teacher_looks_once_a_step_and_its_logits_come_along(cnn, job_for):
    job = job_for(cnn)
    calls = counted(job.teacher.module)
    made = batches(SMALL, job, 4)
    assert len(calls) == 1 + 4  # the first look only counts the classes
    view = job.view(made[0], frozenset({"student", "labels"}))
    assert len(calls) == 5  # nobody has to look again
    assert torch.equal(view.logits, made[0].logits)
    for batch in made:
        assert_close(batch.logits, job.teacher.module(batch.images))


def test_a_batch_is_made_before_the_step_it_teaches(cnn, job_for):
    bold = replace(SMALL, lr=1.0)
    (first, second), (same, other) = batches(SMALL, job_for(cnn), 2), batches(bold, job_for(cnn), 2)
    assert torch.equal(first.images, same.images)
    assert torch.equal(first.logits, same.logits)
    assert not torch.equal(second.images, other.images)


def test_the_teacher_is_untouched(cnn, job_for):
    job = job_for(cnn)
    before = job.teacher.digest()
    batches(SMALL, job, 3)
    assert job.teacher.digest() == before
    assert all(parameter.grad is None for parameter in job.teacher.module.parameters())


def test_the_seed_decides_every_bit(cnn, job_for):
    made = [batches(SMALL, job_for(cnn, Run(device="cpu", seed=seed)), 3) for seed in (1, 1, 2)]
    for a, b, other in zip(*made, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert not torch.equal(a.images, other.images)


def test_a_resumed_generator_goes_on_with_the_same_bits(cnn, job_for, tmp_path):
    def part(folder, count):
        run = Run(folder, device="cpu")
        source = Source(replace(SMALL, schedule=MultiStep(at=(4,))), job_for(cnn, run))
        return [source.batch(step, 1) for step in run.steps(count, "learn")]

    whole = part(tmp_path / "whole", 6)
    part(tmp_path / "cut", 3)
    rest = part(tmp_path / "cut", 6)
    assert len(rest) == 3
    for a, b in zip(whole[3:], rest, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.logits, b.logits)


def test_images_meet_their_labels_and_the_statistics_after_a_hundred_steps():
    network = load_weights("digits-resnet")
    job = Job(Teacher(network), capture(network, torch.zeros(2, 1, 8, 8)), Bits(), Run(device="cpu"), (1, 8, 8))
    recipe = replace(SMALL, batch_size=32, lr=1e-2, trunk=ConvTrunk(wide=16, narrow=8))

    def costs(batch):
        view = job.teacher.view(batch.images, frozenset({"bn"}), labels=batch.labels)
        return torch.stack([CrossEntropy().value(view), STATISTICS.value(view)])

    found = torch.stack([costs(batch) for batch in batches(recipe, job, 100)])
    first, last = found[:5].mean(0), found[-5:].mean(0)
    assert last[0] < first[0] / 2
    assert last[1] < first[1] / 2


def test_the_objective_may_read_the_student_as_it_is_at_that_moment(cnn, job_for):
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Watch(Loss):
        needs = frozenset({"student"})

        def value(self, view):
            seen.append((view.images.detach(), view.student.detach()))
            return view.student.square().mean()

    job = job_for(cnn)
    source = Source(replace(SMALL, loss=Watch()), job)
    for step in range(2):
        source.batch(step, 1)
        assert_close(seen[-1][1], job.student(seen[-1][0]))
        with torch.no_grad():
            for parameter in job.student.parameters():
                parameter.mul_(0.5)


def test_a_consumer_without_gradients_changes_nothing(cnn, job_for):
    with torch.no_grad():
        silent = batches(SMALL, job_for(cnn), 2)
    assert torch.equal(silent[1].images, batches(SMALL, job_for(cnn), 2)[1].images)


def test_in_bfloat16_images_and_parameters_stay_float32(cnn, job_for):
    run = Open(precision="bfloat16")
    (batch,) = batches(SMALL, job_for(cnn, run), 1)
    assert batch.images.dtype == batch.logits.dtype == torch.float32
    assert {p.dtype for p in run.things["generator/network"].parameters()} == {torch.float32}
    (exact,) = batches(SMALL, job_for(cnn), 1)
    assert not torch.equal(batch.images, exact.images)
    assert_close(batch.images, exact.images, atol=0.1, rtol=0.1)


def test_a_network_of_one_logit_is_refused(cnn, job_for):
    cnn[-1] = nn.Linear(6, 1)
    with pytest.raises(RecipeError, match="needs at least 2 classes, this network has 1 logit"):
        batches(SMALL, job_for(cnn), 1)


def test_a_loss_that_is_no_number_stops_the_run_and_is_named(cnn, job_for):
    @dataclass(frozen=True, kw_only=True)
    class Broken(Loss):
        def value(self, view):
            return view.logits.sum() * torch.nan

    with pytest.raises(RunError, match="generator diverged at step 0: broken is nan; a lower learning rate"):
        batches(replace(SMALL, loss=CrossEntropy() + Broken()), job_for(cnn), 1)


def test_a_live_stream_has_no_end(cnn, job_for):
    with pytest.raises(RecipeError, match="without end"):
        Source(SMALL, job_for(cnn)).take(None)
    assert isinstance(Source(SMALL, job_for(cnn)).take(20), Batch)


@pytest.mark.parametrize(
    ("change", "says"), [({"batch_size": 0}, "batch_size must be at least 1"), ({"lr": 0.0}, "lr must be positive")]
)
def test_what_cannot_learn_is_refused(change, says):
    with pytest.raises(RecipeError, match=says):
        replace(SMALL, **change)
