"""The process that holds one network in one runtime: ``python -m zsq.runtime.worker RUNTIME FILE THREADS``.

A runtime may abort on a graph that it cannot take, and two runtimes in one process share threads and memory; so each
network runs alone. Frames come on stdin and go to stdout, a length of 8 bytes before each; ``zsq.runtime.sessions``
is the other end. Imports numpy and the runtime, nothing else of zsq.
"""

import json
import os
import re
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float32]]
Network = Callable[[Array], Array]
Layers = list[dict[str, str]]

_COMPUTING = ("Convolution", "FullyConnected", "MatMul", "Subgraph")
"""OpenVINO's layers that multiply and add: what should run in integers. A subgraph is several in one kernel."""
_FACTS = ("runtimePrecision", "primitiveType", "originalLayersNames")


def read_frame(stream: IO[bytes]) -> bytes | None:
    """The next frame; None if the stream ends before its end."""
    head = stream.read(8)
    size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    content = stream.read(size)
    return content if len(head) == 8 and len(content) == size else None


def write_frame(stream: IO[bytes], content: bytes) -> None:
    """Send one frame."""
    stream.write(struct.pack("<Q", len(content)))
    stream.write(content)
    stream.flush()


def onnxruntime(file: str, threads: int, optimised: bool) -> tuple[Network, bytes, Layers]:
    """The network, the optimised graph as an ONNX file, and no layers: the graph lists them."""
    import onnxruntime as ort

    level = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what matters is raised
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")  # others are timed between two calls
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(kept)
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        graph = kept.read_bytes()
    feed = session.get_inputs()[0].name
    return lambda images: session.run(None, {feed: images})[0], graph, []


def openvino(file: str, threads: int, precision: str = "f32") -> tuple[Network, bytes, Layers]:
    """The network, no graph, and its computing layers: type, the precision they run in, and the names they had."""
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = ov.Core().compile_model(file, "CPU", settings)
    layers = []
    for operation in compiled.get_runtime_model().get_ops():
        about = operation.get_rt_info()
        kind = str(about["layerType"].value)
        if kind.endswith(_COMPUTING):
            precision, primitive, names = (str(about[name].value) for name in _FACTS)
            multiplies = primitive.rpartition("_")[2]  # of integer weights alone, runtimePrecision tells only of them
            precision = multiplies if "f" in multiplies else precision
            layers.append({"type": kind, "precision": precision, "names": names})
    request = compiled.create_infer_request()
    return lambda images: np.array(request.infer([images])[0]), b"", layers


RUNTIMES: dict[str, Callable[[str, int], tuple[Network, bytes, Layers]]] = {
    "onnxruntime": lambda file, threads: onnxruntime(file, threads, optimised=True),
    "onnxruntime-unoptimised": lambda file, threads: onnxruntime(file, threads, optimised=False),
    "openvino": openvino,
    "openvino-bf16": lambda file, threads: openvino(file, threads, "bf16"),
}


def peak_memory() -> int:
    """The most bytes of memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it made this process
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def seconds(network: Network, images: Array, at_least: float) -> float:
    """Seconds of one pass: the mean over as many passes as fill ``at_least`` seconds."""
    passes, begin = 0, time.perf_counter()
    while True:
        network(images)
        passes += 1
        spent = time.perf_counter() - begin
        if spent >= at_least:
            return spent / passes


def main(runtime: str, file: str, threads: str) -> None:
    """Answer until stdin ends. The first answer tells what was loaded, or why nothing was."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a runtime prints must not get between the frames
    try:
        network, graph, layers = RUNTIMES[runtime](file, int(threads))
    except Exception as error:  # a runtime raises what it likes; the other end makes a sentence of it
        write_frame(answers, json.dumps({"error": str(error)}).encode())
        return
    write_frame(answers, json.dumps({"layers": layers}).encode())
    write_frame(answers, graph)
    while request := read_frame(sys.stdin.buffer):
        order = json.loads(request)
        if order["do"] == "memory":
            write_frame(answers, str(peak_memory()).encode())
            continue
        images = np.frombuffer(read_frame(sys.stdin.buffer) or b"", np.float32).reshape(order["shape"])
        if order["do"] == "time":
            write_frame(answers, str(seconds(network, images, order["at_least"])).encode())
        else:
            logits = np.ascontiguousarray(network(images), dtype=np.float32)
            write_frame(answers, json.dumps(logits.shape).encode())
            write_frame(answers, logits.tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
