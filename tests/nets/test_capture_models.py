"""Capture, blocks and folding on the networks that people have, with random weights."""

import copy
import warnings

import pytest
import torch
from torch import fx, nn
from torch.testing import assert_close

from zsq.compat import import_timm, import_torchvision
from zsq.core import Bits, Job, MissingExtra, Run, Source, Teacher, look
from zsq.methods.nearest import NEAREST
from zsq.nets.chains import equalizable_chains, make_equivariant, scale_channels
from zsq.nets.folding import fold_batchnorms, output_first
from zsq.nets.graph import blocks, capture, extract, hidden_layers, layers, matmuls, module_of
from zsq.quant import REPQ_VIT_PASSES
from zsq.quant.placement import float_tensors, made_by, moves_values
from zsq.quant.quantizers import ActivationQuantizer, activation_quantizers, float_mode, weight_quantizers
from zsq.synthesis import Noise

NETWORKS = {
    "torchvision:resnet18": 64,
    "torchvision:resnet50": 64,
    "torchvision:mobilenet_v2": 64,
    "torchvision:mobilenet_v3_small": 64,
    "torchvision:mnasnet0_5": 64,
    "torchvision:googlenet": 64,
    "torchvision:inception_v3": 75,
    "torchvision:regnet_x_400mf": 64,
    "torchvision:efficientnet_b0": 64,
    "torchvision:densenet121": 64,
    "torchvision:squeezenet1_1": 64,
    "torchvision:shufflenet_v2_x0_5": 64,
    "torchvision:vgg11_bn": 32,
    "torchvision:convnext_tiny": 64,
    "torchvision:swin_t": 64,
    "torchvision:vit_b_16": 64,
    "timm:deit_tiny_patch16_224": 224,
    "timm:swin_tiny_patch4_window7_224": 224,
    "timm:pvt_v2_b0": 64,
    "timm:efficientnet_b0": 64,
    "timm:efficientvit_b0": 64,
}
"""Name and image size in pixels."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small layers lose more by sharing them among threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(name: str) -> nn.Module:
    library, _, name = name.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torchvision was built for another torch
        try:
            package = import_torchvision() if library == "torchvision" else import_timm()
        except MissingExtra as error:
            pytest.skip(str(error))
    torch.manual_seed(0)
    if library == "timm":
        return package.create_model(name)
    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name == "vit_b_16":
        more = {"image_size": 64, "patch_size": 16, "hidden_dim": 24, "mlp_dim": 48, "num_layers": 2, "num_heads": 3}
        model = package.models.VisionTransformer(**more)
        nn.init.normal_(model.heads.head.weight)
        return model
    return package.models.get_model(name, weights=None, **more)


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    """A network in eval mode with random BN statistics, its graph, and three images."""
    model, size = network(request.param).eval(), NETWORKS[request.param]
    for bn in model.modules():
        if isinstance(bn, nn.modules.batchnorm._BatchNorm):
            bn.running_mean.normal_(0, 0.1)
            bn.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias, 0, 0.1)
    return request.param, model, capture(model, torch.randn(2, 3, size, size)), torch.randn(3, 3, size, size)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest of ``expected``."""
    assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_the_graph_computes_what_the_network_does(case):
    name, model, graph, images = case
    for batch in (images[:1], images, torch.cat([images, images[:2]])):
        assert_same(graph(batch), model(batch))
    # torch's attention projects with a bare weight, which the graph shows as one more linear
    kinds = nn.Conv2d | nn.Linear | nn.MultiheadAttention
    count = sum(isinstance(module, kinds) for module in model.modules())
    aside = {"torchvision:inception_v3": 3, "torchvision:googlenet": 6}.get(name, 0)  # in the auxiliary classifiers
    assert len({node.target for node in layers(graph)}) + len(hidden_layers(graph)) == count - aside


@torch.no_grad()
def test_the_blocks_make_up_the_whole(case):
    _, _, graph, images = case
    value = images
    for block in blocks(graph):
        value = extract(graph, block)(value)
    assert_close(value, graph(images), rtol=0, atol=0)


@torch.no_grad()
def test_folding_and_scaling_change_nothing(case):
    _, _, graph, images = case
    expected, folded = graph(images), copy.deepcopy(graph)
    moments = fold_batchnorms(folded)
    assert set(moments) <= {node.target for node in layers(folded)}
    assert_same(folded(images), expected)
    make_equivariant(folded)
    assert_same(folded(images), expected)
    nodes = {node.name: node for node in folded.graph.nodes}
    for link in (link for chain in equalizable_chains(folded) for link in chain.links):
        first, second = folded.get_submodule(link.first), folded.get_submodule(link.second)
        clip = None if link.clip is None else folded.get_submodule(nodes[link.clip].target)
        scale_channels(first, second, clip, (0.5 * torch.randn(len(output_first(first, first.weight)))).exp())
    assert_same(folded(images), expected)


def test_w8a8_nearest_runs_forward_and_backward(case):
    name, model, graph, images = case
    run, student = Run(device="cpu"), copy.deepcopy(graph)
    job = Job(Teacher(model), student, Bits(8, 8), run, tuple(images.shape[1:]))
    source = Source(Noise(samples=2), job)
    for step in NEAREST.quantizer:
        step.apply(job, source)
    with torch.no_grad(), float_mode(student):
        assert_same(student(images), model(images))
    x = images[:1].clone().requires_grad_()
    student(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0
    called = {str(node.target) for node in layers(student)} | set(hidden_layers(student))
    assert set(weight_quantizers(student)) == called
    reported = float_tensors(student)
    for node in layers(student):
        sources = [each for each in node.all_input_nodes if each.op != "get_attr"]
        quantized = any("activation_quantizers" in str(each.target) for each in upstream(sources))
        assert quantized or any(line.startswith(f"{node.target} <- ") for line in reported), (name, node.target)


def upstream(nodes: list[fx.Node]) -> list[fx.Node]:
    """``nodes`` and everything before them that only moves values."""
    return [*nodes, *(each for node in nodes if moves_values(node) for each in upstream(node.all_input_nodes[:1]))]


BLOCKS = {
    "torchvision:resnet18": [
        "conv1",
        *(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)),
        "fc",
    ],
    "torchvision:mobilenet_v2": [
        "features.0.0",
        *(f"features.{index}" for index in range(1, 18)),
        "features.18.0",
        "classifier.1",
    ],
    "torchvision:vgg11_bn": [
        *(f"features.{index}" for index in (0, 4, 8, 11, 15, 18, 22, 25)),
        *("classifier.0", "classifier.3", "classifier.6"),
    ],
    "torchvision:densenet121": [
        *("features.conv0", "features.denseblock1", "features.transition1.conv"),
        *("features.denseblock2", "features.transition2.conv", "features.denseblock3"),
        *("features.transition3.conv", "features.denseblock4", "classifier"),
    ],
    "timm:deit_tiny_patch16_224": ["patch_embed.proj", *(f"blocks.{index}" for index in range(12)), "head"],
    "timm:pvt_v2_b0": [
        name
        for stage, down in enumerate(("patch_embed.proj", *(f"stages.{stage}.downsample.proj" for stage in (1, 2, 3))))
        for name in (down, f"stages.{stage}.blocks.0", f"stages.{stage}.blocks.1")
    ]
    + ["head"],
}


def test_blocks_are_the_units_of_the_architecture(case):
    name, _, graph, _ = case
    found = [block.name for block in blocks(graph)]
    assert found == BLOCKS.get(name, found)


PRODUCTS = {
    "torchvision:vit_b_16": 4,
    "timm:deit_tiny_patch16_224": 24,
    "timm:swin_tiny_patch4_window7_224": 24,
    "torchvision:swin_t": 24,
    "timm:pvt_v2_b0": 16,
}


def test_the_two_products_of_each_attention_are_visible(case):
    name, _, graph, _ = case
    assert len(matmuls(graph)) == PRODUCTS.get(name, 0)


TOKENS = {
    "timm:deit_tiny_patch16_224": ("norm_pre", 1, (14, 14)),
    "torchvision:vit_b_16": ("encoder.dropout", 1, (4, 4)),
}


@torch.no_grad()
def test_attention_is_visible_in_the_network_as_in_its_graph(case):
    name, model, graph, images = case
    marks = graph.meta["landmarks"]
    assert marks.attention == PRODUCTS.get(name, 0) / 2
    assert (marks.tokens, marks.prefix, marks.grid) == TOKENS.get(name, ("", 0, marks.grid))
    teacher = Teacher(model, marks)
    if not marks.attention:
        assert not teacher.offers & {"attention", "tokens"}
        return
    view = teacher.view(images, frozenset({"attention"}))
    assert_same(view.logits, model(images))
    assert len(view.attention) == marks.attention
    for layer in view.attention:
        assert_close(layer.probabilities.sum(-1), torch.ones(layer.probabilities.shape[:-1]))
        assert len(layer.output) % len(images) == 0
    if marks.tokens:
        count = marks.prefix + marks.grid[0] * marks.grid[1]
        kept = [torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(count - 1)[:5]]) for _ in images]
        found, _ = look(graph, images, frozenset(), marks, torch.stack(kept))
        assert_same(found, teacher.view(images, tokens=torch.stack(kept)).logits)
        assert not torch.allclose(found, model(images), atol=1e-3)


def test_what_cannot_be_traced_is_named_with_a_reason(case):
    name, _, graph, _ = case
    attention = [f"stages.{s}.blocks.{b}.context_module.main" for s in (2, 3) for b in (1, 2)]
    assert list(graph.meta["untraced"]) == (attention if name == "timm:efficientvit_b0" else [])
    assert all(graph.meta["untraced"].values())
    assert all(f"{module}.qkv.conv" in hidden_layers(graph) for module in graph.meta["untraced"])


@pytest.mark.parametrize("case", [name for name in NETWORKS if "deit" in name or "swin_tiny" in name], indirect=True)
def test_repq_w4a4_runs_on_transformers(case):
    name, model, graph, images = case
    student = copy.deepcopy(graph)
    job = Job(Teacher(model), student, Bits(4, 4), Run(device="cpu"), tuple(images.shape[1:]))
    source = Source(Noise(samples=2), job)
    insert, calibrate, merge = REPQ_VIT_PASSES
    insert.apply(job, source)
    calibrate.apply(job, source)
    channels = [q for q in activation_quantizers(student).values() if q.scale.dim() == 1]
    merge.apply(job, source)
    blocks_of = {"timm:deit_tiny_patch16_224": 24, "timm:swin_tiny_patch4_window7_224": 27}  # 3 reductions
    assert len(channels) == blocks_of[name]
    assert all(q.scale.dim() == 0 for q in channels)
    with torch.no_grad():
        assert student(images).isfinite().all()
        with float_mode(student):
            assert (student(images) - model(images)).abs().max() < 1e-4
    for product in matmuls(student):  # every operand of attention has a quantizer
        for operand in (product.left, product.right):
            assert isinstance(module_of(made_by(operand)), ActivationQuantizer)
    assert not any(line.startswith("matmul") for line in float_tensors(student))
