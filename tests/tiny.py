"""Networks small enough that a test quantizes them in a blink, with BatchNorm statistics as training leaves them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.api import find_method
from zsq.core import needs

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


class TokenGate(nn.Module):
    """``Gate`` for tokens (N, T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if y.sum() > 0 else y + x


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each behind its norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop, self.heads, self.fused = nn.Dropout(0.1), heads, fused

    def forward(self, x: Tensor) -> Tensor:
        images, count, width = x.shape
        split = self.qkv(self.norm1(x)).reshape(images, count, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = self.drop((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)) @ v
        x = x + self.proj(out.transpose(1, 2).reshape(images, count, width))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """16 patches of 2 x 2 pixels and a class token, which the head reads."""

    def __init__(self, fused: bool = True, last: nn.Module | None = None) -> None:
        super().__init__()
        width = 8
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 17, width))
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.Sequential(*(TransformerBlock(width, 2, fused) for _ in range(2)))
        self.last, self.norm, self.head = last or nn.Identity(), nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.drop(torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position)
        return self.head(self.norm(self.last(self.blocks(x)))[:, 0])


def lively(network: nn.Module, seed: int = 1) -> nn.Module:
    """``network`` in eval mode with every parameter and statistic drawn anew, none of them 0 or 1."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=rng)
                if module.bias is not None:
                    module.bias.uniform_(-0.3, 0.3, generator=rng)
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5, generator=rng)
                module.bias.uniform_(-0.5, 1.0, generator=rng)
            if isinstance(module, VisionTransformer):
                module.token.normal_(generator=rng)
                module.position.normal_(generator=rng)
            if isinstance(module, nn.BatchNorm2d):
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


def vit() -> nn.Module:
    """A vision transformer with fused attention."""
    return lively(VisionTransformer())


def unfused_vit() -> nn.Module:
    """The products of attention one by one."""
    return lively(VisionTransformer(fused=False))


def gated_vit() -> nn.Module:
    """A vision transformer in which one submodule cannot be traced."""
    return lively(VisionTransformer(last=TokenGate(8)))


def dead_vit() -> nn.Module:
    """``vit`` in which one output channel of a linear is 0, and one of the embedding next to nothing."""
    network = vit()
    with torch.no_grad():
        network.blocks[0].mlp[0].weight[1] = 0
        network.patches.weight[2] = 1e-14
    return network


TRANSFORMERS = {"cnn": vit, "mobile": unfused_vit, "gated": gated_vit, "dead": dead_vit}
"""What stands for a CNN where a method looks at attention."""


def fitting(method: str, network: str = "cnn") -> nn.Module:
    """The network of that name, or the transformer in its place, in which ``method`` finds what it looks at."""
    transformer = "attention" in needs(find_method(method))
    made: nn.Module = TRANSFORMERS[network]() if transformer else globals()[network]()
    return made


def with_one_logit(network: nn.Module) -> nn.Module:
    """``network`` with another head, in place."""
    last = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    network.set_submodule(last, nn.Linear(network.get_submodule(last).in_features, 1))
    return network


SIZES = {"candidates": 5, "latent": 8, "wide": 6, "narrow": 4, "stops": (1, 2)}
"""What costs time besides counts, wherever a recipe has a value of that name."""


def settings(method: str, **counts: int) -> dict[str, Any]:
    """How the tests call ``quantize`` on these networks: all sizes small, and ``counts`` at every leaf of that name."""
    names, leaves = {**SIZES, **counts}, find_method(method).leaves()
    changes = {path: names[name] for path, _ in leaves if (name := path.rpartition(".")[2]) in names}
    return {"effort": "smoke", "input_shape": SHAPE, "device": "cpu", "overrides": changes}
