import functools
from collections.abc import Callable

import pytest
import tiny

from zsq.api import Result, quantize
from zsq.methods import BASELINES, METHODS

PLUGGED = ("ait+qimera", "synq+genie")
"""Plug-ins on another host than that of their paper."""
EVERY = (*METHODS, *BASELINES, *PLUGGED)


@pytest.fixture(params=EVERY)
def method(request: pytest.FixtureRequest) -> str:
    """The name of every method and control in turn, and of plug-ins on a host."""
    return request.param


@functools.cache
def _once(method: str, network: str, bits: str, seed: int) -> Result:
    return quantize(tiny.fitting(method, network), method, bits, seed=seed, **tiny.settings(method))


@pytest.fixture
def result_of() -> Callable[..., Result]:
    """A finished quantization that tests share: look, do not touch."""

    def make(method: str, network: str = "cnn", bits: str = "w3a4", seed: int = 0) -> Result:
        return _once(method, network, bits, seed)

    return make
