"""Where a student is to run: what types a target computes in, what it cannot express, and which speed to expect."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from zsq.core import Recipe, RecipeError
from zsq.quant.placement import PROTOCOLS, QuantizationProtocol

__all__ = ["DEFAULT", "TARGETS", "Target", "find_target"]


@dataclass(frozen=True, kw_only=True)
class Target(Recipe):
    """A runtime, as placement and types."""

    name: str
    suffix: Literal[".onnx", ".xml", ".pt2"]
    """Of the file; an ``.xml`` has a ``.bin`` beside it."""
    protocol: QuantizationProtocol
    """Puts quantizers where this target wants them."""
    activations: Literal["uint8", "int8"] = "uint8"
    """int8 is symmetric, with zero point 0."""
    narrow_activations: bool = True
    """Whether a grid of fewer than 8 bits can be kept, by an integer clip between quantizing and dequantizing."""
    int4: bool = True
    """Whether weights that fit into 4 bits are stored in 4 bits; otherwise in 8, with the same values."""
    integer_bias: bool = True
    """Whether biases are int32, at activation scale x weight scale; otherwise float."""
    quantized_outputs: bool = False
    """Whether a convolution computes in integers only if its output is quantized too."""
    integer: str
    """The speed of integer layers, beside the float file on the same runtime."""
    floating: str
    """The speed of a layer that does not fit."""
    cannot: str
    """What this target does not express."""


TARGETS = {
    target.name: target
    for target in (
        Target(
            name="ort-x86",
            suffix=".onnx",
            protocol=PROTOCOLS["ort-x86"],
            quantized_outputs=True,
            integer="1.8x (DeiT-tiny) to 3.3x (ResNet-18) the float file on a core with VNNI, whatever the bit width",
            floating="slower than in the float file, for the conversions around it",
            cannot="8-bit asymmetric weights; more than 8 bits; one activation scale for each channel",
        ),
        Target(
            name="openvino",
            suffix=".xml",
            protocol=PROTOCOLS["openvino"],
            integer="1.7x (DeiT-tiny) to 3.7x (ResNet-18) the float file on a core with VNNI, whatever the bit width",
            floating="as in the float file, or a little slower",
            cannot="8-bit asymmetric weights; more than 8 bits; one activation scale for each channel",
        ),
        Target(
            name="tensorrt",
            suffix=".onnx",
            protocol=PROTOCOLS["tensorrt"],
            activations="int8",
            narrow_activations=False,
            int4=False,
            integer_bias=False,
            integer="not measured: only the structure of this file is checked here",
            floating="not measured",
            cannot="asymmetric activations; activations of fewer than 8 bits; weights packed below 8 bits",
        ),
        Target(
            name="pt2e-x86",
            suffix=".pt2",
            protocol=PROTOCOLS["pt2e-x86"],
            int4=False,
            integer_bias=False,
            integer="2.8x compiled float (ResNet-18) once Inductor has compiled it with freezing",
            floating="as in float, or a little slower",
            cannot="8-bit asymmetric weights; more than 8 bits; weights packed below 8 bits",
        ),
    )
}
DEFAULT = "ort-x86"


def find_target(target: str | Target) -> Target:
    """The target called ``target``.

    Raises:
        RecipeError: if there is none; the message lists those that exist.
    """
    if isinstance(target, Target):
        return target
    if target not in TARGETS:
        near = get_close_matches(target, TARGETS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise RecipeError(f"no target {target!r}{hint}: there is {', '.join(TARGETS)}")
    return TARGETS[target]
