"""BatchNorm statistics: by hand, against a slow transcription in float64, and properties."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from zsq.core import BNInput, RecipeError, View
from zsq.losses import BNStatistics, ImageStatistics
from zsq.losses.statistics import moments


def view_of(*layers: BNInput) -> View:
    return View(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5), bn=list(layers))


def layer(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> BNInput:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng, dtype=dtype) * 1.7 + 0.4
    mean = torch.randn(shape[1], generator=rng, dtype=dtype)
    return BNInput(x, mean, torch.rand(shape[1], generator=rng, dtype=dtype) + 0.2)


# --- by hand ----------------------------------------------------------------------------------------------------


def test_a_constant_image_by_hand():
    # one channel of recorded mean 0 and std 1; constant c = 3 has mean 3 and no spread
    unit = BNInput(torch.full((1, 1, 4, 4), 3.0), torch.zeros(1), torch.ones(1))
    wanted = 3**2 + (math.sqrt(1e-6) - math.sqrt(1 + 1e-6)) ** 2
    assert BNStatistics().value(view_of(unit)).item() == pytest.approx(wanted, rel=1e-6)


def test_two_images_by_hand():
    # images (0, 2) and (4, 8): means 1 and 6, unbiased variances 2 and 8; recorded mean 0, variance 0
    x = torch.tensor([[[[0.0, 2.0]]], [[[4.0, 8.0]]]])
    view = view_of(BNInput(x, torch.zeros(1), torch.zeros(1)))
    # per image: mean of (1 + 2) and (36 + 8)
    assert BNStatistics(eps=0).value(view).item() == pytest.approx((3 + 44) / 2)
    assert BNStatistics(eps=0, spread="var").value(view).item() == pytest.approx((1 + 4 + 36 + 64) / 2)
    # batch 0, 2, 4, 8: mean 3.5, squared deviations 12.25 + 2.25 + 0.25 + 20.25 = 35, variance 35/3 or 35/4
    batch = {"over": "batch", "spread": "var"}
    assert BNStatistics(**batch).value(view).item() == pytest.approx(3.5**2 + (35 / 3) ** 2)
    assert BNStatistics(**batch, unbiased=False).value(view).item() == pytest.approx(3.5**2 + (35 / 4) ** 2)
    # un-squared norms of one channel are absolute values
    assert BNStatistics(**batch, channels="norm").value(view).item() == pytest.approx(3.5 + 35 / 3)
    # a margin of 3 frees the mean but for 0.5
    assert BNStatistics(**batch, margin=3.0).value(view).item() == pytest.approx(0.5**2 + (35 / 3 - 3) ** 2)


def test_the_first_layer_can_weigh_more():
    view = view_of(layer(0, (4, 2, 3, 3)), layer(1, (4, 5, 2, 2)))
    one, two = (BNStatistics().value(view_of(each)).item() for each in view.bn)
    assert BNStatistics(first_layer=10.0).value(view).item() == pytest.approx(10 * one + two, rel=1e-5)
    assert BNStatistics(first_layer=10.0, layers="mean").value(view).item() == pytest.approx(
        (10 * one + two) / 2, rel=1e-5
    )


# --- against a slow transcription -------------------------------------------------------------------------------


def slow_moments(values: list[float], unbiased: bool) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values) / (len(values) - unbiased)


def slow(loss: BNStatistics, layers: list[BNInput]) -> float:
    """The formula with loops over numbers."""
    terms = []
    for x, mean, var in ((each.x.double(), each.mean.double(), each.var.double()) for each in layers):
        images, channels = x.shape[:2]
        each = loss.over == "image" and x[0, 0].numel() > 1
        groups = [[image] for image in range(images)] if each else [list(range(images))]
        total = 0.0
        for group in groups:
            gaps: tuple[list[float], list[float]] = ([], [])
            for channel in range(channels):
                values = [value for image in group for value in x[image, channel].flatten().tolist()]
                found, spread = slow_moments(values, loss.unbiased)
                target = var[channel].item()
                if loss.spread == "std":
                    spread, target = math.sqrt(spread + loss.eps), math.sqrt(target + loss.eps)
                gaps[0].append(found - mean[channel].item())
                gaps[1].append(spread - target)
            for row in gaps:
                squares = sum(max(abs(gap) - loss.margin, 0.0) ** 2 for gap in row)
                total += {"sum": squares, "mean": squares / channels, "norm": math.sqrt(squares)}[loss.channels]
        terms.append(total / len(groups))
    terms[0] *= loss.first_layer
    return sum(terms) if loss.layers == "sum" else sum(terms) / len(terms)


PAPERS = {
    "zeroq": BNStatistics(),
    "dsg-ptq": BNStatistics(margin=0.3),
    "dsg-qat": BNStatistics(over="batch", spread="var", unbiased=False, layers="mean", margin=0.2),
    "deepinversion": BNStatistics(over="batch", spread="var", unbiased=False, channels="norm", first_layer=10.0),
    "gdfq": BNStatistics(over="batch", spread="var", unbiased=False, channels="mean", layers="mean"),
    "genie": BNStatistics(over="batch", channels="mean"),
}


OPTIONS = list(product(["image", "batch"], ["std", "var"], [True, False], ["sum", "mean", "norm"], ["sum", "mean"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", PAPERS.values(), ids=PAPERS.keys())
def test_the_options_of_the_papers_match_a_slow_transcription(loss, dtype):
    layers = [layer(seed, shape, dtype) for seed, shape in enumerate([(3, 4, 5, 3), (3, 2, 2, 2), (3, 5, 1, 1)])]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    assert loss.value(view_of(*layers)).item() == pytest.approx(slow(loss, layers), rel=tolerance)


@pytest.mark.parametrize("options", OPTIONS)
def test_every_combination_matches_a_slow_transcription(options):
    names = ("over", "spread", "unbiased", "channels", "layers")
    loss = BNStatistics(**dict(zip(names, options, strict=True)), margin=0.1, first_layer=2.0)
    layers = [layer(7, (2, 3, 3, 2)), layer(8, (2, 2, 2, 4))]
    assert loss.value(view_of(*layers)).item() == pytest.approx(slow(loss, layers), rel=1e-5)


# --- properties -------------------------------------------------------------------------------------------------


def at_statistics(unbiased: bool, over: str) -> BNInput:
    """A layer whose input has exactly the recorded statistics, in every image and thus in the batch."""
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(4, 3, 5, 5, generator=rng, dtype=torch.float64)
    dims = (2, 3) if over == "image" else (0, 2, 3)
    x = (x - x.mean(dims, keepdim=True)) / x.var(dims, keepdim=True, correction=int(unbiased)).sqrt()
    mean, var = torch.tensor([0.5, -2.0, 3.0]), torch.tensor([0.3, 1.0, 4.0])
    x = x * var.sqrt().view(1, 3, 1, 1) + mean.view(1, 3, 1, 1)
    return BNInput(x.float(), mean, var)


@pytest.mark.parametrize("loss", PAPERS.values(), ids=PAPERS.keys())
def test_it_is_zero_at_the_recorded_statistics(loss):
    exact = at_statistics(loss.unbiased, loss.over)
    assert loss.value(view_of(exact, exact)).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("loss", PAPERS.values(), ids=PAPERS.keys())
def test_the_order_of_the_images_does_not_matter(loss):
    one = layer(3, (6, 4, 3, 3))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    shuffled = BNInput(one.x[order], one.mean, one.var)
    assert_close(loss.value(view_of(one)), loss.value(view_of(shuffled)))


@pytest.mark.parametrize("loss", PAPERS.values(), ids=PAPERS.keys())
def test_it_is_never_negative_and_has_finite_gradients(loss):
    for x in (torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 7.0), layer(5, (2, 3, 4, 4)).x):
        x = x.clone().requires_grad_()
        value = loss.value(view_of(BNInput(x, torch.zeros(3), torch.ones(3))))
        value.backward()
        assert value >= 0
        assert x.grad.isfinite().all()


def test_a_margin_frees_what_lies_within_it():
    one = layer(4, (3, 2, 4, 4))
    values = [BNStatistics(margin=margin).value(view_of(one)).item() for margin in (0.0, 0.1, 0.5, 1.0, 10.0)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0


@pytest.mark.parametrize("options", [{"margin": -0.1}, {"eps": -1e-6}])
def test_negative_constants_are_refused(options):
    with pytest.raises(RecipeError, match="margin and eps cannot be negative"):
        BNStatistics(**options)


# --- moments ----------------------------------------------------------------------------------------------------


def test_moments_are_those_of_torch():
    x = layer(6, (4, 3, 5, 6), torch.float64).x
    for unbiased in (True, False):
        for over, dims, keep in (("image", (2, 3), (4, 3)), ("batch", (0, 2, 3), (1, 3))):
            mean, var = moments(x, over, unbiased)
            assert mean.shape == var.shape == keep
            assert_close(mean, x.mean(dims).reshape(keep))
            assert_close(var, x.var(dims, correction=int(unbiased)).reshape(keep))


@pytest.mark.parametrize("shape", [(4, 3, 1, 1), (4, 3)])
def test_maps_of_one_pixel_take_the_statistics_of_the_batch(shape):
    x = layer(9, shape, torch.float64).x
    mean, var = moments(x, "image")
    assert mean.shape == (1, 3)
    assert_close(mean[0], x.flatten(1).mean(0))
    assert_close(var[0], x.flatten(1).var(0))


def test_a_single_value_has_variance_zero():
    mean, var = moments(torch.full((1, 2, 1, 1), 5.0), "image")
    assert (mean.tolist(), var.tolist()) == ([[5.0, 5.0]], [[0.0, 0.0]])


@pytest.mark.parametrize("over", ["image", "batch"])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("shape", [(3, 2, 2, 3), (3, 2, 1, 1), (4, 3), (2, 2, 5)])
def test_gradients_of_moments(over, unbiased, shape):
    x = layer(10, shape, torch.float64).x.requires_grad_()

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return moments(x, over, unbiased)

    assert torch.autograd.gradcheck(function, (x,))


def test_gradients_of_the_loss_match_those_of_plain_torch():
    one = layer(11, (3, 4, 5, 5), torch.float64)
    ours, theirs = one.x.clone().requires_grad_(), one.x.clone().requires_grad_()
    BNStatistics().value(view_of(BNInput(ours, one.mean, one.var))).backward()
    mean, std = theirs.mean((2, 3)), (theirs.var((2, 3)) + 1e-6).sqrt()
    wanted = (mean - one.mean).square() + (std - (one.var + 1e-6).sqrt()).square()
    wanted.sum(1).mean().backward()
    assert_close(ours.grad, theirs.grad)


def test_variances_survive_means_much_larger_than_deviations():
    # the variance is a difference of two sums: with a mean of 30 deviations it keeps four digits
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + 30
    assert_close(moments(x, "image")[1], x.double().var((2, 3)).float(), rtol=1e-3, atol=0)
    assert (moments(torch.full((2, 3, 32, 32), 30.1), "image")[1] < 1e-3).all()


# --- the image as a layer ---------------------------------------------------------------------------------------


def test_image_statistics_by_hand():
    # pixels 1 and 3: mean 2, unbiased variance 2; pixels 0 and 0: mean 0, no spread
    images = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]])
    first = 2**2 + (math.sqrt(2 + 1e-6) - math.sqrt(1 + 1e-6)) ** 2
    second = (math.sqrt(1e-6) - math.sqrt(1 + 1e-6)) ** 2
    view = View(images, torch.zeros(1, 2))
    assert ImageStatistics().value(view).item() == pytest.approx(first + second, rel=1e-6)


def test_image_statistics_are_a_layer_with_mean_0_and_variance_1():
    images = layer(12, (3, 4, 6, 6)).x
    as_layer = BNStatistics().value(view_of(BNInput(images, torch.zeros(4), torch.ones(4))))
    assert_close(ImageStatistics().value(View(images, torch.zeros(3, 2))), as_layer)
