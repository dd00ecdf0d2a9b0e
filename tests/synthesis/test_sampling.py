import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from zsq.core import RecipeError
from zsq.synthesis import (
    CropAndFlip,
    DeadLeaves,
    GaussianPixels,
    InTurn,
    LowPass,
    ShiftAndFlip,
    UniformLabels,
    UniformPixels,
)
from zsq.synthesis.sampling import Shift


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=stream(seed), dtype=torch.float64)


# --- labels and first pixels ------------------------------------------------------------------------------------


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


# --- dead leaves ------------------------------------------------------------------------------------------------


def test_one_leaf_by_hand():
    """A ground of one colour and, in each image, one shape of the area that its radius says."""
    leaves = DeadLeaves(shapes=1, smallest=0.2, largest=0.2001, colour=1.0)
    images = leaves.draw((200, 3, 64, 64), stream())
    assert images.shape == (200, 3, 64, 64)
    ground = images.flatten(2).median(2).values[:, :, None, None]  # the shape covers less than half
    covered = ((images - ground).abs().amax(1) > 1e-4).flatten(1).float().mean(1)
    whole = covered[covered > 0.1]  # others lie at the border, or partly so
    assert len(whole) > 20
    assert covered.max() == pytest.approx(math.pi * 0.2**2, rel=0.12)  # ellipse or box; the rim counts as covered
    smooth = [len(image.flatten(1).T.round(decimals=4).unique(dim=0)) for image in images]
    assert all(colours >= 2 for colours in smooth[:50])


def test_radii_follow_the_power_law():
    leaves = DeadLeaves(smallest=0.1, largest=0.4, power=3.0)
    # P(r < R) = (0.1^-2 - R^-2) / (0.1^-2 - 0.4^-2): for R = 0.2 it is 75 / 93.75 = 0.8
    radii = leaves._radius(torch.tensor([0.0, 0.8, 1.0]))
    assert_close(radii, torch.tensor([0.1, 0.2, 0.4]))


def test_dead_leaves_have_the_spread_and_the_colours_they_say():
    images = DeadLeaves(std=2.0).draw((300, 3, 16, 16), stream())
    assert abs(images.mean()) < 0.15
    assert 1.7 < images.std() < 2.05  # less at the smooth borders
    grey = DeadLeaves(colour=0.0).draw((4, 3, 16, 16), stream())
    assert torch.equal(grey[:, :1].expand_as(grey), grey)
    channels = DeadLeaves(colour=1.0).draw((300, 3, 16, 16), stream()).transpose(0, 1).flatten(1)
    assert channels.corrcoef().triu(1).abs().max() < 0.1


def test_dead_leaves_are_one_channel_where_asked_and_the_same_for_the_same_stream():
    draw = DeadLeaves().draw
    assert draw((2, 1, 8, 12), stream()).shape == (2, 1, 8, 12)
    assert torch.equal(draw((2, 3, 8, 8), stream(5)), draw((2, 3, 8, 8), stream(5)))
    assert not torch.equal(draw((2, 3, 8, 8), stream(5)), draw((2, 3, 8, 8), stream(6)))


@pytest.mark.parametrize("change", [{"smallest": 0.7}, {"power": 1.0}, {"colour": 1.5}, {"shapes": 0}, {"std": 0.0}])
def test_leaves_that_cannot_be_drawn_are_refused(change):
    with pytest.raises(RecipeError):
        DeadLeaves(**change)


# --- shifts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [True, False])
def test_a_jitter_only_moves_pixels(flip):
    images = torch.arange(2 * 3 * 6 * 6, dtype=torch.float32).view(2, 3, 6, 6)
    rng, jitter = stream(), ShiftAndFlip(limit=1 / 3, flip=flip)
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


@pytest.mark.parametrize("limit", [-0.1, 1.1, math.nan])
def test_a_shift_that_is_no_share_of_the_side_is_refused(limit):
    with pytest.raises(RecipeError, match="a shift is a share of the side from 0 to 1, got limit"):
        ShiftAndFlip(limit=limit)


@pytest.mark.parametrize(("limit", "side", "pixels"), [(15 / 224, 224, 15), (30 / 224, 32, 4), (1 / 8, 224, 28)])
def test_a_shift_means_the_same_at_every_size(limit, side, pixels):
    images, rng, jitter = torch.empty(1, 1, side, side), stream(), ShiftAndFlip(limit=limit)
    shifts = [jitter.draw(images, rng) for _ in range(1000)]
    for offsets in ({shift.down for shift in shifts}, {shift.right for shift in shifts}):
        assert offsets == set(range(-pixels, pixels + 1))


def test_a_diagonal_shift_is_the_same_both_ways():
    images, rng = torch.empty(1, 1, 224, 224), stream()
    shifts = [ShiftAndFlip(limit=15 / 224, diagonal=True).draw(images, rng) for _ in range(400)]
    assert all(shift.down == shift.right for shift in shifts)
    assert {shift.down for shift in shifts} == set(range(-15, 16))
    assert 150 < sum(shift.mirrored for shift in shifts) < 250


def test_a_shift_by_hand():
    # 2 x 3 pixels, one down and one to the right, then mirrored
    images = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]])
    assert Shift(1, 1, False).move(images).tolist() == [[[[6.0, 4.0, 5.0], [3.0, 1.0, 2.0]]]]
    assert Shift(1, 1, True).move(images).tolist() == [[[[5.0, 4.0, 6.0], [2.0, 1.0, 3.0]]]]


def test_transforms_take_turns_at_half_time():
    turns = InTurn(first=LowPass(), second=ShiftAndFlip())
    assert [type(turns.at(step / 4)).__name__ for step in range(4)] == ["LowPass"] * 2 + ["ShiftAndFlip"] * 2


# --- crops ------------------------------------------------------------------------------------------------------


def ramps(count: int, side: int = 16) -> Tensor:
    """Images whose two channels say where a pixel is, from left to right and from top to bottom in -1 .. 1."""
    place = (2 * torch.arange(side, dtype=torch.float64) + 1) / side - 1
    return torch.stack([place.expand(side, side), place[:, None].expand(side, side)]).expand(count, 2, side, side)


def crops(crop: CropAndFlip, count: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Half the width and height of the part that each image shows, below 0 where mirrored, and its centre (x, y)."""
    seen = crop.move(ramps(count), stream(seed))
    a, b = seen[:, 0, 7, 7], seen[:, 0, 7, 8]  # a step of 1/8 in the whole
    c, d = seen[:, 1, 7, 7], seen[:, 1, 8, 7]
    return 8 * (b - a), 8 * (d - c), (a + b) / 2, (c + d) / 2


def test_crops_have_the_distribution_they_say():
    width, height, x, y = crops(CropAndFlip(scale=0.5), 4000)
    share, aspect = width.abs() * height, width.abs() / height
    assert 0.5 - 1e-6 <= share.min() < 0.51
    assert 0.98 < share.max() <= 1 + 1e-6
    assert 0.75 - 1e-6 <= aspect.min() < 0.76
    assert 1.32 < aspect.max() <= 4 / 3 + 1e-6
    assert (width < 0).double().mean() == pytest.approx(0.5, abs=0.03)  # standard error 0.008
    # a side cannot stick out below a share of 3/4, half of the way from 1/2 to 1
    free = share < 0.75
    assert free.double().mean() == pytest.approx(0.5, abs=0.03)
    assert share[free].mean() == pytest.approx(0.625, abs=0.01)
    stretch = aspect[free].log() / math.log(4 / 3)  # uniform in -1 .. 1
    assert stretch.mean() == pytest.approx(0, abs=0.05)
    assert stretch.std() == pytest.approx(3**-0.5, abs=0.03)
    for centre, side in ((x, width.abs()), (y, height)):
        place = centre[free] / (1 - side[free])  # uniform in -1 .. 1: the part touches no border or just so
        assert place.abs().max() <= 1 + 1e-5
        assert place.mean() == pytest.approx(0, abs=0.05)
        assert place.std() == pytest.approx(3**-0.5, abs=0.03)


@given(st.floats(0.05, 1), st.integers(0, 1000))
def test_a_crop_lies_within_the_image(scale, seed):
    width, height, x, y = crops(CropAndFlip(scale=scale), 8, seed)
    assert (height > 0).all()
    assert (width.abs() + x.abs()).max() <= 1 + 1e-5
    assert (height + y.abs()).max() <= 1 + 1e-5
    assert (width.abs() * height).min() >= min(scale, 0.75) - 1e-5  # of all of it, 4:3 leaves 3/4


def test_a_crop_is_read_bilinearly():
    images = noise(3, 2, 5, 6)
    width, height, x, y = (each.tolist() for each in crops(CropAndFlip(), 3, seed=4))
    found = CropAndFlip().move(images, stream(4))
    for n in range(3):
        for i in range(5):
            for j in range(6):
                # from -1 .. 1 to pixels, the outer ones going on to the border
                row = (y[n] + height[n] * ((2 * i + 1) / 5 - 1) + 1) * 5 / 2 - 0.5
                column = (x[n] + width[n] * ((2 * j + 1) / 6 - 1) + 1) * 6 / 2 - 0.5
                row, column = min(max(row, 0), 4), min(max(column, 0), 5)
                top, left = min(int(row), 3), min(int(column), 4)
                r, c = row - top, column - left
                upper = (1 - c) * images[n, :, top, left] + c * images[n, :, top, left + 1]
                lower = (1 - c) * images[n, :, top + 1, left] + c * images[n, :, top + 1, left + 1]
                assert_close(found[n, :, i, j], (1 - r) * upper + r * lower, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flip", [0.4, 0.6])
def test_a_square_crop_of_everything_is_the_image_or_its_mirror(monkeypatch, flip):
    images, drawn = noise(2, 3, 6, 6), iter([torch.tensor([0.5]), torch.full((5, 2), 0.5)])

    def rand(*_, **__):
        numbers = next(drawn)
        if len(numbers) == 5:
            numbers[4] = flip  # the middle of all else: aspect ratio 1, centred
        return numbers

    monkeypatch.setattr(torch, "rand", rand)
    assert_close(CropAndFlip(scale=1.0).move(images, stream()), images.flip(3) if flip < 0.5 else images)


def test_a_crop_that_never_happens_is_the_image():
    images = noise(2, 3, 4, 4)
    assert torch.equal(CropAndFlip(probability=0.0).move(images, stream()), images)


def test_a_batch_is_cropped_as_a_whole_or_not_at_all():
    images, rng, crop = noise(2, 1, 6, 6), stream(), CropAndFlip(probability=0.5)
    moved = [(crop.move(images, rng) != images).flatten(1).any(1).tolist() for _ in range(400)]
    assert {tuple(each) for each in moved} == {(True, True), (False, False)}
    assert 150 < moved.count([True, True]) < 250  # 200 expected, 10 standard deviation


def test_images_are_cropped_one_by_one():
    same = noise(1, 3, 8, 8).expand(8, 3, 8, 8)
    assert len({tuple(image.flatten().tolist()) for image in CropAndFlip().move(same, stream())}) == 8


def test_a_crop_is_a_function_of_the_seed():
    images = noise(4, 3, 8, 8)
    first = CropAndFlip().move(images, stream(5))
    assert torch.equal(CropAndFlip().move(images, stream(5)), first)
    assert not torch.equal(CropAndFlip().move(images, stream(6)), first)


def test_what_comes_after_a_crop_does_not_depend_on_whether_there_was_one():
    after = []
    for probability in (0.0, 1.0):
        rng = stream()
        CropAndFlip(probability=probability).move(noise(4, 3, 8, 8), rng)
        after.append(torch.rand(4, generator=rng))
    assert torch.equal(*after)


@given(st.integers(0, 1000))
def test_a_crop_makes_no_new_extremes(seed):
    images = noise(4, 3, 6, 6, seed=seed)
    moved = CropAndFlip(scale=0.3).move(images, stream(seed))
    assert moved.shape == images.shape
    assert (moved.amax((2, 3)) <= images.amax((2, 3)) + 1e-6).all()
    assert (moved.amin((2, 3)) >= images.amin((2, 3)) - 1e-6).all()


def test_gradients_reach_what_a_crop_shows_and_nothing_else():
    images = ramps(20).clone().requires_grad_()
    width, height, x, y = crops(CropAndFlip(scale=0.2), 20, seed=1)
    CropAndFlip(scale=0.2).move(images, stream(1)).sum().backward()
    assert_close(images.grad.sum((1, 2, 3)), torch.full((20,), 2.0 * 16 * 16, dtype=torch.float64))
    pixel, hidden = 2 / 16, 0
    for n in range(20):
        across, down = (images[n].detach()[0] - x[n]).abs(), (images[n].detach()[1] - y[n]).abs()
        outside = (across > width[n].abs() + pixel) | (down > height[n] + pixel)
        inside = (across < width[n].abs() - pixel) & (down < height[n] - pixel)
        assert (images.grad[n, :, outside] == 0).all()
        assert (images.grad[n, :, inside] > 0).all()
        hidden += outside.sum().item()
    assert hidden > 20 * 16 * 16 / 10


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"scale": 1.1}, {"probability": -0.1}, {"probability": 1.1}])
def test_a_crop_that_cannot_be_is_refused(wrong):
    with pytest.raises(RecipeError, match=r"scale must lie in \(0, 1\] and probability in \[0, 1\], got CropAndFlip"):
        CropAndFlip(**wrong)


# --- low-pass filter --------------------------------------------------------------------------------------------


def low_pass(images: Tensor, cutoff: float) -> Tensor:
    return LowPass(cutoff=cutoff).move(images, stream())


def paper(images: Tensor, d0: float) -> Tensor:
    """Eq. 4 over all frequencies, the zero frequency in the middle; D0 in periods along the side."""
    height, width = images.shape[2:]
    rows = torch.arange(height, dtype=torch.float64)[:, None] - height // 2
    columns = torch.arange(width, dtype=torch.float64) - width // 2
    gain = torch.exp(-(columns**2 + rows**2) / (2 * d0**2))
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(2, 3))
    filtered = torch.fft.ifft2(torch.fft.ifftshift(spectrum * gain, dim=(2, 3)))
    assert filtered.imag.abs().max() < 1e-12
    return filtered.real


@pytest.mark.parametrize("side", [1, 7, 8, 32])
@pytest.mark.parametrize("cutoff", [0.05, 80 / 224, 2.0])
def test_a_low_pass_is_the_equation(side, cutoff):
    images = noise(2, 3, side, side)
    assert_close(low_pass(images, cutoff), paper(images, cutoff * side), rtol=1e-6, atol=1e-6)
    assert_close(low_pass(images.float(), cutoff), paper(images, cutoff * side).float(), rtol=1e-5, atol=1e-5)


def test_a_flat_image_passes_unchanged():
    images = torch.tensor([[[[2.0]], [[-3.0]]]]).expand(1, 2, 8, 8)
    assert_close(low_pass(images, 0.01), images)


def test_the_mean_is_kept():
    images = noise(4, 3, 9, 16)
    assert_close(low_pass(images, 0.1).mean((2, 3)), images.mean((2, 3)))


@pytest.mark.parametrize(("side", "periods"), [(32, 8), (32, 3), (224, 80), (9, 2)])
def test_the_gain_at_the_cutoff_is_the_root_of_1_over_e(side, periods):
    wave = torch.cos(2 * math.pi * periods * torch.arange(side, dtype=torch.float64) / side).expand(1, 1, side, side)
    for images in (wave, wave.mT):
        # exp(-1/2) = 0.60653
        assert_close(low_pass(images, periods / side), 0.60653 * images, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("side", "d0", "gain"), [(32, 80, 0.9608), (32, 20, 0.5273), (32, 8, 0.0183), (224, 80, 0.1409), (224, 40, 0.0004)]
)
def test_the_gain_of_the_highest_frequency(side, d0, gain):
    # a chessboard: side / 2 periods both ways, so exp(-(side / 2)^2 / D0^2)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(side // 2)
    board = (sign[:, None] * sign)[None, None]
    assert_close(low_pass(board, d0 / side), gain * board, rtol=0, atol=6e-5)


@given(st.floats(0.05, 2))
def test_twice_is_once_with_a_cutoff_smaller_by_root_2(cutoff):
    images = noise(1, 2, 8, 11)
    twice = low_pass(low_pass(images, cutoff), cutoff)
    assert_close(twice, low_pass(images, cutoff / math.sqrt(2)), rtol=1e-5, atol=1e-6)


def test_a_high_cutoff_changes_nothing():
    images = noise(2, 3, 8, 8)
    assert_close(low_pass(images, 1e4), images, rtol=1e-6, atol=1e-6)


def test_a_filter_draws_nothing():
    rng = stream()
    LowPass().move(noise(2, 3, 8, 8), rng)
    assert torch.equal(rng.get_state(), stream().get_state())


def test_a_filter_moves_with_the_image():
    images = noise(2, 3, 8, 8)
    assert_close(low_pass(images.roll((1, 3), (2, 3)), 0.2), low_pass(images, 0.2).roll((1, 3), (2, 3)))


def test_gradients_pass_through_a_filter():
    images, direction = noise(2, 3, 7, 8).requires_grad_(), noise(2, 3, 7, 8, seed=1)
    (low_pass(images, 0.2) * direction).sum().backward()
    assert_close(images.grad, low_pass(direction, 0.2))  # it is its own transpose


def test_a_cutoff_is_positive():
    with pytest.raises(RecipeError, match=r"cutoff must be positive, got 0.0"):
        LowPass(cutoff=0.0)
