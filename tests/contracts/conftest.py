import functools
from collections.abc import Callable

import pytest
import tiny

from zsq.api import Result, quantize
from zsq.methods import BASELINES, METHODS

EVERY = {**METHODS, **BASELINES}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "method" in metafunc.fixturenames:
        metafunc.parametrize("method", EVERY)


@functools.cache
def _once(method: str, network: str, bits: str, seed: int) -> Result:
    return quantize(
        getattr(tiny, network)(), method, bits, effort="smoke", input_shape=tiny.SHAPE, seed=seed, device="cpu"
    )


@pytest.fixture
def result_of() -> Callable[..., Result]:
    """A finished quantization that tests share: look, do not touch."""

    def make(method: str, network: str = "cnn", bits: str = "w3a4", seed: int = 0) -> Result:
        return _once(method, network, bits, seed)

    return make
