"""What may be typed: the options that commands share, and how their text is read."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

FORMS = "zoo:NAME, torchvision:NAME, timm:NAME, path/to/file.py:factory or package.module:factory"

Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"{FORMS}.", show_default=False)]
MethodName = Annotated[str, typer.Option("--method", help="A name that zsq methods lists.")]
Preset = Annotated[str, typer.Option(help="One of the method's presets; zsq show lists them.")]
EffortName = Annotated[
    Literal["smoke", "fast", "paper"],
    typer.Option(help="The method's own numbers (paper), minutes on a CPU (fast), or just a test (smoke)."),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="One value of the recipe; may be repeated.")
]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights for MODEL: .safetensors, or a torch file of tensors.")]
InputShape = Annotated[str | None, typer.Option(metavar="C,H,W", help="Of one image; for a network of your own.")]
Mean = Annotated[str | None, typer.Option(metavar="X,...", help="Per channel, of images in 0..1.")]
Std = Annotated[str | None, typer.Option(metavar="X,...", help="Per channel, of images in 0..1.")]
Seed = Annotated[int, typer.Option(help="Same seed, same bits.")]
Device = Annotated[str, typer.Option(help="auto (an accelerator if there is one), cpu, cuda:0 ...")]
PrecisionName = Annotated[
    Literal["float32", "bfloat16"],
    typer.Option(
        "--precision", help="What layers compute in while a student or a generator learns; results are float32."
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
FileThreads = Annotated[int, typer.Option(min=1, help="CPU threads of each runtime.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
DATA_HELP = "A .zip or folder in ImageFolder layout, an .npz with x and y, or digits. Only ever read to report."


def read_overrides(settings: list[str] | None) -> dict[str, Any]:
    """``path=value`` as a mapping; a value that is no Python literal is text."""
    overrides: dict[str, Any] = {}
    for setting in settings or []:
        path, equals, value = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"--set {setting}: write path=value, such as synthesizer.steps=500")
        try:
            overrides[path] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            overrides[path] = value
    return overrides


def read_network(checkpoint: Path | None, input_shape: str | None, mean: str | None, std: str | None) -> dict[str, Any]:
    """What ``load_network`` takes beside the name."""
    return {
        "checkpoint": checkpoint,
        "input_shape": read_numbers("--input-shape", input_shape, int, "3,32,32"),
        "mean": read_numbers("--mean", mean, float, "0.5,0.5,0.5"),
        "std": read_numbers("--std", std, float, "0.5,0.5,0.5"),
    }


def read_numbers(
    option: str, text: str | None, kind: Callable[[str], int | float], example: str
) -> tuple[int | float, ...] | None:
    """Numbers with commas, of one kind."""
    if text is None:
        return None
    try:
        return tuple(kind(number) for number in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{option} {text}: write numbers with commas, such as {example}") from None


def read_names(text: str) -> list[str]:
    """Names with commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def use_threads(threads: int | None) -> None:
    """Let torch use that many CPU threads here; None leaves what it has."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
