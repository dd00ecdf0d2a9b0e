import os
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import tiny
import torch
from hypothesis import settings
from torch import Tensor, nn

from zsq.compat import import_timm
from zsq.core import Bits, Job, MissingExtra, Run, Teacher
from zsq.nets.graph import capture

settings.register_profile("zsq", deadline=None, derandomize=True)  # a busy machine is not a failure, nor is bad luck
settings.load_profile("zsq")


@pytest.fixture(autouse=True)
def _no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Power does not fail in tests, and on a busy disk every ``fsync`` takes a second."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def vision() -> Iterator[ModuleType]:
    """timm and torchvision, or a skip; the warning of their remedy is no test's concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield import_timm()
        except MissingExtra as error:
            pytest.skip(str(error))


@pytest.fixture
def cnn() -> nn.Module:
    """With BatchNorm, a residual block and a depthwise layer."""
    return tiny.cnn()


@pytest.fixture
def plain() -> nn.Module:
    """Without BatchNorm."""
    return tiny.plain()


@pytest.fixture
def gated() -> nn.Module:
    """With a submodule that cannot be traced."""
    return tiny.gated()


@pytest.fixture
def photos() -> Tensor:
    """Sixteen images that all tiny networks take."""
    return torch.randn(16, *tiny.SHAPE, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def job_for() -> Callable[..., Job]:
    """A job on a network, with a run of its own unless one is given."""

    def make(network: nn.Module, run: Run | None = None, bits: str = "w4a4") -> Job:
        student = capture(network, torch.zeros(2, *tiny.SHAPE))
        return Job(Teacher(network), student, Bits.parse(bits), run or Run(device="cpu"), tiny.SHAPE)

    return make
