from collections.abc import Callable

import pytest
import torch
from torch import nn
from vits import vit as small_vit

from zsq.core import Bits, Job, NoData, Run, Source, Teacher
from zsq.nets.graph import capture
from zsq.zoo.networks import InvertedResidual, ResNet


class TinyMobileNet(nn.Module):
    """A stem, an inverted residual that halves the map, one with a shortcut, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU6())
        self.blocks = nn.Sequential(InvertedResidual(4, 6, 2, 3), InvertedResidual(6, 6, 1, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


def lively(network: nn.Module) -> nn.Module:
    """``network`` with BatchNorm statistics as a trained one has them, none of them 0 or 1."""
    rng = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 1.0),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.3, 2.0),
            ):
                tensor.data.uniform_(low, high, generator=rng)
    return network.eval()


@pytest.fixture
def resnet() -> nn.Module:
    """Two basic blocks: the shortcut of the first is an identity, that of the second a convolution."""
    torch.manual_seed(0)
    return lively(ResNet(1, (4, 6), 5))


@pytest.fixture
def mobilenet() -> nn.Module:
    torch.manual_seed(0)
    return lively(TinyMobileNet())


@pytest.fixture
def vit() -> nn.Module:
    """Two blocks: q, k and v come from one linear, and from three without bias."""
    return small_vit()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def job_of() -> Callable[..., Job]:
    def make(network: nn.Module, bits: str = "w4a4", shape: tuple[int, int, int] = (3, 8, 8), **run: object) -> Job:
        student = capture(network, torch.zeros(2, *shape))
        return Job(Teacher(network), student, Bits.parse(bits), Run(device="cpu", **run), shape)

    return make


@pytest.fixture
def apply() -> Callable[..., None]:
    """Applies passes one after the other; each may read images of ``synthesizer``."""

    def run(job: Job, *passes: object, synthesizer: object = None) -> None:
        source = Source(synthesizer or NoData(), job)
        for each in passes:
            each.apply(job, source)

    return run


@pytest.fixture(autouse=True)
def _same_networks_each_time() -> None:
    torch.manual_seed(0)
