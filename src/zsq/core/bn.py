"""What enters a BatchNorm layer, and its sums over positions, for little more than the layer itself costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["BNInput", "BNRecorder", "channel_sums"]


@dataclass(frozen=True)
class BNInput:
    """What entered one BatchNorm layer: ``x`` (N, C, ...), and the layer's running ``mean`` and ``var`` (C,)."""

    x: Tensor
    mean: Tensor
    var: Tensor
    known_sums: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """For each image and channel (N, C), the sum of ``x`` and of its squares over positions."""
        return channel_sums(self.x) if self.known_sums is None else self.known_sums


def channel_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """For ``x`` (N, C, ...), the sums of its entries and of their squares over all but the first two dimensions.

    On CPUs a sum and a norm are twenty times faster than ``torch.var_mean``.
    """
    total, squares = _Sums.apply(x)  # type: ignore[no-untyped-call]  # autograd's functions are
    return total, squares


class BNRecorder(TorchFunctionMode):
    """A context in which each ``batch_norm`` in eval mode also says what entered it, in the order in which they ran.

    It sees the function, not the module, so that nothing is hooked and subclasses with an activation of their own
    count too. Where the affine parameters are frozen, normalization and sums are one function with one backward:
    torch's backward of BatchNorm alone takes as long on a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[BNInput] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """``func`` as it is, or the recorded normalization."""
        if func is F.batch_norm:
            return self._normalize(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _normalize(
        self,
        input: Tensor,  # torch's own name for it
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        y: Tensor
        if training or running_mean is None or running_var is None:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if any(each is not None and each.requires_grad for each in (weight, bias)):
            y = F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
            self.seen.append(BNInput(input, running_mean, running_var))
            return y
        y, *sums = _NormalizeAndSum.apply(input, running_mean, running_var, weight, bias, eps)  # type: ignore[no-untyped-call]  # autograd's functions are
        self.seen.append(BNInput(input, running_mean, running_var, (sums[0], sums[1])))
        return y


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(x.dtype, torch.float32)  # a sum of thousands of bfloat16 has no digits left
    if x.dim() == 2:
        return x.to(precise, copy=True), x.to(precise).square()
    positions = tuple(range(2, x.dim()))
    return x.sum(positions, dtype=precise), torch.linalg.vector_norm(x, dim=positions, dtype=precise).square()


def _spread(rows: Tensor, x: Tensor) -> Tensor:
    """Rows (N, C) or (C,) in a shape that broadcasts against ``x`` (N, C, ...)."""
    return rows.reshape(*(rows.shape if rows.dim() == 2 else (1, -1)), *[1] * (x.dim() - 2))


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]  # autograd's signature is untyped
        ctx.save_for_backward(x)
        return _sums(x)

    @staticmethod
    def backward(ctx, by_total: Tensor, by_squares: Tensor):  # type: ignore[no-untyped-def]  # as above
        (x,) = ctx.saved_tensors
        return torch.addcmul(_spread(by_total, x), x, _spread(2 * by_squares, x))


class _NormalizeAndSum(torch.autograd.Function):
    """Eval-mode BatchNorm with frozen parameters, and the sums of its input."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]  # autograd's signature is untyped
        ctx, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        slope = (var + eps).rsqrt() * (1 if weight is None else weight)  # dy / dx, (C,)
        ctx.save_for_backward(x, slope)
        ctx.set_materialize_grads(False)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), *_sums(x)

    @staticmethod
    def backward(ctx, by_y: Tensor | None, by_total: Tensor | None, by_squares: Tensor | None):  # type: ignore[no-untyped-def]  # as above
        x, slope = ctx.saved_tensors
        none = (None,) * 5
        if by_total is None and by_squares is None:
            return None if by_y is None else by_y * _spread(slope, x), *none
        offset = x.new_zeros(()) if by_total is None else _spread(by_total, x)
        by_x = (
            offset + torch.zeros_like(x) if by_squares is None else torch.addcmul(offset, x, _spread(2 * by_squares, x))
        )
        return by_x if by_y is None else by_x.addcmul_(by_y, _spread(slope, x)), *none
