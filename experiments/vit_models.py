"""Vision transformers of timm, with random weights: what capture, RepQ-ViT and the report of float tensors do on them.

    python experiments/vit_models.py deit_tiny_patch16_224 deit_small_patch16_224 vit_base_patch16_224 \\
        swin_tiny_patch4_window7_224

W4A4 under ``repq-vit`` with two images of noise. LayerNorms get weights and biases as uneven as trained ones have. The
columns: the largest difference of the captured graph from the network, and of the student with its quantizers off
after reparameterization, both in units of the largest logit and absolute; products whose operands are not all
quantized; operands of layers that are neither quantized nor reported; LayerNorms that were merged.
"""

import argparse
import time

import torch
from torch import nn

from zsq.compat import import_timm
from zsq.core import Bits, Job, Run, Source, Teacher
from zsq.nets.graph import capture, layers, matmuls, module_of
from zsq.quant import REPQ_VIT_PASSES
from zsq.quant.placement import float_tensors, made_by
from zsq.quant.quantizers import ActivationQuantizer, activation_quantizers, float_mode
from zsq.synthesis import Noise


def network(name: str) -> nn.Module:
    """``name`` with random weights."""
    torch.manual_seed(0)
    model: nn.Module = import_timm().create_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module.weight is not None:
            module.weight.data = torch.randn_like(module.weight).exp()
            module.bias.data = torch.randn_like(module.bias)
    return model


@torch.no_grad()
def row(name: str) -> list[str]:
    """One line of the table."""
    begin, model = time.perf_counter(), network(name)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    expected = model(images)
    student = capture(model, torch.zeros(2, 3, 224, 224))
    captured = (student(images) - expected).abs().max().item()
    job = Job(Teacher(model), student, Bits(4, 4), Run(device="cpu"), (3, 224, 224))
    source = Source(Noise(samples=2), job)
    for step in REPQ_VIT_PASSES[:-1]:
        step.apply(job, source)
    channels = [q for q in activation_quantizers(student).values() if q.scale.dim() == 1]
    REPQ_VIT_PASSES[-1].apply(job, source)
    merged = sum(q.scale.dim() == 0 for q in channels)
    with float_mode(student):
        moved = (student(images) - expected).abs().max().item()
    finite = bool(student(images).isfinite().all())
    operands = [operand for product in matmuls(student) for operand in product[1:]]
    bare = sum(not isinstance(module_of(made_by(each)), ActivationQuantizer) for each in operands)
    reported = float_tensors(student)
    silent = sum(
        not isinstance(module_of(made_by(node.all_input_nodes[0])), ActivationQuantizer)
        and not any(line.startswith(f"{node.target} <- ") for line in reported)
        for node in layers(student)
    )
    largest = expected.abs().max().item()
    differences = [f"{value / largest:.1e} ({value:.1e})" for value in (captured, moved)]
    counts = [str(bare), str(silent), f"{merged} of {len(channels)}", str(len(reported)), "yes" if finite else "no"]
    return [name, *differences, *counts, f"{time.perf_counter() - begin:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header = ["network", "capture off by", "merging moves by", "bare operands", "silent operands", "merged"]
    header += ["reported in float", "W4A4 runs", "seconds"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    for name in args.models:
        print("| " + " | ".join(row(name)) + " |", flush=True)


if __name__ == "__main__":
    main()
