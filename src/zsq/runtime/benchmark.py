"""What a file costs beside the float file: bytes, seconds and memory, on each runtime that is installed."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from zsq.core import RecipeError
from zsq.runtime.files import image_shape, read_onnx, runtimes_of, size_of
from zsq.runtime.sessions import Session
from zsq.runtime.worker import Array

__all__ = ["Benchmark", "Memory", "Timing", "benchmark"]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One pass over a batch in one runtime: medians of interleaved rounds."""

    runtime: str
    batch: int
    milliseconds: float
    float_milliseconds: float
    """Of the float file, computing in float32."""
    ratio: float
    """How many times faster than the float file: the median of the rounds' ratios."""
    images_per_second: float
    bfloat16_milliseconds: float | None
    """Of the float file where OpenVINO computes in bfloat16, as it does by itself on CPUs that can."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The most bytes that a process held which loaded a file and ran all batches; the runtime itself is in it."""

    runtime: str
    bytes: int
    float_bytes: int


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What a file costs, beside the float file."""

    file: str
    threads: int
    bytes: int
    """Of the file on disk."""
    float_bytes: int
    timings: tuple[Timing, ...]
    memory: tuple[Memory, ...]


def benchmark(
    file: str | Path,
    float_file: str | Path,
    *,
    threads: int = 1,
    batches: Sequence[int] = (1, 8),
    rounds: int = 11,
    at_least: float = 0.05,
    progress: Callable[[str, int, int], None] = lambda label, done, count: None,
) -> Benchmark:
    """The cost of ``file`` beside ``float_file``, an ONNX file of the same network, on ``threads`` CPU threads.

    Both run in turn, each in a process of its own, for ``at_least`` so many seconds a round, so that what else the
    machine does falls on both.

    Raises:
        CheckpointError: if a file is missing, incomplete or of another kind.
        MissingExtra: if no runtime that reads the file is installed.
        RuntimeFailure: if a runtime cannot load or run a file.
    """
    if threads < 1 or rounds < 1 or min(batches, default=0) < 1:
        raise RecipeError(f"threads, rounds and batches must be at least 1, got {threads}, {rounds}, {tuple(batches)}")
    shape, rng = image_shape(read_onnx(float_file)), torch.Generator().manual_seed(0)
    timings, memory = [], []
    runtimes = runtimes_of(file)
    for index, runtime in enumerate(runtimes):
        with ExitStack() as stack:
            low = stack.enter_context(Session(runtime, file, threads))
            exact = stack.enter_context(Session(runtime, float_file, threads))
            sessions = [low, exact]
            if runtime == "openvino":
                half = stack.enter_context(Session("openvino-bf16", float_file, threads))
                sessions += [half] if any(layer["precision"] == "bf16" for layer in half.layers) else []
            for position, batch in enumerate(batches):
                progress(f"benchmark {runtime}", index * len(batches) + position, len(runtimes) * len(batches))
                images = torch.randn(batch, *shape, generator=rng).numpy()
                timings.append(_timing(runtime, images, sessions, rounds, at_least))
            memory.append(Memory(runtime=runtime, bytes=low.peak_memory(), float_bytes=exact.peak_memory()))
    return Benchmark(
        file=str(file),
        threads=threads,
        bytes=size_of(file),
        float_bytes=size_of(float_file),
        timings=tuple(timings),
        memory=tuple(memory),
    )


def _timing(runtime: str, images: "Array", sessions: list[Session], rounds: int, at_least: float) -> Timing:
    for session in sessions:
        session.seconds(images, at_least)  # kernels are chosen and caches filled
    seconds = np.array([[session.seconds(images, at_least) for session in sessions] for _ in range(rounds)])
    low, exact, *half = np.median(seconds, axis=0)
    return Timing(
        runtime=runtime,
        batch=len(images),
        milliseconds=1000 * float(low),
        float_milliseconds=1000 * float(exact),
        ratio=float(median(seconds[:, 1] / seconds[:, 0])),
        images_per_second=len(images) / float(low),
        bfloat16_milliseconds=1000 * float(half[0]) if half else None,
    )
