import pytest

from zsq.export import TARGETS, Target


@pytest.fixture
def ort() -> Target:
    return TARGETS["ort-x86"]
