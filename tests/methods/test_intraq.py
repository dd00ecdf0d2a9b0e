import pytest
import torch
from torch.testing import assert_close

from zsq.core import Job, RecipeError, Run, View
from zsq.methods import METHODS
from zsq.methods.intraq import SoftInception

INTRAQ = METHODS["intraq"]


def view_of(p, count=1):
    """Images whose label 0 of two has the probability ``p``."""
    logits = torch.tensor([p, 1 - p]).log().repeat(count, 1).requires_grad_()
    return View(torch.empty(0), logits, labels=torch.zeros(count, dtype=torch.int64))


def targets_of(job: Job, piece: str, count: int, monkeypatch, looks: int = 1):
    """The confidences asked for at each look at a batch."""
    asked = []
    monkeypatch.setattr(SoftInception, "distance", lambda _, view, targets: asked.append(targets) or targets.mean())

    def make():
        term = SoftInception(least=0.6).begin(job)
        for _ in range(looks):
            term(view_of(0.9, count))
        return torch.stack(asked)

    return job.run.cached(piece, make)


def test_soft_inception_by_hand():
    # p 0.9 where 0.95 is asked for: 0.05^2; p 0.5 where 1 is: 0.5^2
    assert_close(SoftInception().distance(view_of(0.9), torch.tensor([0.95])), torch.tensor(0.0025))
    assert_close(SoftInception().value(view_of(0.5)), torch.tensor(0.25))


@pytest.mark.parametrize(("p", "sign"), [(0.90, -1), (0.95, 0), (0.99, 1)])
def test_a_confidence_is_pushed_to_the_one_asked_for_from_both_sides(p, sign):
    view = view_of(p)
    SoftInception().distance(view, torch.tensor([0.95])).backward()
    slope = view.logits.grad[0, 0].item()
    assert slope * sign > 0 if sign else abs(slope) < 1e-7


def test_soft_inception_is_the_formula():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, targets = torch.tensor([0, 3, 1, 2, 3, 0]), torch.linspace(0.5, 1, 6, dtype=torch.float64)
    powers = logits.exp()
    wanted = sum((powers[i, y] / powers[i].sum() - targets[i]) ** 2 for i, y in enumerate(labels)) / 6
    assert_close(SoftInception().distance(View(torch.empty(0), logits, labels=labels), targets), wanted)


def test_half_of_the_targets_are_1_and_the_others_spread_from_the_least(cnn, job_for, monkeypatch):
    (targets,) = targets_of(job_for(cnn), "images/0", 4000, monkeypatch)
    soft = targets[targets < 1]
    assert abs(len(soft) / 4000 - 0.5) < 0.03
    assert soft.min() >= 0.6
    assert abs(soft.mean() - 0.8) < 0.01  # uniform in 0.6 .. 1
    assert abs(soft.std() - 0.4 / 12**0.5) < 0.01


def test_targets_are_drawn_once_a_batch_and_the_seed_decides_them(cnn, job_for, monkeypatch):
    first, second, third = targets_of(job_for(cnn), "images/0", 8, monkeypatch, looks=3)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    (again,) = targets_of(job_for(cnn), "images/0", 8, monkeypatch)
    assert torch.equal(first, again)
    (next_batch,) = targets_of(job_for(cnn), "images/1", 8, monkeypatch)
    assert not torch.equal(first, next_batch)
    (other,) = targets_of(job_for(cnn, Run(device="cpu", seed=1)), "images/0", 8, monkeypatch)
    assert not torch.equal(first, other)


def test_certainty_is_asked_for_always_where_the_least_is_1(cnn, job_for):
    view = view_of(0.7, 50)
    assert_close(SoftInception(least=1.0).begin(job_for(cnn))(view), SoftInception().value(view))


@pytest.mark.parametrize("least", [-0.1, 1.1])
def test_a_least_confidence_that_is_none_is_refused(least):
    with pytest.raises(RecipeError, match=r"least must lie in \[0, 1\]"):
        SoftInception(least=least)


# the card's table: lambda_l, lambda_u, eps, learning rate, images a step, steps at which the rate falls;
# the student learns from epoch 4 of 200 steps on
@pytest.mark.parametrize(
    ("preset", "lower", "upper", "least", "lr", "batch_size", "at"),
    [
        ("cifar", 0.05, 0.8, 0.95, 1e-4, 256, (3_200, 7_200, 11_200)),
        ("cifar100", 0.02, 1.0, 0.6, 1e-4, 256, (3_200, 7_200, 11_200)),
        ("released", 0.0, 2.0, 1.0, 1e-6, 16, (19_200,)),
        ("paper", 0.3, 0.8, 0.9, 1e-6, 16, (19_200,)),
    ],
)
def test_the_settings_are_those_of_the_card(preset, lower, upper, least, lr, batch_size, at):
    method = INTRAQ.preset(preset)
    makes, distill = method.synthesizer, method.quantizer[-1]
    terms = makes.loss.parts()
    assert [term.weight for term in terms.values()] == [1, 1, 1]
    assert (terms["centre_distance"].lower, terms["centre_distance"].upper) == (lower, upper)
    assert terms["soft_inception"].least == least
    assert (makes.jitter.scale, makes.jitter.probability) == (0.5, 0.5)
    assert (makes.samples, makes.batch_size, makes.steps, makes.lr) == (5120, 256, 1000, 0.5)
    assert (makes.schedule.factor, makes.schedule.patience, makes.schedule.min_lr) == (0.1, 50, 1e-4)
    assert (distill.lr, distill.batch_size, distill.schedule.at) == (lr, batch_size, at)
    assert (distill.optimizer.momentum, distill.optimizer.weight_decay) == (0.9, 1e-4)
    assert distill.steps == (151 - 4) * 200
    kl = distill.loss.parts()["distillation"]
    assert kl.weight * kl.temperature**2 == 8000
    assert kl.reduction == "batchmean"


def test_the_released_code_finds_ranges_on_the_images_of_a_generator():
    ranges = INTRAQ.preset("released").quantizer[1]
    assert ranges.images.live
    assert ranges.images.batch_size == 16
    assert (ranges.steps, ranges.average.correction) == (800, "fed back")
    assert INTRAQ.quantizer[1].images is None
