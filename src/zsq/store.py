"""A low-bit student on disk: integer codes packed to their width, scales, zero points, and what stayed float."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx, nn

from zsq.core import CheckpointError
from zsq.nets.chains import make_equivariant
from zsq.nets.graph import capture
from zsq.quant.layers import complete, edge_of, fold, insert_activation_quantizer, quantize_input
from zsq.quant.nonuniform import grid_from, grid_words
from zsq.quant.placement import Edge
from zsq.quant.quantizers import (
    ActivationQuantizer,
    WeightQuantizer,
    activation_quantizers,
    attach,
    float_weight,
    weight_quantizers,
)
from zsq.quant.rounding import Nearest

__all__ = ["load_student", "pack", "save_student", "unpack"]

_FORMAT = "zsq-student-2"


def pack(codes: Tensor, bits: int) -> Tensor:
    """``codes`` (any shape, uint8 below 2^``bits``) as a dense row of bytes, ``bits`` bits each.

    >>> pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist()
    [108]
    """
    planes = np.unpackbits(codes.flatten().numpy()[:, None], axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(planes))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes that ``pack`` packed."""
    count = int(np.prod(shape))
    planes = np.unpackbits(packed.numpy())[: count * bits].reshape(count, bits)
    padded = np.zeros((count, 8), dtype=np.uint8)
    padded[:, 8 - bits :] = planes
    return torch.from_numpy(np.packbits(padded, axis=1)[:, 0].reshape(shape))


def save_student(student: fx.GraphModule, origin: dict[str, str]) -> bytes:
    """A frozen student as the bytes of a safetensors file; ``origin`` says what made it, and identifies the teacher."""
    tensors: dict[str, Tensor] = {}
    weights: dict[str, Any] = {}
    for name, (_, quantizer) in weight_quantizers(student).items():
        if quantizer.codes is None:
            raise CheckpointError(f"the weight of {name} is not frozen: it has no integers to save")
        codes = quantizer.codes.cpu()
        tensors[f"{name}.weight.codes"] = pack(codes, quantizer.bits)
        tensors[f"{name}.weight.scale"] = quantizer.scale.detach().cpu().contiguous()
        tensors[f"{name}.weight.zero_point"] = quantizer.zero_point.to(torch.int32).cpu().contiguous()
        weights[name] = {"bits": quantizer.bits, "low": quantizer.low, "shape": list(codes.shape)}
    activations: dict[str, Any] = {}
    for name, act in activation_quantizers(student).items():
        edge = edge_of(student, name)
        activations[name] = {
            "bits": act.bits,
            "low": act.low,
            "grid": grid_words(act.scheme),
            "ready": act.ready,
            **({"source": edge.source.name, "readers": [node.name for node in edge.readers]} if edge else {}),
        }
    for name, tensor in student.state_dict().items():
        if ".parametrizations.weight." not in name:
            tensors[name] = tensor.detach().cpu().contiguous()
    plan = {"weights": weights, "activations": activations, "edits": student.meta.get("edits", [])}
    about = json.dumps({"format": _FORMAT, "plan": json.dumps(plan), **origin}, sort_keys=True)
    return safetensors.torch.save(tensors, {"zsq": about})  # one key: the order of several is not fixed in the file


def load_student(path: Path, network: nn.Module, example: Tensor) -> tuple[fx.GraphModule, dict[str, str]]:
    """The student kept in ``path`` on the architecture of ``network``, and what made it; outputs are equal to the bit.

    Raises:
        CheckpointError: if the file is missing, incomplete, of another kind, or belongs to another architecture.
    """
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get("zsq", "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no complete safetensors file ({error})") from error
    try:
        about: dict[str, str] = dict(json.loads(header))
    except ValueError:
        about = {}
    if about.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no student saved by this version of zsq")
    student = capture(network, example)
    try:
        _rebuild(student, json.loads(about["plan"]), tensors)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # the file may say anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} does not fit this network ({reason})") from error
    return student.eval().requires_grad_(False), about


def _rebuild(student: fx.GraphModule, plan: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Repeat the edits of the plan on a captured network, then fill in what was learned."""
    for edit in plan["edits"]:
        if edit[0] == "fold":
            fold(student)
        elif edit[0] == "complete":
            complete(student, edit[1])
        else:
            make_equivariant(student, exact=edit[1])
    student.meta["edits"] = plan["edits"]
    nodes = {node.name: node for node in student.graph.nodes}
    for name, kept in plan["activations"].items():
        act = ActivationQuantizer(kept["bits"], grid_from(kept["grid"]))
        act.resize(tuple(tensors[f"{name}.scale"].shape))
        act.low, act.high, act.ready = kept["low"], kept["low"] + 2 ** kept["bits"] - 1, kept["ready"]
        if "source" in kept:
            edge = Edge(nodes[kept["source"]], tuple(nodes[reader] for reader in kept["readers"]))
            insert_activation_quantizer(student, edge, act)
        else:
            quantize_input(student.get_submodule(name.rpartition(".")[0]), act)
    student.recompile()
    for name, kept in plan["weights"].items():
        codes = unpack(tensors.pop(f"{name}.weight.codes"), kept["bits"], tuple(kept["shape"]))
        scale = tensors.pop(f"{name}.weight.scale")
        zero_point = tensors.pop(f"{name}.weight.zero_point").to(scale.dtype)
        high = kept["low"] + 2 ** kept["bits"] - 1
        none = Nearest().build(scale, scale, scale)  # never asked: the codes say it all
        quantizer = WeightQuantizer(kept["bits"], kept["low"], high, scale, zero_point, none, codes)
        layer = student.get_submodule(name)
        attach(layer, quantizer)
        with torch.no_grad():
            float_weight(layer).copy_(quantizer(codes))
    left = student.load_state_dict(tensors, strict=False)
    missing = [name for name in left.missing_keys if ".parametrizations.weight." not in name]
    if missing or left.unexpected_keys:
        raise KeyError(f"missing {missing[:3]}, unexpected {left.unexpected_keys[:3]}")
