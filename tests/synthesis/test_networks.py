import pytest
import torch
from torch import nn
from torch.testing import assert_close

from zsq.core import RecipeError
from zsq.synthesis import ConditionalTrunk, ConvTrunk, LabelTimesNoise, PlainNoise, UpsampleGenerator
from zsq.synthesis.networks import ConditionalNorm, Drawn

TRUNKS = [ConvTrunk(wide=6, narrow=4), ConditionalTrunk(wide=6, narrow=4)]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def count(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def drawn_of(labels, shares, noise=1):
    """Of the labels and shares (N, S) of some images."""
    labels, shares = torch.tensor(labels), torch.tensor(shares)
    return Drawn(labels, shares, torch.randn(*labels.shape, noise, generator=rng()))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 12), (3, 32, 32)])
def test_a_generator_makes_images_of_the_shape_asked_for(shape):
    generator = UpsampleGenerator(latent=5, wide=6, narrow=4).build(shape)
    assert generator(torch.randn(7, 5)).shape == (7, *shape)


def test_the_last_normalisation_gives_every_channel_mean_0_and_variance_1():
    images = UpsampleGenerator(latent=5, wide=6, narrow=4).build((3, 8, 8))(torch.randn(16, 5))
    assert images.mean((0, 2, 3)).abs().max() < 1e-4
    assert (images.var((0, 2, 3)) - 1).abs().max() < 2e-2


@pytest.mark.parametrize("shape", [(3, 10, 8), (3, 8, 6), (1, 7, 7)])
def test_sides_that_cannot_be_doubled_twice_are_refused(shape):
    for build in (UpsampleGenerator().build, lambda shape: ConvTrunk().build(100, shape, 10)):
        with pytest.raises(RecipeError, match=rf"divisible by 4, not {shape[1]}x{shape[2]}"):
            build(shape)


@pytest.mark.parametrize("name", ["latent", "wide", "narrow"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(RecipeError, match=rf"UpsampleGenerator.{name} must be at least 1, got 0"):
        UpsampleGenerator(**{name: 0})


# --- conditional generators ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "parameters"), [(10, 1_052_139), (100, 1_061_139)])
def test_gdfqs_generator_for_32_pixels_has_the_parameters_of_the_released_one(classes, parameters):
    with torch.device("meta"):
        code = LabelTimesNoise().build(None, classes)
        assert count(code, ConvTrunk().build(code.size, (3, 32, 32), classes)) == parameters


def test_gdfqs_generator_for_224_pixels_has_the_parameters_of_the_released_one():
    with torch.device("meta"):
        code = PlainNoise().build(None, 1000)
        assert count(code) == 0
        assert count(ConditionalTrunk().build(code.size, (3, 224, 224), 1000)) == 41_405_315


def test_the_first_normalization_has_the_usual_eps_and_those_behind_convolutions_another():
    for trunk in (ConvTrunk(), ConditionalTrunk()):
        built = trunk.build(4, (3, 8, 8), 2)
        assert [m.eps for m in built.modules() if isinstance(m, nn.BatchNorm2d)] == [1e-5, 0.8, 0.8, 1e-5]


@pytest.mark.parametrize("trunk", TRUNKS, ids=lambda trunk: type(trunk).__name__)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 12)])
def test_a_trunk_makes_normalized_images_of_the_shape_asked_for(trunk, shape):
    drawn = PlainNoise(latent=5).draw(16, 3, nn.Identity(), rng())
    images = trunk.build(5, shape, 3)(drawn.noise[:, 0], drawn)
    assert images.shape == (16, *shape)
    assert images.mean((0, 2, 3)).abs().max() < 1e-5
    assert (images.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-2


def test_noise_is_drawn_for_every_image_with_a_class_of_its_own():
    drawn = LabelTimesNoise(latent=7).draw(3000, 3, nn.Identity(), rng())
    assert drawn.noise.shape == (3000, 1, 7)
    assert torch.equal(drawn.shares, torch.ones(3000, 1))
    assert drawn.labels.shape == (3000, 1)
    assert all(abs(times - 1000) < 100 for times in drawn.labels.flatten().bincount().tolist())


def test_label_times_noise_by_hand():
    code = LabelTimesNoise(latent=2).build(None, 2)
    with torch.no_grad():
        code.table.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    drawn = Drawn(torch.tensor([[1], [0]]), torch.ones(2, 1), torch.tensor([[[2.0, 2.0]], [[0.5, 1.0]]]))
    assert code(drawn).tolist() == [[6, -2], [0.5, 2]]


def test_only_the_normalization_tells_plain_noise_its_class():
    drawn = PlainNoise(latent=5).draw(4, 3, nn.Identity(), rng())
    code, trunk = PlainNoise(latent=5).build(None, 3), TRUNKS[1].build(5, (3, 8, 8), 3)
    assert torch.equal(code(drawn), drawn.noise[:, 0])
    other = drawn._replace(labels=(drawn.labels + 1) % 3)
    assert torch.equal(trunk(code(drawn), drawn), trunk(code(other), other))  # all classes start alike
    with torch.no_grad():
        next(m for m in trunk if isinstance(m, ConditionalNorm)).scale[0] = 3
    assert not torch.equal(trunk(code(drawn), drawn), trunk(code(other), other))


def test_targets_by_hand():
    # two classes an image: 1/4 and 3/4 of class 2 add up to all of it
    drawn = drawn_of([[2, 2], [0, 1]], [[0.25, 0.75], [0.5, 0.5]])
    assert drawn.targets(3).tolist() == [[0, 0, 1], [0.5, 0.5, 0]]
    assert drawn_of([[2], [0]], [[1.0], [1.0]]).targets(3).tolist() == [2, 0]


def test_targets_are_shares_of_the_whole():
    labels = torch.randint(4, (50, 6), generator=rng())
    shares = torch.randn(50, 6, generator=rng(1)).softmax(1)
    targets = Drawn(labels, shares, torch.empty(0)).targets(4)
    assert_close(targets.sum(1), torch.ones(50))
    slow = torch.stack([(shares * (labels == each)).sum(1) for each in range(4)], 1)
    assert_close(targets, slow)


@pytest.mark.parametrize(("superposed", "factor"), [("sum", 1), ("mean", 4)])
def test_fresh_conditional_normalization_is_the_plain_one_or_its_share_of_a_slot(superposed, factor):
    x = torch.randn(2, 3, 4, 4, generator=rng())
    norm = ConditionalNorm(3, 1e-5, 5, superposed)
    drawn = drawn_of([[0, 1, 2, 2], [4, 3, 4, 0]], [[0.5, 0.25, 0.125, 0.125]] * 2)  # exact in binary
    assert torch.equal(norm(x, drawn), nn.BatchNorm2d(3, affine=False)(x) / factor)


@pytest.mark.parametrize("superposed", ["sum", "mean"])
def test_conditional_normalization_is_the_formula(superposed):
    norm = ConditionalNorm(3, 0.8, 5, superposed).double()
    with torch.no_grad():
        norm.scale.normal_(generator=rng(1))
        norm.shift.normal_(generator=rng(2))
    x = torch.randn(6, 3, 4, 4, generator=rng(), dtype=torch.float64)
    labels = torch.randint(5, (6, 2), generator=rng(3))
    shares = torch.rand(6, 2, generator=rng(4), dtype=torch.float64)
    plain = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 0.8).sqrt()
    wanted = torch.zeros_like(x)
    for image in range(6):
        for slot in range(2):
            share = shares[image, slot] / (2 if superposed == "mean" else 1)
            label = labels[image, slot]
            wanted[image] += share * (
                norm.scale[label, :, None, None] * plain[image] + norm.shift[label, :, None, None]
            )
    assert_close(norm(x, Drawn(labels, shares, torch.empty(0))), wanted.detach())
