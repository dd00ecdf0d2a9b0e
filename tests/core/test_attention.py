"""Attention, recorded by the functions that compute it."""

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from zsq.core import Teacher, UnsupportedModel
from zsq.core.attention import AttentionRecorder, attend


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recorded(function, *args):
    with AttentionRecorder() as recorder:
        out = function(*args)
    return out, recorder.seen


def test_attention_by_hand():
    # one head of width 1: scores 0 and ln 3, so the token reads 1/4 of the value 4 and 3/4 of the value 8
    key, value = torch.tensor([[[[1.0], [3.0]]]]).log(), torch.tensor([[[[4.0], [8.0]]]])
    out, weights = attend(torch.ones(1, 1, 1, 1), key, value)
    assert_close(weights, torch.tensor([[[[0.25, 0.75]]]]))
    assert_close(out, torch.tensor([[[[7.0]]]]))


@pytest.mark.parametrize("masked", [None, "boolean", "added"])
def test_a_fused_kernel_is_taken_apart(masked):
    q, k, v = random(3, 2, 5, 5, 4)
    mask = {None: None, "boolean": torch.ones(5, 5, dtype=torch.bool).tril(), "added": random(5, 5)}[masked]
    out, seen = recorded(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3))
    assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3))
    assert_close(seen[0].probabilities @ v, out)
    assert_close(seen[0].output, out)
    assert_close(seen[0].probabilities.sum(-1), torch.ones(2, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize("more", [{"is_causal": True}, {"enable_gqa": True}])
def test_a_kernel_that_does_more_is_left_whole(more):
    q, k, v = random(3, 2, 4, 5, 4)
    out, seen = recorded(lambda: F.scaled_dot_product_attention(q, k, v, **more))
    assert_close(out, F.scaled_dot_product_attention(q, k, v, **more))
    assert seen == []


WAYS = {
    "@": lambda scores, v: scores.softmax(-1) @ v,
    "matmul": lambda scores, v: torch.matmul(torch.softmax(scores, dim=-1), v),
    "module and dropout": lambda scores, v: nn.Dropout(0.5).eval()(nn.Softmax(dim=3)(scores)) @ v,
    "function and dropout": lambda scores, v: F.dropout(F.softmax(scores, dim=-1), 0.5, False).matmul(v),
    "einsum": lambda scores, v: torch.einsum("nhts,nhsd->nhtd", scores.softmax(3), v),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_softmax_that_is_the_left_operand_of_a_product_is_attention(way):
    scores, v = random(2, 3, 5, 5), random(2, 3, 5, 4)
    out, seen = recorded(WAYS[way], scores, v)
    assert len(seen) == 1
    assert_close(out, scores.softmax(-1) @ v)
    assert torch.equal(seen[0].output, out)
    assert_close(seen[0].probabilities, scores.softmax(-1))


OTHERS = {
    "over another dimension": lambda scores, v: scores.softmax(1) @ v,
    "the right operand": lambda scores, v: v.transpose(2, 3) @ scores.softmax(-1),
    "changed before": lambda scores, v: (2 * scores.softmax(-1)) @ v,
    "of the classes": lambda scores, v: scores.softmax(-1),
}


@pytest.mark.parametrize("way", OTHERS)
def test_another_softmax_is_none(way):
    assert recorded(OTHERS[way], random(2, 3, 5, 5), random(2, 3, 5, 4))[1] == []


@pytest.mark.parametrize(("shape", "seen_as"), [((4, 5, 5), (4, 1, 5, 5)), ((2, 4, 3, 5, 5), (8, 3, 5, 5))])
def test_heads_come_second_and_windows_with_the_images(shape, seen_as):
    _, seen = recorded(WAYS["@"], random(*shape), random(*shape))
    assert seen[0].probabilities.shape == seen[0].output.shape == seen_as


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multi_head_attention_of_torch_is_seen_on_its_fast_path_too(batch_first, need_weights):
    layer = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=batch_first).double().eval()
    nn.init.normal_(layer.in_proj_bias)
    x = random(3, 5, 8)
    with torch.no_grad():
        wanted = layer(x, x, x, need_weights=need_weights, average_attn_weights=False)
        (out, weights), seen = recorded(lambda: layer(x, x, x, need_weights=need_weights, average_attn_weights=False))
    assert_close(out, wanted[0])
    assert len(seen) == 1
    images = 3 if batch_first else 5
    assert seen[0].output.shape == (images, 2, 8 - images, 4)
    if need_weights:
        assert_close(weights, wanted[1])
        assert_close(seen[0].probabilities, wanted[1])
    else:
        assert weights is None


def test_a_transformer_layer_of_torch_is_seen():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()
    x = random(3, 5, 8)
    with torch.no_grad():
        out, seen = recorded(layer, x)
        assert_close(out, layer(x))
    assert len(seen) == 1


def test_masked_or_crossed_multi_head_attention_is_left_whole():
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).double().eval(), random(3, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    out, seen = recorded(lambda: layer(x, x, x, attn_mask=mask)[0])
    assert seen == []
    assert_close(out, layer(x, x, x, attn_mask=mask)[0])
    assert recorded(lambda: layer(x, random(3, 5, 8, seed=1), x)[0])[1] == []


@pytest.mark.parametrize("network", [tiny.vit, tiny.unfused_vit])
def test_a_view_shows_the_attention_of_a_network_and_changes_nothing(network, photos, job_for):
    job = job_for(network())
    images = photos.clone().requires_grad_()
    view = job.teacher.view(images, frozenset({"attention"}))
    assert_close(view.logits, job.teacher.view(photos).logits, atol=1e-5, rtol=0)
    assert [layer.output.shape for layer in view.attention] == [(16, 2, 17, 4)] * 2
    assert all(layer.prefix == 1 for layer in view.attention)
    view.attention[1].output.square().sum().backward()
    assert images.grad.abs().sum() > 0


def test_attention_that_cannot_be_seen_is_refused(cnn, photos):
    with pytest.raises(UnsupportedModel, match="no softmax of torch was the left operand of a product"):
        Teacher(cnn).view(photos, frozenset({"attention"}))
