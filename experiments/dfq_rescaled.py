"""DFQ on a network whose channels were rescaled at random: the function is the same, per-tensor rounding is not.

    python experiments/dfq_rescaled.py zoo:mobilenetv2-cifar10 --data cifar10-test.zip --seeds 0 1 2

Every channel between two layers of a chain is divided by 10^U(-1.5, 1.5) in the first and multiplied in the second.
"""

import argparse
import dataclasses

import torch
from torch import fx

import zsq
from zsq.evaluate import evaluate, read_images
from zsq.nets.chains import equalizable_chains, make_equivariant, scale_channels
from zsq.nets.folding import fold_batchnorms
from zsq.nets.graph import capture
from zsq.nets.tracing import LAYERS


def rescaled(network: zsq.Network, seed: int) -> fx.GraphModule:
    """The network, its BatchNorm kept but driven by scaled convolutions and followed by scaled affine parameters."""
    graph = capture(network.module, torch.zeros(2, *network.input_shape))
    folded = capture(network.module, torch.zeros(2, *network.input_shape))
    fold_batchnorms(folded)
    links = [link for chain in equalizable_chains(folded) for link in chain.links]
    make_equivariant(folded, exact=True)
    rng = torch.Generator().manual_seed(seed)
    modules = dict(graph.named_modules())
    for link in links:
        first, second = modules[link.first], modules[link.second]
        assert isinstance(first, LAYERS)
        assert isinstance(second, LAYERS)
        bn = modules[_batchnorm_after(graph, link.first)]
        factors = 10 ** (3 * torch.rand(len(bn.weight), generator=rng) - 1.5)
        with torch.no_grad():
            bn.weight /= factors
            bn.bias /= factors
        clip = None
        if link.clip is not None:
            name = next(str(node.target) for node in folded.graph.nodes if node.name == link.clip)
            clip = modules.get(name)
            if clip is None or not hasattr(clip, "limit"):
                graph.set_submodule(name, folded.get_submodule(name))
                clip = modules[name] = graph.get_submodule(name)
            clip.limit /= factors
        neutral = torch.nn.Conv2d(1, len(factors), 1)  # the BatchNorm already scaled the outputs of the first layer
        scale_channels(neutral, second, None, factors)
    graph.recompile()
    return graph


def _batchnorm_after(graph: fx.GraphModule, layer: str) -> str:
    node = next(node for node in graph.graph.nodes if str(node.target) == layer)
    return str(next(iter(node.users)).target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    network = zsq.load_network(args.model)
    images = read_images(args.data, network.input_shape)
    scale = {"mean": network.mean, "std": network.std}
    print(f"{args.model}: float {evaluate(network.module, images, **scale).top1:.2f}")
    for seed in args.seeds:
        module = rescaled(network, seed)
        changed = dataclasses.replace(network, module=module)
        same = evaluate(module, images, **scale).top1
        plain = zsq.quantize(changed, PLAIN, "w8a8", data=images).metrics["accuracy"]["quantized"]["top1"]
        dfq = zsq.quantize(changed, "dfq", "w8a8", data=images).metrics["accuracy"]["quantized"]["top1"]
        print(f"seed {seed}: float {same:.2f}, W8A8 per tensor without DFQ {plain:.2f}, with DFQ {dfq:.2f}")


PLAIN = dataclasses.replace(
    zsq.METHODS["dfq"], name="per-tensor", quantizer=(zsq.METHODS["dfq"].quantizer[2], zsq.METHODS["dfq"].quantizer[4])
)
"""DFQ without equalization, absorption and correction: the same protocol, the same ranges from BatchNorm."""


if __name__ == "__main__":
    main()
