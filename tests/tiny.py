"""Networks small enough that a test quantizes them in a blink, with BatchNorm statistics as training leaves them."""

from typing import Any

import torch
from torch import Tensor, nn

from zsq.api import find_method

torch.set_num_threads(1)  # on tensors this small two threads only wait for each other

SHAPE = (3, 8, 8)
"""(C, H, W) of the images they take."""


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn(width, width), nn.ReLU(), *conv_bn(width, width))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.body(x))


class Gate(nn.Module):
    """Control flow that depends on values: no tracer can follow it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if y.sum() > 0 else y + x


def lively(network: nn.Module, seed: int = 1) -> nn.Module:
    """``network`` in eval mode with every parameter and statistic drawn anew, none of them 0 or 1."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=rng)
                if module.bias is not None:
                    module.bias.uniform_(-0.3, 0.3, generator=rng)
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=rng)
                module.bias.uniform_(-0.5, 1.0, generator=rng)
                module.running_mean.uniform_(-0.3, 0.3, generator=rng)
                module.running_var.uniform_(0.3, 2.0, generator=rng)
    return network.eval()


def cnn() -> nn.Module:
    """A stem, a residual block, a depthwise-separable layer and a head."""
    separable = [*conv_bn(4, 4, stride=2, groups=4), nn.ReLU(), *conv_bn(4, 6, kernel=1), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
    return lively(nn.Sequential(*conv_bn(3, 4), nn.ReLU(), Residual(4), *separable, *head))


def mobile() -> nn.Module:
    """Depthwise layers between ReLU6, as in a MobileNet."""
    separable = [*conv_bn(6, 6, groups=6), nn.ReLU6(), *conv_bn(6, 4, kernel=1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    return lively(nn.Sequential(*conv_bn(3, 6), nn.ReLU6(), *separable, *head))


def gated() -> nn.Module:
    """A network in which one submodule cannot be traced."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    return lively(nn.Sequential(*conv_bn(3, 4), nn.ReLU(), Gate(4), nn.ReLU(), *conv_bn(4, 4), nn.ReLU(), *head))


def plain() -> nn.Module:
    """No BatchNorm anywhere."""
    body = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU()]
    return lively(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)))


def dead() -> nn.Module:
    """``cnn`` in which one output channel of the stem is 0, and one of the depthwise layer next to nothing."""
    network = cnn()
    with torch.no_grad():
        network[0].weight[1] = 0
        network[4].weight[2] = 1e-14
    return network


SIZES = {"candidates": 5, "latent": 8, "wide": 6, "narrow": 4}
"""What costs time besides counts, wherever a recipe has a number of that name."""


def settings(method: str, **counts: int) -> dict[str, Any]:
    """How the tests call ``quantize`` on these networks: all sizes small, and ``counts`` at every leaf of that name."""
    names, leaves = {**SIZES, **counts}, find_method(method).leaves()
    changes = {path: names[name] for path, _ in leaves if (name := path.rpartition(".")[2]) in names}
    return {"effort": "smoke", "input_shape": SHAPE, "device": "cpu", "overrides": changes}
