"""The architectures of the shipped networks: small, plain torch; the transformer is timm's."""

from torch import Tensor, nn

from zsq.compat import import_timm

__all__ = ["MobileNetV2", "ResNet", "vision_transformer"]


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016), (N, C, H, W) to (N, C', H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv_bn(inputs, outputs, 3, stride)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv_bn(outputs, outputs, 3)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv_bn(inputs, outputs, 1, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` as the class says."""
        out: Tensor = self.relu2(self.conv2(self.relu1(self.conv1(x))) + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2016: a 3x3 stem, one stage per width, global average pooling.

    ``depth`` 3 and ``widths`` (16, 32, 64) make ResNet-20. Images (N, ``channels``, H, W) to logits (N, K).
    """

    def __init__(self, depth: int, widths: tuple[int, ...], classes: int, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(channels, widths[0], 3), nn.ReLU())
        stages, inputs = [], widths[0]
        for index, width in enumerate(widths):
            blocks = []
            for block in range(depth):
                blocks.append(BasicBlock(inputs, width, 2 if index > 0 and block == 0 else 1))
                inputs = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` as the class says."""
        logits: Tensor = self.head(self.pool(self.stages(self.stem(x))).flatten(1))
        return logits


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 without activation (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = [*_conv_bn(inputs, hidden, 1), nn.ReLU6()] if expansion > 1 else []
        layers += [*_conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(), *_conv_bn(hidden, outputs, 1)]
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """``x`` as the class says."""
        out: Tensor = self.body(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """MobileNetV2 for 32-pixel images at about half width: stem stride 1, ReLU6, logits (N, K).

    ``stages`` are (expansion, channels, blocks, stride) as in table 2 of Sandler et al. 2018.
    """

    stages = ((1, 8, 1, 1), (6, 16, 2, 2), (6, 24, 3, 1), (6, 32, 3, 2), (6, 48, 2, 1), (6, 80, 2, 2))

    def __init__(self, classes: int, stem: int = 16, last: int = 320) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(3, stem, 3), nn.ReLU6())
        blocks, inputs = [], stem
        for expansion, outputs, count, stride in self.stages:
            for block in range(count):
                blocks.append(InvertedResidual(inputs, outputs, stride if block == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(*_conv_bn(inputs, last, 1), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` as the class says."""
        logits: Tensor = self.head(self.pool(self.last(self.blocks(self.stem(x)))).flatten(1))
        return logits


def vision_transformer(size: int, patch: int, width: int, depth: int, heads: int, classes: int) -> nn.Module:
    """timm's ViT (Dosovitskiy et al. 2021) with a class token: images (N, 3, ``size``, ``size``) to logits (N, K).

    Raises:
        MissingExtra: if timm is not installed.
    """
    vit: nn.Module = import_timm().models.VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=classes
    )
    return vit
