"""Small networks that hold what files must hold, quantized for deployment."""

from collections.abc import Callable
from functools import cache

import tiny
import torch
from torch import Tensor, fx, nn

import zsq
from zsq.export import TARGETS
from zsq.export.lower import IntegerActivation

ORT = TARGETS["ort-x86"]


class Branches(nn.Module):
    """Two branches that meet in a concatenation, pools on both sides of it, SiLU, and a sum without ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*tiny.conv_bn(3, 6), nn.SiLU(), nn.MaxPool2d(2))
        self.left = nn.Sequential(*tiny.conv_bn(6, 4, kernel=1), nn.ReLU())
        self.right = nn.Sequential(*tiny.conv_bn(6, 4), nn.ReLU())
        self.pool = nn.AvgPool2d(2)
        self.last = nn.Sequential(*tiny.conv_bn(8, 8))
        self.head = nn.Linear(8 * 2 * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.pool(torch.cat([self.left(x), self.right(x)], 1))
        return self.head((x + self.last(x)).flatten(1))


class Tokens(nn.Module):
    """Patches, one head of attention and a perceptron with GELU, normalised and with shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 2, 2)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # (N, T, D)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v)
        x = x + self.mlp(x)
        return self.head(x.mean(1))


class Dense(nn.Module):
    """A map that two concatenations read, a BatchNorm that no layer feeds alone, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*tiny.conv_bn(3, 4), nn.ReLU())
        self.first = nn.Sequential(*tiny.conv_bn(4, 4))
        self.second = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
        self.up = nn.ConvTranspose2d(12, 6, 2, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.cat([x, self.first(x)], 1)
        return self.head(torch.relu(self.up(torch.cat([x, self.second(y), x], 1))).mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": tiny.cnn,
    "mobilenet": tiny.mobile,
    "branches": lambda: tiny.lively(Branches()),
    "dense": lambda: tiny.lively(Dense()),
    "tokens": lambda: tiny.lively(Tokens()),
    "dead": tiny.dead,
}


@cache
def result_of(network: str, bits: str = "w4a4", protocol: str = "deploy") -> zsq.Result:
    """A finished run on one of the networks; made once, and never changed by those who look at it."""
    return zsq.quantize(NETWORKS[network](), "nearest", bits, protocol=protocol, **tiny.settings("nearest"))


def images(count: int = 64) -> Tensor:
    """(N, 3, 8, 8)."""
    return torch.randn(count, *tiny.SHAPE, generator=torch.Generator().manual_seed(5))


class Plain:
    """The conversions in plain torch, to run a lowered graph."""

    def convert(self, x: Tensor, grid: IntegerActivation) -> Tensor:
        q = (x / grid.scale).round() + float(grid.zero_point)
        return (q.clamp(float(grid.low), float(grid.high)) - float(grid.zero_point)) * grid.scale

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
        shape = [1] * codes.dim()
        shape[axis] = -1
        return (codes.float() - zero_point.float().reshape(shape)) * scale.reshape(shape)


def nodes(graph: fx.GraphModule, kind: type) -> list[nn.Module]:
    return [module for module in graph.modules() if isinstance(module, kind)]
