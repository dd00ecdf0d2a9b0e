"""Published figures, from ``literature.csv``: one a row, with its protocol and its source.

Figures of one cell differ between papers that quote it, because the float networks differ and baselines are run again.
Protocols are ``qat-lowbit-all``, ``ptq-8bit-ends``, ``minmax-ptq`` and ``other``; ``other`` compares with nothing.
Confidence is high where the paper's own table, its repository or a whole table of a peer was read, else medium.
"""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from zsq.api import protocol_of, resolve
from zsq.core import Bits, RecipeError

__all__ = ["Figure", "figures", "published"]

NETWORKS = {
    "zoo:resnet20-cifar10": ("CIFAR-10", "ResNet-20"),
    "torchvision:resnet18": ("ImageNet", "ResNet-18"),
    "torchvision:resnet50": ("ImageNet", "ResNet-50"),
    "torchvision:mobilenet_v2": ("ImageNet", "MobileNetV2"),
    "torchvision:inception_v3": ("ImageNet", "InceptionV3"),
    "timm:deit_tiny_patch16_224": ("ImageNet", "DeiT-T"),
    "timm:deit_small_patch16_224": ("ImageNet", "DeiT-S"),
    "timm:deit_base_patch16_224": ("ImageNet", "DeiT-B"),
    "timm:swin_tiny_patch4_window7_224": ("ImageNet", "Swin-T"),
    "timm:swin_small_patch4_window7_224": ("ImageNet", "Swin-S"),
    "timm:vit_base_patch16_224": ("ImageNet", "ViT-B"),
}
"""The architectures that papers report on, by the names of networks here. Weights are others, so that drops compare."""
PROTOCOLS = {
    "qat-lowbit-all": "qat-lowbit-all",
    "ptq-8bit-ends": "ptq-8bit-ends",
    "minmax-ptq": "minmax-ptq",
    "minmax-ptq-inputs": "minmax-ptq",  # SQuant's places
    "minmax-vit": "minmax-ptq",  # those of PSAQ-ViT and SMI
}
"""What the literature calls a protocol, where a method's own has a counterpart there."""
HOSTS = {"ait": "gdfq+ait"}
"""A plug-in that papers never name without the host that it has here."""


@dataclass(frozen=True)
class Figure:
    """One published accuracy, top-1 in percent."""

    method: str
    dataset: str
    model: str
    bits: str
    value: float
    float_value: float | None
    """The full-precision accuracy that the source gives."""
    protocol: str
    source: str
    confidence: str


@cache
def figures() -> tuple[Figure, ...]:
    """All that are accuracies of classifiers at one width of weights and one of activations."""
    found = []
    text = (files("zsq") / "literature.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines()):
        if row["task"] != "classification" or not (row["w_bits"] + row["a_bits"]).isdigit():
            continue
        figure = Figure(
            method=row["method"],
            dataset=row["dataset"],
            model=row["model"],
            bits=f"W{row['w_bits']}A{row['a_bits']}",
            value=float(row["value"]),
            float_value=float(row["fp32"]) if row["fp32"] else None,
            protocol=row["protocol"],
            source=row["source"],
            confidence=row["confidence"],
        )
        found.append(figure)
    return tuple(found)


def published(model: str, method: str, preset: str, protocol: str) -> dict[str, list[tuple[float, str]]]:
    """By bits, the drops that were published in percentage points, least first, each with one source.

    Only of high confidence, and only if ``protocol`` is the method's own, under which its paper reports. Nothing is
    found for networks, methods and protocols that papers do not have.
    """
    try:
        own = protocol_of(resolve(method, preset=preset)).name
    except RecipeError:
        return {}
    if model not in NETWORKS or protocol != own or protocol not in PROTOCOLS:
        return {}
    found: dict[str, dict[float, str]] = {}
    for figure in figures():
        same = (figure.dataset, figure.model) == NETWORKS[model] and figure.protocol == PROTOCOLS[protocol]
        if not same or figure.method.lower() != _called(method) or figure.float_value is None:
            continue
        if figure.confidence == "high":
            drop = round(figure.float_value - figure.value, 2)
            found.setdefault(str(Bits.parse(figure.bits)), {}).setdefault(drop, figure.source)
    return {bits: sorted(drops.items()) for bits, drops in found.items()}


def _called(method: str) -> str:
    """What papers call ``method``, in small letters: a plug-in stands behind its host."""
    plugin, plus, host = method.partition("+")
    return f"{host}+{plugin}" if plus else HOSTS.get(method, method)
