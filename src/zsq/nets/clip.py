"""The one layer of our own: ReLU6 after its channels were scaled."""

import torch
from torch import Tensor, nn

__all__ = ["ChannelClip"]


class ChannelClip(nn.Module):
    """ReLU6 with a limit of its own for each channel: (N, C, ...) clipped to [0, limit_c].

    >>> ChannelClip(torch.tensor([6.0, 3.0]))(torch.tensor([[-1.0, 5.0]])).tolist()
    [[0.0, 3.0]]
    """

    limit: Tensor
    """(C,)."""

    def __init__(self, limit: Tensor) -> None:
        super().__init__()
        self.register_buffer("limit", limit)

    def forward(self, x: Tensor) -> Tensor:
        """``x``, clipped."""
        return torch.minimum(x.clamp(min=0), self.limit.reshape(-1, *[1] * (x.dim() - 2)))
