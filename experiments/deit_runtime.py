"""A transformer in integers: both runtimes beside the float file, and beside ONNX Runtime's own dynamic int8.

    python experiments/deit_runtime.py deit_tiny_patch16_224

A network of timm with random weights at 224 pixels, as in ``vit_models.py``, by ``nearest`` at W8A8 with the
``deploy`` placement. What ``zsq verify`` says of the file, and medians of interleaved rounds on one thread. Dynamic
int8 (``quantize_dynamic``, weights per channel) rounds the inputs of linears anew for each image and leaves the
patch embedding and the products of activations in float.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from vit_models import network

import zsq
from zsq.runtime.benchmark import benchmark
from zsq.runtime.floats import export_float
from zsq.runtime.numerics import distance
from zsq.runtime.sessions import NAMES, Session
from zsq.runtime.verify import verify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    model = zsq.load_network(network(args.model), input_shape=(3, 224, 224))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        result = zsq.quantize(model, "nearest", "w8a8", protocol="deploy", effort="fast", out=place / "run")
        plan = result.export(place / "int8.onnx")
        print(f"{len(plan.integer)} layers and products in integers by plan, float: {dict(plan.floating)}")
        found = verify(place / "int8.onnx", place / "run", model=model)
        for check in found.checks:
            print(f"{check.name}: {'pass' if check.passed else 'FAIL' if check.passed is False else '-'}, {check.says}")
        for images, distances in found.numbers.items():
            for each in distances:
                print(
                    f"{images}, {each.name}: {each.snr_float:.1f} dB to float, {each.snr_simulation:.1f} to simulation"
                )
        exact = place / "float.onnx"
        export_float(model, exact)
        quantize_dynamic(exact, place / "dynamic.onnx", per_channel=True, weight_type=QuantType.QInt8)
        photos = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), Session("onnxruntime", place / "dynamic.onnx", 1) as dynamic:
            wanted, simulated = model.module(photos).numpy(), result.student(photos).numpy()
            apart = distance("dynamic", dynamic.logits(photos.numpy()), simulated, wanted)
        print(f"dynamic int8: {apart.snr_float:.1f} dB to float on noise")
        print("\n| runtime | batch | file | ms | float ms | times faster |\n|---|---|---|---|---|---|")
        for name in ("int8", "dynamic"):
            for each in benchmark(place / f"{name}.onnx", exact, batches=args.batches).timings:
                if name == "int8" or each.runtime == "onnxruntime":
                    times = f"{each.milliseconds:.1f} | {each.float_milliseconds:.1f} | {each.ratio:.2f}"
                    print(f"| {NAMES[each.runtime]} | {each.batch} | {name} | {times} |", flush=True)


if __name__ == "__main__":
    main()
