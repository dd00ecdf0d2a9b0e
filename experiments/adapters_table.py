"""What synthesized images are worth to the 8-bit quantizers of ONNX Runtime and NNCF, against random data.

    python experiments/adapters_table.py zoo:resnet20-cifar10 zoo:mobilenetv2-cifar10 --data cifar10-test.zip

Needs onnxruntime, openvino and nncf. Each network is quantized by both tools, at their defaults but for per-channel
weights and uint8 activations in ONNX Runtime, and there also with the logits left in float. The 64 images are of four
kinds: made by ZeroQ, made by IntraQ for classes (both effort fast), pixels drawn evenly, and Gaussian noise in
normalised space. What the files make of the real images is printed as a table.
"""

import argparse
import contextlib
import sys
import tempfile
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import nncf
import numpy as np
import openvino
import torch
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

import zsq
from zsq.runtime.adapters import CalibrationReader, nncf_dataset
from zsq.runtime.floats import export_float
from zsq.runtime.sessions import Session

SAMPLES = 64
KINDS = ("zeroq", "intraq", "even pixels", "Gaussian noise")


def images_of(kind: str, model: str, network: zsq.Network, seed: int) -> np.ndarray:
    """Normalised images (64, C, H, W) to calibrate with."""
    if kind in zsq.METHODS:
        made, _ = zsq.synthesize(model, kind, SAMPLES, effort="fast", seed=seed, device="cpu")
        return made.images.numpy()
    rng, shape = torch.Generator().manual_seed(seed), (SAMPLES, *network.input_shape)
    if kind == "Gaussian noise":
        return torch.randn(shape, generator=rng).numpy()
    centre, spread = (torch.tensor(each).view(-1, 1, 1) for each in (network.mean, network.std))
    return ((torch.rand(shape, generator=rng) - centre) / spread).numpy()


def by_onnxruntime(exact: Path, images: np.ndarray, **options: Any) -> Path:
    """The file that ONNX Runtime makes of ``exact``."""
    out = exact.with_name("ort.onnx")
    quantize_static(
        str(exact),
        str(out),
        CalibrationReader(images),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options=options,
    )
    return out


def by_nncf(exact: Path, images: np.ndarray) -> Path:
    """The file that NNCF makes of ``exact``."""
    with contextlib.redirect_stdout(sys.stderr):  # its progress
        model = nncf.quantize(openvino.Core().read_model(exact), nncf_dataset(images), subset_size=len(images))
    openvino.save_model(model, exact.with_name("nncf.xml"))
    return exact.with_name("nncf.xml")


def top1(runtime: str, file: Path, network: zsq.Network, data: zsq.Images) -> float:
    """Accuracy of ``file`` on all images, in percent."""
    with Session(runtime, file) as session:
        hits = [
            (session.logits(x.numpy()).argmax(1) == labels.numpy()).sum()
            for x, labels in data.batches(network.mean, network.std)
        ]
    return 100 * sum(map(int, hits)) / len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--data", required=True, help="labelled test images, as zsq evaluate takes them")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what the tools say of themselves
    print("| model | float | images | ONNX Runtime | ONNX Runtime, float logits | NNCF |\n|---|---|---|---|---|---|")
    for model in arguments.models:
        network = zsq.load_network(model)
        data = zsq.read_images(arguments.data, network.input_shape)
        with tempfile.TemporaryDirectory() as folder:
            exact = Path(folder) / "float.onnx"
            export_float(network, exact)
            reached = top1("onnxruntime", exact, network, data)
            for kind in KINDS:
                found = []
                for seed in range(arguments.seeds):
                    images = images_of(kind, model, network, seed)
                    default = top1("onnxruntime", by_onnxruntime(exact, images), network, data)
                    without = by_onnxruntime(exact, images, OpTypesToExcludeOutputQuantization=["Gemm"])
                    logits = top1("onnxruntime", without, network, data)
                    found.append((default, logits, top1("openvino", by_nncf(exact, images), network, data)))
                cells = [
                    f"{mean(each):.2f} ± {stdev(each) if len(each) > 1 else 0:.2f}" for each in zip(*found, strict=True)
                ]
                print(f"| {model} | {reached:.2f} | {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
