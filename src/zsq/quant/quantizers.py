"""The modules that quantize: weights as a parametrization of their layer, activations as nodes on an edge."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from zsq.quant.grid import Affine, Grid, Range, RangeAverage, Scheme, affine
from zsq.quant.rounding import Constant, LearnedRounding, Rounding

__all__ = [
    "ActivationQuantizer",
    "WeightQuantizer",
    "activation_quantizers",
    "attach",
    "float_mode",
    "float_weight",
    "freeze",
    "mix",
    "quantize_weight",
    "random_mask",
    "refit",
    "weight_quantizer",
    "weight_quantizers",
]


class WeightQuantizer(nn.Module):
    """Fake-quantizes the weight of one layer; a parametrization, so that the layer keeps its class and its name.

    While it learns it computes from the float weight; once ``freeze`` has run it computes from integer ``codes``
    alone, as a network that was loaded from a file does.
    """

    zero_point: Tensor
    codes: Tensor | None

    def __init__(
        self,
        bits: int,
        low: int,
        high: int,
        scale: Tensor,
        zero_point: Tensor,
        rounding: nn.Module,
        codes: Tensor | None,
    ) -> None:
        """``scale`` and ``zero_point`` broadcast against the weight; the grid is ``low .. high``."""
        super().__init__()
        self.bits, self.low, self.high = bits, low, high
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("codes", codes)
        self.rounding = rounding
        self.enabled = True
        self.refit: Callable[[Tensor], Affine] | None = None
        """Finds the grid anew at each step of training, where it follows the weight."""
        self.again: Callable[[Tensor], WeightQuantizer] | None = None
        """Fits a quantizer to another weight of this layer, in the way in which this one was fitted."""

    @classmethod
    def fit(
        cls, weight: Tensor, bits: int, scheme: Scheme, span: Range, rounding: Rounding, axis: int, follow: bool = False
    ) -> "WeightQuantizer":
        """The quantizer of ``weight`` whose output channels lie on ``axis``; its grid may ``follow`` the weight."""

        def grid_of(weight: Tensor) -> Affine:
            rows = scheme.granularity.rows(weight, axis)
            grid = affine(*span.of(rows, bits, scheme, signed=True), bits, scheme)
            scale, zero_point = (scheme.granularity.spread(each, weight, axis).clone() for each in grid[:2])
            return Affine(scale, zero_point, grid.low, grid.high)

        grid = grid_of(weight)
        decided = rounding.build(weight / grid.scale, grid.low - grid.zero_point, grid.high - grid.zero_point)
        quantizer = cls(bits, grid.low, grid.high, grid.scale, grid.zero_point, decided, None)
        quantizer.refit = grid_of if follow else None
        quantizer.again = partial(
            cls.fit, bits=bits, scheme=scheme, span=span, rounding=rounding, axis=axis, follow=follow
        )
        return quantizer

    def integers(self, weight: Tensor) -> Tensor:
        """The grid points of ``weight``, within ``low .. high``."""
        rounded: Tensor = self.rounding(weight / self.scale)
        return (rounded + self.zero_point).clamp(self.low, self.high)

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` (O, I, *kernel) on its grid."""
        if not self.enabled:
            return weight
        if self.codes is not None:
            return (self.codes.to(self.scale.dtype) + self.low - self.zero_point) * self.scale
        if torch.is_grad_enabled() and weight.requires_grad:  # the weight itself learns
            with torch.no_grad():
                self.follow(weight)
                quantized = (self.integers(weight) - self.zero_point) * self.scale
            passed: Tensor = _StraightThrough.apply(weight, quantized)  # type: ignore[no-untyped-call]  # autograd's functions are
            return passed
        return (self.integers(weight) - self.zero_point) * self.scale

    def codes_at(self, weight: Tensor) -> Tensor:
        """The integers that ``weight`` would have, on a grid of its own if the grid follows; nothing changes."""
        if self.refit is None:
            return self.integers(weight)
        grid = self.refit(weight)
        return ((weight / grid.scale).round_() + grid.zero_point).clamp_(grid.low, grid.high)

    def follow(self, weight: Tensor) -> None:
        """Find the grid anew, if it follows the weight."""
        if self.refit is not None:
            grid = self.refit(weight)
            self.scale.copy_(grid.scale)
            self.zero_point.copy_(grid.zero_point)

    def freeze(self, weight: Tensor) -> None:
        """Decide the integers once and for all; ``codes`` are counted from the lower end of the grid."""
        if isinstance(self.rounding, LearnedRounding):
            self.rounding.hard = True
        with torch.no_grad():
            self.follow(weight)
            self.codes = (self.integers(weight) - self.low).to(torch.uint8)
        self.rounding, self.refit = Constant(torch.empty(0)), None  # the codes say it all
        self.scale.requires_grad_(False)


class ActivationQuantizer(nn.Module):
    """Fake-quantizes the value on one edge, once its range is known; until then the value passes.

    With a grid for each channel these are the last dimension, as behind a LayerNorm.
    """

    scale: nn.Parameter
    zero_point: Tensor

    def __init__(self, bits: int, scheme: Grid) -> None:
        super().__init__()
        self.bits, self.scheme = bits, scheme
        self.low, self.high = scheme.limits(bits, signed=False)
        self.resize(())
        self.enabled = True
        self.ready = False
        self.drop = 0.0
        """Probability with which an element stays float (QDrop); 0 outside reconstruction."""
        self.rng: torch.Generator | None = None
        self.clips_gradient = True
        """Whether a value beyond the range gets no gradient; otherwise all get it unchanged."""
        self.holds: tuple[float, float] | None = None
        """An interval that the range holds whatever is observed."""
        self._range: Range | None = None
        self._average: RangeAverage | None = None
        self._signed = False
        self._ends: tuple[Tensor, Tensor] | None = None
        self._seen = 0

    def resize(self, shape: tuple[int, ...]) -> None:
        """Make room for a scale of ``shape``: () for one, (C,) for one a channel."""
        device = self.scale.device if hasattr(self, "scale") else None
        self.scale = nn.Parameter(torch.ones(shape, device=device), requires_grad=False)
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32, device=device))

    def observe(self, span: Range | None, average: RangeAverage | None = None) -> None:
        """Find the range of whatever passes from now on by ``span``: of all, or a moving ``average``; None stops."""
        self._range, self._average = span, average
        if span is not None:
            self._ends, self._seen, self.ready = None, 0, False

    def range_state(self) -> dict[str, Any]:
        """What observing has found, for a checkpoint."""
        ends = () if self._ends is None else tuple(end.tolist() for end in self._ends)
        kept = {"scale": self.scale.detach().clone(), "zero_point": self.zero_point.clone(), "low": self.low}
        return {**kept, "ready": self.ready, "signed": self._signed, "seen": self._seen, "ends": list(ends)}

    def restore_range(self, state: dict[str, Any]) -> None:
        """Go on from what ``range_state`` said."""
        self._take(Affine(state["scale"], state["zero_point"], state["low"], state["low"] + 2**self.bits - 1))
        self.ready, self._signed, self._seen = state["ready"], state["signed"], state["seen"]
        if state["ends"]:
            low, high = (self.scale.new_tensor(end) for end in state["ends"])
            self._ends = low, high

    def set_range(self, low: Tensor, high: Tensor, signed: bool = True) -> None:
        """Represent ``low .. high``: scalars, or (C,) with a grid for each channel."""
        self.set_grid(self.scheme.over(low.reshape(-1), high.reshape(-1), self.bits, signed))

    def set_grid(self, grid: Affine) -> None:
        """Use ``grid`` from now on; a scale (1,) is one for all."""
        one = grid.scale.numel() == 1
        self._take(grid._replace(scale=grid.scale.reshape(()), zero_point=grid.zero_point.reshape(())) if one else grid)
        self.ready = True

    @property
    def grid(self) -> Affine:
        """The grid as it is now."""
        return Affine(self.scale, self.zero_point, self.low, self.high)

    def rounded(self, x: Tensor) -> Tensor:
        """``x`` of any shape on the grid, without a gradient."""
        with torch.no_grad():
            return self.scheme.nearest(x, self.grid)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape on the grid; an observed value also passes where the quantizer is not enabled."""
        if self._range is not None:
            self._widen(x.detach(), self._range)
        if not self.enabled or not self.ready:
            return x
        keep = None
        if self.drop:
            keep = random_mask(x, self.drop, self.rng)
        y = self.rounded(x)
        if torch.is_grad_enabled() and x.requires_grad and not (self.clips_gradient or self.scale.requires_grad):
            passed: Tensor = _StraightThrough.apply(x, y)  # type: ignore[no-untyped-call]  # autograd's functions are
            return passed
        if torch.is_grad_enabled() and (x.requires_grad or self.scale.requires_grad):
            scale = self.scale if self.scheme.learns else self.scale.detach()
            with torch.no_grad():
                ends = self.scheme.ends(self.grid)
            stepped: Tensor = _LearnedStep.apply(x, scale, y, *ends, keep)  # type: ignore[no-untyped-call]  # as above
            return stepped
        return y if keep is None else mix(x, y, keep)

    def _widen(self, x: Tensor, span: Range) -> None:
        rows = self.scheme.granularity.rows(x, -1)
        if self._ends is None:  # the first batch decides whether the grid is signed
            self._signed = bool(rows.min() < 0) or (self.holds is not None and self.holds[0] < 0)
        low, high = span.of(rows, self.bits, self.scheme, self._signed)
        if self.holds is not None:
            low, high = low.clamp(max=self.holds[0]), high.clamp(min=self.holds[1])
        self._seen += 1
        if self._average is not None:
            self._ends = self._average.update(self._ends, (low, high), self._seen)
            low, high = self._average.read(self._ends, self._seen)
        elif self._ends is not None:
            self._ends = low, high = torch.minimum(low, self._ends[0]), torch.maximum(high, self._ends[1])
        else:
            self._ends = low, high
        self.set_grid(self.scheme.suited(self.scheme.over(low, high, self.bits, self._signed), rows))

    def _take(self, grid: Affine) -> None:
        if self.scale.shape != grid.scale.shape:
            self.resize(tuple(grid.scale.shape))
        self.low, self.high = grid.low, grid.high
        with torch.no_grad():
            self.scale.copy_(grid.scale)
            self.zero_point.copy_(grid.zero_point)


class _StraightThrough(torch.autograd.Function):
    """A rounded value that hands its gradient on, unchanged and whole, to the value it was rounded from."""

    @staticmethod
    def forward(ctx, x: Tensor, rounded: Tensor) -> Tensor:  # type: ignore[no-untyped-def]  # autograd's signature is untyped
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]  # as above
        return grad, None


class _LearnedStep(torch.autograd.Function):
    """The rounded value ``y`` of ``x`` with the gradients of LSQ (Esser et al. 2020) without its gradient scale factor.

    d/dx is 1 inside the grid and 0 outside; d/ds is q(x)/s - x/s inside and q(x)/s outside. Kept elements pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, y: Tensor, low: Tensor, high: Tensor, keep: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]  # autograd's signature is untyped
        ctx.save_for_backward(x, y, scale, low, high, keep)
        return y.view_as(y) if keep is None else mix(x, y, keep)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]  # as above
        x, y, scale, low, high, keep = ctx.saved_tensors
        kept = None if keep is None else grad * keep
        rounded = grad if kept is None else grad - kept
        inside = rounded * ((x >= low) & (x <= high))
        by_scale = None
        if ctx.needs_input_grad[1]:
            by_scale = _sums(rounded, y, scale).sub_(_sums(inside, x, scale)) / scale
        return inside if kept is None else inside.add_(kept), by_scale, None, None, None, None


def _sums(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """The sum of ``a * b``, or one for each channel where ``like`` (C,) is."""
    return torch.vdot(a.flatten(), b.flatten()) if like.dim() == 0 else (a * b).sum_to_size(like.shape)


def random_mask(x: Tensor, share: float, rng: torch.Generator | None) -> Tensor:
    """Ones with probability ``share`` (to 1/256) and zeros, in the shape and type of ``x``, drawn on the CPU.

    From eight random bytes at a time: ``bernoulli_`` draws one number an element, which takes longer than a layer.
    """
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None, generator=rng)
    below = words.view(torch.uint8)[: x.numel()] < round(share * 256)
    return below.to(x.device).to(x.dtype).view(x.shape)


def mix(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """``a`` where ``mask`` is 1 and ``b`` where it is 0: on CPUs much faster than ``torch.where``."""
    return (a - b).mul_(mask).add_(b)


def quantize_weight(
    layer: nn.Module, bits: int, scheme: Scheme, span: Range, rounding: Rounding, follow: bool = False
) -> None:
    """Make ``layer`` compute with its weight fake-quantized, in place; the grid may ``follow`` the weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    axis = 1 if getattr(layer, "transposed", False) else 0  # a transposed convolution stores (I, O, *kernel)
    attach(layer, WeightQuantizer.fit(weight.detach(), bits, scheme, span, rounding, axis, follow))


def attach(layer: nn.Module, quantizer: WeightQuantizer) -> None:
    """Make ``quantizer`` compute the weight of ``layer``, in place."""
    layer.weight.requires_grad_(False)
    parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)


def weight_quantizer(layer: nn.Module) -> WeightQuantizer | None:
    """The quantizer of ``layer``'s weight, if it has one."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    quantizer = layer.parametrizations.weight[0]  # type: ignore[union-attr, index]  # a ModuleDict that is read by name
    return quantizer if isinstance(quantizer, WeightQuantizer) else None


def weight_quantizers(network: nn.Module) -> dict[str, tuple[nn.Module, WeightQuantizer]]:
    """The layers whose weights are quantized, with their quantizers, by dotted name."""
    found = ((name, layer, weight_quantizer(layer)) for name, layer in network.named_modules())
    return {name: (layer, quantizer) for name, layer, quantizer in found if quantizer is not None}


def activation_quantizers(network: nn.Module) -> dict[str, ActivationQuantizer]:
    """The activation quantizers by dotted name."""
    return {name: m for name, m in network.named_modules() if isinstance(m, ActivationQuantizer)}


def float_weight(layer: nn.Module) -> Tensor:
    """The weight of ``layer`` before quantization."""
    if weight_quantizer(layer) is None:
        weight = layer.weight
    else:
        weight = layer.get_parameter("parametrizations.weight.original")
    assert isinstance(weight, Tensor)
    return weight


def refit(layer: nn.Module) -> None:
    """Fit the quantizer of the weight of ``layer``, if it has one, to what that weight is now, in place."""
    quantizer = weight_quantizer(layer)
    if quantizer is not None:
        assert quantizer.again is not None
        home = layer.get_submodule("parametrizations.weight")
        assert isinstance(home, nn.ModuleList)
        home[0] = quantizer.again(float_weight(layer).detach())


@contextlib.contextmanager
def float_mode(network: nn.Module) -> Iterator[None]:
    """A context in which every quantizer of ``network`` lets its value pass: the network computes as its teacher."""
    quantizers = [m for m in network.modules() if isinstance(m, WeightQuantizer | ActivationQuantizer) and m.enabled]
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enabled = True


def freeze(network: nn.Module) -> None:
    """Decide every weight's integers, in place; the float weights become what the integers stand for."""
    for layer, quantizer in weight_quantizers(network).values():
        if quantizer.codes is None:
            original = float_weight(layer)
            quantizer.freeze(original)
            with torch.no_grad():
                original.copy_(quantizer(original))
