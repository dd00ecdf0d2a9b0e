"""One interface to the runtimes: a network in a process of its own, which gives logits, seconds and bytes."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from zsq.core import MissingExtra, ZsqError
from zsq.runtime.worker import Array, read_frame, write_frame

__all__ = ["NAMES", "RuntimeFailure", "Session", "installed", "require"]

NAMES = {
    "onnxruntime": "ONNX Runtime",
    "onnxruntime-unoptimised": "ONNX Runtime, unoptimised",
    "openvino": "OpenVINO",
    "openvino-bf16": "OpenVINO, bfloat16",
}
"""The runtimes, and how sentences call them. What is not in integers computes in float32, but for the last."""

_EXTRAS = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "ort", "openvino": "openvino"}


class RuntimeFailure(ZsqError):
    """A runtime that could not load or run a file; the text says which, and what it said."""


def installed(runtime: str) -> bool:
    """Whether the package of ``runtime`` can be imported."""
    return find_spec(runtime.partition("-")[0]) is not None


def require(*packages: str) -> None:
    """Return if all ``packages`` (onnx, onnxruntime, openvino) are there.

    Raises:
        MissingExtra: if one is not; the message has the pip line.
    """
    for package in packages:
        if not installed(package):
            raise MissingExtra(f"{package} is not installed: pip install 'zsq[{_EXTRAS[package]}]'")


class Session:
    """A file loaded in one runtime; a context manager, so that its process ends.

    Raises:
        MissingExtra: if the runtime is not installed.
        RuntimeFailure: if it cannot load the file, or dies of it.
    """

    def __init__(self, runtime: str, file: str | Path, threads: int = 1) -> None:
        require(runtime.partition("-")[0])
        self.runtime = runtime
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "zsq.runtime.worker", runtime, str(file), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(threads)},
        )
        try:
            loaded = json.loads(self._answer())
            if "error" in loaded:
                raise RuntimeFailure(f"{NAMES[runtime]} cannot load the file: {_reason(loaded['error'])}")
            self.layers: list[dict[str, str]] = loaded["layers"]
            """OpenVINO's computing layers: ``type``, the ``precision`` they run in, the ``names`` of their nodes."""
            self.optimised: bytes = self._answer()
            """ONNX Runtime's graph after its optimisations, as an ONNX file."""
        except BaseException:
            self.close()
            raise

    def logits(self, images: Array, batch_size: int = 64) -> Array:
        """The logits (N, K) of normalised ``images`` (N, C, H, W), ``batch_size`` at a time."""
        parts = []
        for start in range(0, len(images), batch_size):
            self._ask("run", images[start : start + batch_size])
            shape = json.loads(self._answer())
            parts.append(np.frombuffer(self._answer(), np.float32).reshape(shape))
        return np.concatenate(parts)

    def seconds(self, images: Array, at_least: float = 0.0) -> float:
        """The seconds of one pass over ``images``, as a mean over ``at_least`` so many seconds of passes."""
        self._ask("time", images, at_least=at_least)
        return float(self._answer())

    def peak_memory(self) -> int:
        """The most bytes that the process has held, Python and the runtime included."""
        self._ask("memory")
        return int(self._answer())

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:  # it is gone already
                continue
        self._process.terminate()
        self._process.wait()
        self._messages.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _ask(self, what: str, images: Array | None = None, **more: Any) -> None:
        stream = self._process.stdin
        assert stream is not None
        shape = [] if images is None else list(images.shape)
        try:
            write_frame(stream, json.dumps({"do": what, "shape": shape, **more}).encode())
            if images is not None:
                write_frame(stream, np.ascontiguousarray(images, dtype=np.float32).tobytes())
        except BrokenPipeError:
            raise self._death() from None

    def _answer(self) -> bytes:
        assert self._process.stdout is not None
        answer = read_frame(self._process.stdout)
        if answer is None:
            raise self._death()
        return answer

    def _death(self) -> RuntimeFailure:
        code = self._process.wait()
        self._messages.seek(0)
        said = [line for line in self._messages.read().decode(errors="replace").splitlines() if line.strip()]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return RuntimeFailure(f"{NAMES[self.runtime]} {how} on the file: {said[-1] if said else 'it said nothing'}")


def _reason(message: str) -> str:
    """The first line of ``message`` that is not a place in the runtime's source."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith("Exception from")), "it gave no reason")
