"""What attention computes, seen by its functions: probabilities, and what they gather from the values."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["Attention", "AttentionRecorder", "attend"]


@dataclass(frozen=True)
class Attention:
    """One product of attention. N' counts images, or windows, those of one image side by side."""

    probabilities: Tensor
    """softmax(q k^T / sqrt(d)), (N', heads, T, S): how much each of T tokens reads of each of S."""
    output: Tensor
    """``probabilities @ v``, (N', heads, T, d), before heads are joined."""
    prefix: int = 0
    """How many of the first tokens are no patches: the class token."""


def attend(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,  # the order of F.scaled_dot_product_attention, which does not drop in eval mode
    is_causal: bool = False,
    scale: Any = None,
) -> tuple[Any, Any]:
    """softmax(q k^T / sqrt(d)) v as separate products, (N, heads, T, d), and the softmax (N, heads, T, S)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(int(query.shape[-2]), int(key.shape[-2]), dtype=torch.bool).tril()
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(attn_mask.logical_not(), float("-inf")) if boolean else scores + attn_mask
    weights = torch.softmax(scores, -1)
    return weights @ value, weights


_SOFTMAXES = {torch.softmax, torch.Tensor.softmax, F.softmax}
_PRODUCTS = {torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.bmm}
_HEADS_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


class AttentionRecorder(TorchFunctionMode):
    """A context in which attention without dropout also says what it computes, in the order in which it runs.

    It sees functions, not classes: a fused kernel, which is taken apart; torch's multi-head attention of a value with
    itself; and a softmax over the last dimension whose result is the left operand of a product, maybe after dropout.
    """

    def __init__(self, prefix: int = 0) -> None:
        """``prefix`` is how many of the first tokens are no patches."""
        super().__init__()
        self.seen: list[Attention] = []
        self._prefix = prefix
        self._softmax: Tensor | None = None  # the last one, until a product reads it

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """``func`` as it is, with attention recorded."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not _drops(*args, **kwargs):
            return self._record(*attend(*args, **{name: kwargs[name] for name in kwargs.keys() - {"enable_gqa"}}))
        if func is F.multi_head_attention_forward:
            given = _HEADS_SIGNATURE.bind(*args, **kwargs)
            given.apply_defaults()
            if _plain(given.arguments):
                return self._multi_head(given.arguments)
        out = func(*args, **kwargs)
        if func in _SOFTMAXES and kwargs.get("dim", args[1] if len(args) > 1 else None) in (-1, out.dim() - 1):
            self._softmax = out
        elif func in _PRODUCTS or func is torch.einsum:
            left = args[1] if func is torch.einsum else args[0]  # dropout hands on the very same tensor
            if self._softmax is not None and left is self._softmax and left.shape[:-1] == out.shape[:-1]:
                self._record(out, left)
        return out

    def _record(self, output: Tensor, probabilities: Tensor) -> Tensor:
        self._softmax = None
        if output.dim() > 2:
            self.seen.append(Attention(_by_head(probabilities), _by_head(output), self._prefix))
        return output

    def _multi_head(self, given: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Self-attention of ``query`` (T, N, D), as torch's function returns it."""
        heads: int = given["num_heads"]
        qkv = F.linear(given["query"], given["in_proj_weight"], given["in_proj_bias"])
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 1, 3, 0, 4)  # (N, heads, T, d) each
        values, weights = attend(q, k, v)
        self._record(values, weights)
        out = F.linear(values.permute(2, 0, 1, 3).flatten(2), given["out_proj_weight"], given["out_proj_bias"])
        shown = weights.mean(1) if given["average_attn_weights"] else weights
        return out, shown if given["need_weights"] else None


def _by_head(x: Tensor) -> Tensor:
    """``x`` (N, T, D), (N', heads, T, D) or with more dimensions before, as (N', heads, T, D)."""
    return x.unsqueeze(1) if x.dim() == 3 else x.flatten(0, -4)


def _drops(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> bool:
    """Whether this call of fused attention does more than a softmax of products."""
    given = dict(zip(("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"), rest, strict=False)) | more
    return bool(given.get("dropout_p") or given.get("is_causal") or given.get("enable_gqa"))


def _plain(given: Mapping[str, Any]) -> bool:
    """Whether this is a call of unmasked self-attention on (T, N, D) that drops nothing."""
    query = given["query"]
    alone = query is given["key"] is given["value"] and query.dim() == 3 and given["in_proj_weight"] is not None
    odd = ("bias_k", "key_padding_mask", "attn_mask", "static_k", "static_v")
    drops = given["training"] and given["dropout_p"]
    return bool(alone and not drops and not given["add_zero_attn"] and all(given[name] is None for name in odd))
