from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zsq.core import Bits, Job, RecipeError, Run, Teacher
from zsq.methods import METHODS
from zsq.methods.genie import SwingConvolutions, swing
from zsq.nets.graph import capture


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Strided(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.strided = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, x):
        return self.strided(self.plain(x)).flatten(1)


def job_of(network):
    return Job(Teacher(network), capture(network, torch.zeros(2, 2, 6, 6)), Bits(), Run(device="cpu"), (2, 6, 6))


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_a_swing_is_a_crop_of_the_reflected_image(shift):
    x = torch.randn(2, 3, 5, 7, generator=rng())
    padded = F.pad(x, [shift] * 4, mode="reflect")
    crops = [
        padded[:, :, down : down + 5, right : right + 7]
        for down in range(2 * shift + 1)
        for right in range(2 * shift + 1)
    ]
    for seed in range(20):
        moved = swing(x, shift, rng(seed))
        assert moved.shape == x.shape
        assert sum(torch.equal(moved, crop) for crop in crops) == 1


def test_every_offset_is_drawn_equally_often():
    x = torch.arange(25.0).view(1, 1, 5, 5)  # the middle pixel tells the offset
    draws, stream = Counter(), rng()
    for _ in range(9000):
        draws[swing(x, 1, stream)[0, 0, 2, 2].item()] += 1
    assert set(draws) == {6, 7, 8, 11, 12, 13, 16, 17, 18}
    assert all(abs(count - 1000) <= 120 for count in draws.values())


def test_shift_0_is_the_identity_and_all_images_move_alike():
    x = torch.randn(1, 2, 4, 4, generator=rng()).expand(3, 2, 4, 4)
    assert torch.equal(swing(x, 0, rng()), x)
    moved = swing(x, 1, rng(1))
    assert torch.equal(moved[0], moved[2])


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 1, 4), (1, 1, 2, 2)])
def test_small_maps_keep_their_shape(shape):
    x = torch.randn(shape, generator=rng())
    for seed in range(10):
        assert swing(x, 1, rng(seed)).shape == shape
    assert torch.equal(swing(x, 4, rng()), x)  # nothing to reflect


def test_a_constant_image_does_not_notice():
    network = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()).eval()
    swinging = SwingConvolutions().build(job_of(network))
    changed = job_of(network).teacher.changed(swinging).module
    x = torch.full((2, 2, 6, 6), 0.7)
    for _ in range(5):
        assert torch.equal(changed(x), network(x))


def test_only_strided_convolutions_of_a_copy_swing():
    network = Strided().eval()
    job = job_of(network)
    changed = job.teacher.changed(SwingConvolutions().build(job)).module
    hooks = {name: len(module._forward_pre_hooks) for name, module in changed.named_modules() if name}
    assert hooks == {"plain": 0, "strided": 1}
    assert not network.strided._forward_pre_hooks
    x = torch.randn(1, 2, 6, 6, generator=rng())
    outputs = {tuple(changed(x).flatten().tolist()) for _ in range(30)}
    assert 2 < len(outputs) <= 9  # one offset for each call
    assert torch.equal(network(x), network(x))


def test_the_same_seed_swings_the_same():
    x, network = torch.randn(1, 2, 6, 6, generator=rng()), Strided().eval()
    outputs = []
    for _ in range(2):
        job = job_of(network)
        changed = job.teacher.changed(SwingConvolutions().build(job)).module
        outputs.append(torch.stack([changed(x) for _ in range(5)]))
    assert torch.equal(*outputs)


def test_no_negative_shift():
    with pytest.raises(RecipeError, match="shift"):
        SwingConvolutions(shift=-1)


def test_the_ends_of_qdrop_have_no_8_bit_second_input():
    genie = METHODS["genie"]
    paper, qdrop = (genie.preset(name).quantizer[0].protocol.ends for name in ("paper", "qdrop-ends"))
    assert paper.second_input == 8
    assert [qdrop.inputs(position, 5, 4) for position in range(5)] == [32, 4, 4, 4, 8]
