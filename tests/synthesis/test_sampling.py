import pytest
import torch

from zsq.core import RecipeError
from zsq.synthesis import GaussianPixels, ShiftAndFlip, UniformLabels, UniformPixels


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_labels_cover_all_classes_evenly():
    labels = UniformLabels().draw(5000, 10, stream())
    assert labels.shape == (5000,)
    assert labels.unique().tolist() == list(range(10))
    assert labels.bincount().min() > 400  # 500 expected, 21 standard deviation


def test_first_pixels_have_the_distribution_they_say():
    normal = GaussianPixels(std=2.0).draw((64, 3, 16, 16), stream())
    assert abs(normal.mean()) < 0.05
    assert abs(normal.std() - 2) < 0.05
    flat = UniformPixels(low=-1.0, high=3.0).draw((64, 3, 16, 16), stream())
    assert abs(flat.mean() - 1) < 0.05
    assert -1 <= flat.min() < -0.99
    assert 2.99 < flat.max() <= 3


def test_an_empty_interval_is_refused():
    with pytest.raises(RecipeError, match=r"low must be below high, got 1.0 and 1.0"):
        UniformPixels(low=1.0, high=1.0)


@pytest.mark.parametrize("flip", [True, False])
def test_a_jitter_only_moves_pixels(flip):
    images = torch.arange(2 * 3 * 6 * 6, dtype=torch.float32).view(2, 3, 6, 6)
    rng, jitter = stream(), ShiftAndFlip(limit=2, flip=flip)
    results = {tuple(jitter.move(images, rng).flatten().tolist()) for _ in range(400)}
    rolls = [images.roll((down, right), (2, 3)) for down in range(-2, 3) for right in range(-2, 3)]
    possible = {tuple(roll.flatten().tolist()) for roll in rolls}
    if flip:
        possible |= {tuple(roll.flip(3).flatten().tolist()) for roll in rolls}
    assert results == possible  # all of them, and nothing else


def test_a_jitter_without_a_limit_leaves_images_where_they_are():
    images = torch.randn(1, 1, 4, 4)
    assert torch.equal(ShiftAndFlip(limit=0, flip=False).move(images, stream()), images)


def test_gradients_pass_through_a_jitter():
    images = torch.randn(1, 1, 4, 4, requires_grad=True)
    ShiftAndFlip().move(images, stream()).sum().backward()
    assert torch.equal(images.grad, torch.ones_like(images))


def test_a_negative_shift_is_refused():
    with pytest.raises(RecipeError, match="a shift cannot be negative, got limit -1"):
        ShiftAndFlip(limit=-1)
