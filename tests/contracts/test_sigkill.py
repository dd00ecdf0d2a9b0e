"""Killed without warning at random moments, and started again: the same bits."""

import multiprocessing
import os
import random
import time
from functools import partial
from pathlib import Path

import pytest
import tiny

COUNTS = {"steps": 60, "samples": 12, "batch_size": 4}
"""Enough work for a kill to land in the middle of it."""


def work(method: str, folder: Path) -> None:
    import zsq.api
    from zsq.core import Run

    os.fsync = lambda _: None  # what is killed is the process, not the machine
    zsq.api.Run = partial(Run, save_every=0)  # a checkpoint at every step, for kills to land behind one
    zsq.api.quantize(tiny.fitting(method), method, "w3a4", out=folder, **tiny.settings(method, **COUNTS))


@pytest.fixture(scope="module")
def processes():
    """Processes that have everything imported when they start: what is killed is work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zsq.api", "zsq.methods", "safetensors.torch", "PIL.Image"])
    return context


def test_a_killed_run_resumes_with_the_same_bits(method, processes, tmp_path):
    def seconds(folder: Path, limit: float | None = None) -> float:
        process = processes.Process(target=work, args=(method, folder))
        begin = time.monotonic()
        process.start()
        process.join(limit)
        if limit is not None:
            process.kill()
            process.join()
        assert process.exitcode == 0 or (limit is not None and process.exitcode == -9), method
        return time.monotonic() - begin

    seconds(tmp_path / "warm")  # the first process also waits for the imports
    whole = seconds(tmp_path / "whole")
    moments = random.Random(method)
    for _ in range(3):
        seconds(tmp_path / "killed", limit=moments.uniform(0.2, 0.9) * whole)
    seconds(tmp_path / "killed")
    for name in ("student.safetensors", "recipe", "identity.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    images = tmp_path / "whole" / "images.safetensors"
    if images.exists():
        assert (tmp_path / "killed" / "images.safetensors").read_bytes() == images.read_bytes()
