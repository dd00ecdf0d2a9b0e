"""The check of card vit_ptq that needs a trained network: the order of post-training quantizers, on the same images.

    python experiments/cards_vit_quant.py --data cifar10-test.zip
    python experiments/cards_vit_quant.py --images psaq-vit --bits w4a4 w8a8 --seeds 0 1 2 --data cifar10-test.zip

As ``cards_vit.py``: top-1 on a fixed random 2,000 of the test images (standard error about 0.8 points), mean over the
seeds; 32 images for ranges each, real ones from another 2,000 (the upper bound), noise, or made by a system at effort
fast. All but the first row quantize the operands of linears and products alone.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from cards import say
from cards_vit import Bench

from zsq.allocator import keep_freed_memory
from zsq.api import find_method
from zsq.core import Batch, Method, Pass
from zsq.evaluate import read_images
from zsq.methods import BASELINES
from zsq.nets.load import load_network
from zsq.quant import (
    DEPLOY_VIT,
    MINMAX_VIT_PASSES,
    REPQ_VIT,
    REPQ_VIT_PASSES,
    Calibrate,
    InsertFakeQuant,
    Log2,
    MinMax,
    PercentileSearch,
    Range,
    RidgeCorrection,
    SearchRanges,
    TwinGELU,
    TwinSoftmax,
)

TENSOR = replace(REPQ_VIT, norms=None)
UNIFORM = replace(TENSOR, probabilities=None)
TWIN = replace(TENSOR, probabilities=TwinSoftmax(), gelus=TwinGELU())


def calibrated(protocol: object, span: Range) -> tuple[Pass, ...]:
    """Ranges of weights and activations by ``span``."""
    insert = InsertFakeQuant(protocol=protocol, range=span)  # type: ignore[arg-type]  # a protocol
    return insert, Calibrate(range=span, samples=32, batch_size=32)


def with_probabilities(grid: object) -> tuple[Pass, ...]:
    """RepQ-ViT with another grid for probabilities."""
    insert, *rest = REPQ_VIT_PASSES
    return replace(insert, protocol=replace(REPQ_VIT, probabilities=grid)), *rest  # type: ignore[type-var]  # a pass


RECIPES: dict[str, tuple[Pass, ...]] = {
    "minmax-vit": MINMAX_VIT_PASSES,
    "deploy-vit, min-max": calibrated(DEPLOY_VIT, MinMax()),
    "min-max": calibrated(UNIFORM, MinMax()),
    "percentile": calibrated(UNIFORM, PercentileSearch()),
    "percentile, log-sqrt2": calibrated(TENSOR, PercentileSearch()),
    "RepQ": REPQ_VIT_PASSES,
    "RepQ, probabilities uniform": with_probabilities(None),
    "RepQ, probabilities log2": with_probabilities(Log2()),
    "RepQ, probabilities float": with_probabilities("float"),
    "RepQ + ridge": (*REPQ_VIT_PASSES, RidgeCorrection()),
    "min-max, twin grids": calibrated(TWIN, MinMax()),
    "min-max, twin grids + search": (*calibrated(TWIN, MinMax()), SearchRanges()),
    "min-max, twin grids + search by output": (*calibrated(TWIN, MinMax()), SearchRanges(guide="none")),
    "RepQ + search": (*REPQ_VIT_PASSES, SearchRanges()),
}
ORDER = ["min-max", "percentile", "RepQ", "RepQ + ridge"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="zoo:vit-cifar10")
    parser.add_argument("--checkpoint")
    parser.add_argument("--images", default="real", help="real, noise, or a system such as psaq-vit")
    parser.add_argument("--bits", nargs="+", default=["w4a4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rows", nargs="+", choices=RECIPES, default=[*RECIPES], metavar="ROW")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a folder for the images")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    network = load_network(args.model, checkpoint=args.checkpoint)
    bench = Bench(network, read_images(args.data, network.input_shape), args.seeds, args.keep)
    if args.images in ("real", "noise"):
        batches = [Batch(getattr(bench, args.images)(seed)) for seed in args.seeds]
    else:
        batches = [bench.made(find_method(args.images).preset("fast"), seed) for seed in args.seeds]
    print(f"\n### {args.images} images\n\n| quantizer | {' | '.join(args.bits)} |\n|---|" + "---|" * len(args.bits))
    found: dict[str, dict[str, float]] = {bits: {} for bits in args.bits}
    for name in args.rows:
        recipe: Method = replace(BASELINES["nearest"], quantizer=RECIPES[name])
        for bits in args.bits:
            found[bits][name] = bench.top1(recipe, bits, batches)
        print(f"| {name} | {' | '.join(f'{found[bits][name]:.1f}' for bits in args.bits)} |", flush=True)
    if set(ORDER) <= set(args.rows):
        print("\n| the card expects | found | |\n|---|---|---|")
        for bits, top1 in found.items():
            low, middle, repq, ridge = (top1[name] for name in ORDER)
            listed = ", ".join(f"{name} {top1[name]:.1f}" for name in ORDER)
            say(f"5 {bits}: min-max < percentile < RepQ <= RepQ + ridge", listed, low < middle < repq <= ridge)


if __name__ == "__main__":
    main()
