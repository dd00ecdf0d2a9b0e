"""What enters BatchNorm, recorded without hooks, and normalization and sums as one function."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from zsq.core import Teacher, UnsupportedModel, channel_sums
from zsq.core.bn import BNRecorder


def test_sums_by_hand():
    # one image, two channels: 1 + 2 + 3 = 6 and 1 + 4 + 9 = 14; 0 - 1 + 1 = 0 and 2
    x = torch.tensor([[[1.0, 2.0, 3.0], [0.0, -1.0, 1.0]]])
    total, squares = channel_sums(x)
    assert total.tolist() == [[6.0, 0.0]]
    assert_close(squares, torch.tensor([[14.0, 2.0]]))


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (3, 2, 4), (3, 2), (2, 3, 1, 1)])
def test_gradients_of_sums(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(channel_sums, (x,))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("read", [(0, 1, 2), (0,), (1,), (2,), (0, 2), (1, 2)])
def test_normalizing_and_summing_has_the_gradients_of_both(affine, read):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, 4, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    mean, var, weight, bias = (torch.rand(2, generator=rng, dtype=torch.float64) + 0.1 for _ in range(4))

    def function(x: Tensor) -> tuple[Tensor, ...]:
        with BNRecorder() as recorder:
            y = F.batch_norm(x, mean, var, *((weight, bias) if affine else ()), eps=1e-3)
        out = (y, *recorder.seen[0].sums)
        return tuple(out[index] for index in read)

    wanted = (x - mean.view(2, 1, 1)) / (var.view(2, 1, 1) + 1e-3).sqrt()
    if affine:
        wanted = wanted * weight.view(2, 1, 1) + bias.view(2, 1, 1)
    plain = (wanted, x.sum((2, 3)), x.square().sum((2, 3)))
    for found, exact in zip(function(x), (plain[index] for index in read), strict=True):
        assert_close(found, exact)
    assert torch.autograd.gradcheck(function, (x,))


def test_sums_of_half_precision_are_float32_with_gradients_of_its_own_type():
    x = torch.full((1, 1, 64, 64), 1.0078125, dtype=torch.bfloat16, requires_grad=True)  # 4096 times 1 + 1/128
    with BNRecorder() as recorder:
        F.batch_norm(x, torch.zeros(1), torch.ones(1))
    total, squares = recorder.seen[0].sums
    assert total.dtype == squares.dtype == torch.float32
    assert total.item() == 4096 * 1.0078125
    assert squares.item() == pytest.approx(4096 * 1.0078125**2, rel=1e-5)
    (total + squares).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert_close(x.grad[0, 0, 0, 0].item(), 1 + 2 * 1.0078125, rtol=1e-2, atol=0)


def test_layers_that_learn_keep_their_gradients():
    layer = nn.BatchNorm2d(2).eval()
    with BNRecorder() as recorder:
        layer(torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    assert len(recorder.seen) == 1
    assert layer.weight.grad.abs().min() > 0
    assert_close(recorder.seen[0].sums[0], recorder.seen[0].x.sum((2, 3)))


def test_layers_in_training_mode_have_no_recorded_statistics_to_match():
    layer = nn.BatchNorm2d(2)
    with BNRecorder() as recorder:
        layer(torch.randn(3, 2, 4, 4))
    assert recorder.seen == []
    assert layer.running_mean.abs().max() > 0  # and they learn as ever


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with an activation inside, as timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_a_subclass_with_an_activation_inside_is_seen_and_keeps_it():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), NormAct(2)).eval()
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    view = Teacher(network).view(images, frozenset({"bn"}))
    assert_close(view.bn[0].x, network[0](images))
    assert_close(view.logits, network(images))
    assert view.logits.min() == 0


class Arithmetic(nn.BatchNorm2d):
    """A BatchNorm that never calls torch's function."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean.view(-1, 1, 1)) / (self.running_var.view(-1, 1, 1) + self.eps).sqrt()


def test_a_normalization_that_cannot_be_seen_is_refused():
    teacher = Teacher(nn.Sequential(Arithmetic(3)))
    assert teacher.offers == {"bn"}
    with pytest.raises(UnsupportedModel, match="no BatchNorm layer ran"):
        teacher.view(torch.zeros(1, 3, 2, 2), frozenset({"bn"}))
