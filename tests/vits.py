"""A vision transformer small enough for a test, whose attention is written out."""

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Two heads; one linear for q, k and v together, or three without bias."""

    def __init__(self, width: int, together: bool) -> None:
        super().__init__()
        self.together, self.size = together, width // 2
        if together:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.drop, self.proj = nn.Dropout(0.1), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        if self.together:
            q, k, v = self.qkv(x).reshape(n, t, 3, 2, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (each(x).reshape(n, t, 2, self.size).transpose(1, 2) for each in (self.q, self.k, self.v))
        scores = (q * self.size**-0.5) @ k.transpose(-2, -1)
        return self.proj((self.drop(scores.softmax(-1)) @ v).transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    def __init__(self, width: int, together: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, together)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """8-pixel images in patches of 4: four tokens and a class token."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(Block(width, True), Block(width, False))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit(seed: int = 0, width: int = 8) -> nn.Module:
    """One whose LayerNorms treat their channels as differently as those of trained networks do."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ViT(width)
        for module in network.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.data = torch.randn(width).mul(1.5).exp()
                module.bias.data = 2 * torch.randn(width)
    return network.eval()
