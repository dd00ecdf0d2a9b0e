"""How the shipped networks were trained: ``python -m zsq.zoo.train NAME --data TRAIN --test TEST --out DIR``.

The last epoch is what ships; nothing is selected on the test images. Each epoch ends in a checkpoint, and the same
command goes on from there, bit for bit: every random draw is seeded by the recipe's seed and the epoch.
"""

import argparse
import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from zsq.allocator import keep_freed_memory
from zsq.core.errors import RunError
from zsq.evaluate import Accuracy, Images, evaluate, read_images, training_digits
from zsq.zoo import Entry, entry, load_weights

__all__ = ["RECIPES", "TrainingRecipe", "train"]


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """A one-cycle learning rate on shifted, mirrored images."""

    epochs: int
    lr: float
    """At the peak."""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """SGD with Nesterov momentum; or Muon, which steps along orthogonal matrices, for the matrices inside of blocks
    and AdamW for all other parameters (Jordan et al. 2024, scaled to the steps of AdamW as by Liu et al. 2025)."""
    batch_size: int = 128
    momentum: float = 0.9
    warmup: float = 0.15
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 5e-4
    """On weights only: biases and normalisation parameters, all of one dimension, keep their size; with Muon, on what
    Muon steps only."""
    shift: int = 4
    """Each image moves by up to this many pixels each way ..."""
    padding: Literal["reflect", "constant"] = "reflect"
    """... and this fills the border."""
    flip: bool = True
    """Half of the images are mirrored."""
    teacher: str | None = None
    """A shipped network whose logits are half of the target."""
    temperature: float = 4.0
    """Softening of both networks' logits, where there is a teacher."""
    sparse_epochs: int = 0
    """In so many first epochs a vision transformer sees half of the patches of an image, drawn anew for each step."""
    bfloat16: bool = False
    """Whether layers compute in bfloat16, beside float32 parameters."""
    seed: int = 0


RECIPES = {
    "digits-resnet": TrainingRecipe(epochs=60, lr=0.2, shift=1, padding="constant", flip=False),
    "resnet20-cifar10": TrainingRecipe(epochs=40, lr=0.2),
    "mobilenetv2-cifar10": TrainingRecipe(epochs=36, lr=0.15, teacher="resnet20-cifar10"),
    "vit-cifar10": TrainingRecipe(
        epochs=28,
        lr=2e-3,
        optimizer="muon",
        momentum=0.95,
        weight_decay=0.05,
        teacher="resnet20-cifar10",
        sparse_epochs=21,
        bfloat16=True,
    ),
}


def learning_rate(recipe: TrainingRecipe, done: float) -> float:
    """The learning rate when the share ``done`` of all steps is behind: up in a line, down in half a cosine.

    >>> [round(learning_rate(TrainingRecipe(epochs=1, lr=0.2), done), 3) for done in (0.0, 0.075, 0.15, 0.575, 1.0)]
    [0.0, 0.1, 0.2, 0.1, 0.0]
    """
    if done < recipe.warmup:
        return recipe.lr * done / recipe.warmup
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (done - recipe.warmup) / (1 - recipe.warmup)))


def augmented(pixels: Tensor, recipe: TrainingRecipe, rng: torch.Generator) -> Tensor:
    """The images (N, H, W, C) uint8 as (N, C, H, W) uint8 in channels-last memory, each shifted and mirrored."""
    count, height, width, _ = pixels.shape
    shift = recipe.shift
    nchw = pixels.permute(0, 3, 1, 2).float()
    padded = F.pad(nchw, (shift,) * 4, recipe.padding).to(torch.uint8).permute(0, 2, 3, 1)
    top = torch.randint(2 * shift + 1, (count, 1), generator=rng)
    left = torch.randint(2 * shift + 1, (count, 1), generator=rng)
    mirrored = (torch.rand(count, 1, generator=rng) < 0.5) & recipe.flip
    rows, columns = torch.arange(height) + top, torch.arange(width) + left  # (N, H), (N, W)
    columns = torch.where(mirrored, columns.flip(1), columns)
    images = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return images.permute(0, 3, 1, 2)


def batches(
    images: Images, model: Entry, recipe: TrainingRecipe, rng: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of augmented, normalised images (n, C, H, W) and labels (n,); a last short batch is left out."""
    mean, std = torch.tensor(model.mean).view(-1, 1, 1), torch.tensor(model.std).view(-1, 1, 1)
    order = torch.randperm(len(images), generator=rng)
    whole = len(images) // recipe.batch_size
    for chosen in order[: whole * recipe.batch_size].view(whole, -1):
        x = augmented(images.pixels[chosen], recipe, rng).float() / 255
        yield (x - mean) / std, images.labels[chosen]


def training_loss(logits: Tensor, labels: Tensor, target: Tensor | None, temperature: float) -> Tensor:
    """Cross entropy, or half of it and half of T^2 * KL(softmax(target/T) || softmax(logits/T)); logits (n, K)."""
    loss = F.cross_entropy(logits, labels)
    if target is None:
        return loss
    student, teacher = F.log_softmax(logits / temperature, 1), F.log_softmax(target / temperature, 1)
    return 0.5 * loss + 0.5 * temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def build_optimizers(network: nn.Module, recipe: TrainingRecipe) -> list[Optimizer]:
    """What steps the parameters of ``network``, each of them once."""
    named = dict(network.named_parameters())
    if recipe.optimizer == "sgd":
        decayed = [p for p in named.values() if p.ndim > 1]
        kept = [p for p in named.values() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": kept}]
        return [SGD(groups, recipe.lr, momentum=recipe.momentum, nesterov=True)]
    inner = {name for name, p in named.items() if p.ndim == 2 and name.startswith("blocks.")}
    matrices = [named[name] for name in named if name in inner]
    muon = Muon(
        matrices,
        recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, AdamW([p for name, p in named.items() if name not in inner], recipe.lr, weight_decay=0.0)]


@contextlib.contextmanager
def half_of_the_patches(network: nn.Module, rng: torch.Generator) -> Iterator[None]:
    """A context in which timm's ``network`` works on half of the patches of each image, drawn from ``rng``."""

    def drop(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> Tensor:
        tokens = inputs[0]  # (N, 1 + T, D): the class token first
        order = torch.rand(len(tokens), tokens.shape[1] - 1, generator=rng).argsort(1)
        kept = F.pad(order[:, : order.shape[1] // 2] + 1, (1, 0))
        return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))

    hook = network.get_submodule("patch_drop").register_forward_hook(drop)
    try:
        yield
    finally:
        hook.remove()


def train(model: Entry, recipe: TrainingRecipe, images: Images, test: Images, out: Path) -> tuple[nn.Module, Accuracy]:
    """The trained network and its accuracy; goes on from ``out/checkpoint.pt`` where there is one.

    Raises:
        RunError: if the checkpoint in ``out`` was made by another recipe or for another network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = _channels_last(model.build())
    teacher = None if recipe.teacher is None else _channels_last(load_weights(recipe.teacher))
    for module in network.modules():
        if hasattr(module, "fused_attn"):  # on CPUs the backward of the fused kernel takes as long as all the rest
            module.fused_attn = False  # type: ignore[assignment]  # timm's switch, no Tensor
    optimizers = build_optimizers(network, recipe)
    out.mkdir(parents=True, exist_ok=True)
    made_by = {"network": model.name, **asdict(recipe)}
    first, file = 0, out / "checkpoint.pt"
    if file.exists():
        checkpoint = torch.load(file, weights_only=True)
        if checkpoint["made_by"] != made_by:
            raise RunError(f"{file} was made by {checkpoint['made_by']}, this is {made_by}: choose another --out")
        network.load_state_dict(checkpoint["network"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first = checkpoint["epochs"]

    steps = len(images) // recipe.batch_size
    for epoch in range(first, recipe.epochs):
        start, total = time.perf_counter(), 0.0
        network.train()
        stream = recipe.seed * 1_000_003 + epoch  # one of its own for each epoch
        rng = torch.Generator().manual_seed(stream)
        for step, (x, labels) in enumerate(batches(images, model, recipe, rng)):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = learning_rate(recipe, (epoch + (step + 1) / steps) / recipe.epochs)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                with torch.no_grad():
                    target = None if teacher is None else teacher(x).float()
                if epoch < recipe.sparse_epochs:
                    with half_of_the_patches(network, rng):
                        logits = network(x)
                else:
                    logits = network(x)
            loss = training_loss(logits.float(), labels, target, recipe.temperature)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            total += loss.item()
        states = [optimizer.state_dict() for optimizer in optimizers]
        _replace(
            file,
            {"made_by": made_by, "epochs": epoch + 1, "network": network.state_dict(), "optimizers": states},
        )
        line = f"epoch {epoch + 1:3d}/{recipe.epochs}  loss {total / steps:.4f}"
        if (epoch + 1) % 5 == 0:
            line += f"  test top-1 {evaluate(network, test, mean=model.mean, std=model.std).top1:.2f} %"
        print(f"{line}  {time.perf_counter() - start:.0f} s", flush=True)
    network.eval()
    return network, evaluate(network, test, mean=model.mean, std=model.std)


def _channels_last(network: nn.Module) -> nn.Module:
    # torch's overloads of Module.to do not list memory_format, which it takes.
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _replace(file: Path, state: dict[str, Any]) -> None:
    """Write ``state`` so that ``file`` is always a whole one, the old or the new."""
    torch.save(state, file.with_suffix(".tmp"))
    os.replace(file.with_suffix(".tmp"), file)


def main() -> None:
    """Train one network of the zoo; write ``NAME.safetensors`` and the numbers of its model card, ``NAME.json``."""
    parser = argparse.ArgumentParser(prog="python -m zsq.zoo.train", description=main.__doc__)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--data", required=True, help="images to train on, or 'digits' for the part not held out")
    parser.add_argument("--test", required=True, help="images to report the accuracy on")
    parser.add_argument(
        "--out", required=True, type=Path, help="folder for the checkpoint, the weights and the numbers"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    model, recipe = entry(args.name), RECIPES[args.name]
    images = training_digits() if args.data == "digits" else read_images(args.data, model.input_shape)
    test = read_images(args.test, model.input_shape)
    network, accuracy = train(model, recipe, images, test, args.out)
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    if model.half:
        state = {key: value.half() for key, value in state.items()}
        network.load_state_dict(state)
        accuracy = evaluate(network, test, mean=model.mean, std=model.std)
    (args.out / f"{model.name}.safetensors").write_bytes(safetensors.torch.save(state))
    numbers = {
        "name": model.name,
        "parameters": sum(p.numel() for p in network.parameters()),
        "recipe": asdict(recipe),
        "training_images": len(images),
        "test_images": len(test),
        "top1": round(accuracy.top1, 2),
        "top5": round(accuracy.top5, 2),
        "torch": torch.__version__,
    }
    (args.out / f"{model.name}.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"{model.name}: top-1 {accuracy.top1:.2f} % on {len(test)} test images", flush=True)


if __name__ == "__main__":
    main()
