"""Seconds that SQuant's rounding takes for every weight of a network, on one core.

python benchmarks/squant_rounding.py zoo:resnet20-cifar10
python benchmarks/squant_rounding.py torchvision:resnet18 --random
"""

import argparse
import time

import torch
from torch import nn

from zsq import METHODS, load_network
from zsq.quant import InsertFakeQuant
from zsq.quant.quantizers import WeightQuantizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--random", action="store_true", help="random weights: nothing is downloaded")
    parser.add_argument("--bits", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    network = load_network(args.model, pretrained=not args.random).module
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    insert = next(step for step in METHODS["squant"].quantizer if isinstance(step, InsertFakeQuant))
    begin = time.perf_counter()
    for layer in layers:
        WeightQuantizer.fit(layer.weight.detach(), args.bits, insert.protocol.weights, insert.range, insert.rounding, 0)
    seconds = time.perf_counter() - begin
    weights = sum(layer.weight.numel() for layer in layers)
    print(f"{args.model}: {len(layers)} layers, {weights} weights, {args.bits} bits: {seconds:.2f} s on one core")


if __name__ == "__main__":
    main()
