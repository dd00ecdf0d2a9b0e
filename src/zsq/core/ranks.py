"""The processes that share one quantization, as torch.distributed knows them; without a process group there is one."""

import io
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.serialization import default_restore_location

__all__ = ["average", "gathered", "position"]

T = TypeVar("T")


def position() -> tuple[int, int]:
    """The rank of this process, and the number of ranks."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gathered(value: T, device: torch.device) -> list[T]:
    """The ``value`` of each rank, in their order; those of its tensors on an accelerator come to ``device``."""
    world = position()[1]
    if world == 1:
        return [value]
    buffer = io.BytesIO()
    torch.save(value, buffer)
    parts = [b""] * world
    distributed.all_gather_object(parts, buffer.getvalue())

    def placed(storage: Any, origin: str) -> Any:
        return storage if origin == "cpu" else default_restore_location(storage, str(device))

    # not weights_only: an error can be among the values, and the other ranks are this very program
    return [torch.load(io.BytesIO(part), map_location=placed, weights_only=False) for part in parts]


def average(tensors: Sequence[Tensor]) -> None:
    """Replace ``tensors`` of one type by their means over the ranks, in place."""
    world = position()[1]
    if world == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    means = (flat / world).split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean.view_as(tensor))
