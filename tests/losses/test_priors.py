import pytest
import tiny
import torch
from torch.testing import assert_close

from zsq.core import RecipeError, Run, View
from zsq.losses import TotalVariation
from zsq.losses.priors import noise_variation, total_variation

PAPER = (32, 3, 224, 224)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def view_of(images, **more):
    return View(images, torch.empty(len(images), 5), **more)


def test_variation_by_hand():
    # rows 1 2 and 4 8: right (1, 4), down (3, 6), diagonal 7, anti-diagonal 2
    image = torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]])
    assert_close(total_variation(image), torch.tensor(17**0.5 + 45**0.5 + 7 + 2))


def test_variation_of_noise_of_a_constant_and_of_twice_as_many_images():
    images = noise(*PAPER)
    assert total_variation(images).item() == pytest.approx(12_374, abs=10)
    assert total_variation(torch.full((2, 3, 8, 8), 1.5)) == 0
    twice = total_variation(images.repeat(2, 1, 1, 1)).item()
    assert twice == pytest.approx(2**0.5 * total_variation(images).item(), rel=1e-3)


@pytest.mark.parametrize("shape", [PAPER, (64, 3, 32, 32), (16, 1, 24, 40)])
def test_the_variation_of_noise_is_known(shape):
    assert noise_variation(shape) == pytest.approx(total_variation(noise(*shape)).item(), rel=0.01)


def test_a_constant_image_has_a_gradient():
    image = torch.ones(1, 1, 4, 4, requires_grad=True)
    total_variation(image).backward()
    assert image.grad.tolist() == torch.zeros(1, 1, 4, 4).tolist()


def test_without_a_target_the_variation_is_the_loss():
    images = noise(2, 3, 8, 8)
    assert torch.equal(TotalVariation().value(view_of(images)), total_variation(images))


def test_a_target_is_exact_at_the_papers_shape_and_scaled_at_others():
    loss = TotalVariation(target=(2_500.0, 3_000.0))
    assert loss.distance(view_of(torch.zeros(1, 3, 224, 224).expand(PAPER)), 2_600.0).item() == 2_600
    small = (8, 3, 32, 32)
    wanted = 2_600 / 12_374 * noise_variation(small)
    assert loss.distance(view_of(torch.zeros(small)), 2_600.0).item() == pytest.approx(wanted, rel=1e-4)
    assert loss.value(view_of(torch.zeros(small))).item() == pytest.approx(wanted / 2_600 * 2_750, rel=1e-4)


def test_targets_are_drawn_once_a_batch_and_the_seed_decides_them(job_for):
    loss = TotalVariation(target=(2_500.0, 3_000.0))
    flat = view_of(torch.zeros(2, 3, 8, 8))
    scale = noise_variation((2, 3, 8, 8)) / noise_variation(PAPER)

    def targets(seed):
        term = loss.begin(job_for(tiny.cnn(), Run(device="cpu", seed=seed)))
        return [term(flat).item() / scale, term(flat).item() / scale]

    drawn = [targets(seed) for seed in range(20)]
    assert all(first == second and 2_500 <= first <= 3_000 for first, second in drawn)
    assert len({first for first, _ in drawn}) == 20
    assert targets(3) == drawn[3]


def test_the_still_images_are_those_before_the_move():
    images = noise(2, 3, 8, 8)
    view = view_of(images.roll(3, 2) * 2, pixels=images)
    assert torch.equal(TotalVariation(still=True).value(view), total_variation(images))
    assert torch.equal(TotalVariation().value(view), total_variation(images.roll(3, 2) * 2))
    assert torch.equal(TotalVariation(still=True).value(view_of(images)), total_variation(images))


@pytest.mark.parametrize("target", [(-1.0, 2.0), (3.0, 2.0)])
def test_a_target_that_is_no_range_is_refused(target):
    with pytest.raises(RecipeError, match="target must be the two ends of a range"):
        TotalVariation(target=target)
