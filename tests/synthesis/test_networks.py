import pytest
import torch

from zsq.core import RecipeError
from zsq.synthesis import UpsampleGenerator


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
    with pytest.raises(RecipeError, match=rf"divisible by 4, not {shape[1]}x{shape[2]}"):
        UpsampleGenerator().build(shape)


@pytest.mark.parametrize("name", ["latent", "wide", "narrow"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(RecipeError, match=rf"UpsampleGenerator.{name} must be at least 1, got 0"):
        UpsampleGenerator(**{name: 0})
