"""Chains: which layers may be equalized, and that scaling along them changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn, tensor
from torch.testing import assert_close

from zsq.nets.chains import Chain, equalizable_chains, make_equivariant, scale_channels
from zsq.nets.clip import ChannelClip
from zsq.nets.folding import fold_batchnorms, output_first
from zsq.nets.graph import blocks, capture
from zsq.zoo.networks import MobileNetV2, ResNet


class Apply(nn.Module):
    """A function of named layers as a network."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(self, x)


def conv(inputs: int = 4, outputs: int = 4, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def chains(network: nn.Module, *inputs: int):
    torch.manual_seed(0)
    graph = capture(network, torch.randn(2, *(inputs or (4, 8, 8))))
    fold_batchnorms(graph)
    return graph, equalizable_chains(graph)


def scale(graph, found: list[Chain], strength: float = 1.0) -> None:
    """Scales every link by factors of its own."""
    for link in (link for chain in found for link in chain.links):
        first, second = graph.get_submodule(link.first), graph.get_submodule(link.second)
        nodes = {node.name: node for node in graph.graph.nodes}
        clip = None if link.clip is None else graph.get_submodule(nodes[link.clip].target)
        scale_channels(first, second, clip, (strength * torch.randn(len(output_first(first, first.weight)))).exp())


def check(network: nn.Module, *inputs: int) -> list[tuple[str, ...]]:
    """The layers of the chains of ``network``, after scaling along them changed nothing."""
    graph, found = chains(network, *inputs)
    images = 3 * torch.randn(2, *(inputs or (4, 8, 8)))
    with torch.no_grad():
        before = graph(images)
        make_equivariant(graph)
        assert_close(graph(images), before, rtol=0, atol=0)
        found = equalizable_chains(graph)
        scale(graph, found)
        assert (graph(images) - before).abs().max() <= 1e-5 * before.abs().max()
    return [chain.layers for chain in found]


def test_scale_by_hand():
    # The first output is halved, the second doubled; the clip goes from 6 to 3 and 12.
    first, second, clip = nn.Linear(1, 2), nn.Linear(2, 1), ChannelClip(tensor([6.0, 6.0]))
    first.weight, first.bias = nn.Parameter(tensor([[8.0], [0.5]])), nn.Parameter(tensor([1.0, 2.0]))
    second.weight = nn.Parameter(tensor([[2.0, 2.0]]))
    scale_channels(first, second, clip, tensor([2.0, 0.5]))
    assert first.weight.tolist() == [[4.0], [1.0]]
    assert first.bias.tolist() == [0.5, 4.0]
    assert second.weight.tolist() == [[4.0, 1.0]]
    assert clip.limit.tolist() == [3.0, 12.0]


def test_a_channel_clip_is_relu6_with_a_limit_for_each_channel():
    x = 8 * torch.randn(2, 3, 4, 4)
    limit = tensor([1.0, 2.0, 6.0])
    assert_close(ChannelClip(limit)(x), torch.stack([x[:, c].clamp(0, float(limit[c])) for c in range(3)], 1))
    assert_close(ChannelClip(limit)(x[..., 0, 0]), ChannelClip(limit)(x)[..., 0, 0])
    assert_close(ChannelClip(torch.full((3,), 6.0))(x), F.relu6(x))


def test_a_basic_block_has_one_link():
    _, found = chains(ResNet(1, (4, 8), 10), 3, 8, 8)
    assert [chain.layers for chain in found] == [
        ("stages.0.0.conv1.0", "stages.0.0.conv2.0"),
        ("stages.1.0.conv1.0", "stages.1.0.conv2.0"),
    ]
    assert found[0].links[0].between == ("stages_0_0_relu1",)
    assert found[0].links[0].clip is None
    assert check(ResNet(1, (4, 8), 10), 3, 8, 8) == [chain.layers for chain in found]


def test_an_inverted_residual_is_a_chain_and_joins_with_its_neighbours():
    found = check(MobileNetV2(10), 3, 32, 32)
    assert found[0] == (
        *("stem.0", "blocks.0.body.0", "blocks.0.body.3"),
        *("blocks.1.body.0", "blocks.1.body.3", "blocks.1.body.6"),
    )
    assert found[1] == ("blocks.2.body.0", "blocks.2.body.3", "blocks.2.body.6")
    assert found[-1][-2:] == ("last.0", "head")


ROWS = {
    "relu": nn.ReLU(inplace=True),
    "leaky relu": nn.LeakyReLU(0.2),
    "prelu": nn.PReLU(4),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(0, 2),
    "nothing": nn.Identity(),
    "pad and pool": nn.Sequential(nn.ZeroPad2d(1), nn.AvgPool2d(2), nn.Dropout(0.1)),
    "F.relu": Apply(lambda self, x: F.relu(x, inplace=True)),
    "method": Apply(lambda self, x: x.relu()),
    "F.relu6": Apply(lambda self, x: F.relu6(x)),
    "clamp": Apply(lambda self, x: x.clamp(min=0, max=3)),
    "F.hardtanh": Apply(lambda self, x: F.hardtanh(x, 0.0, 3.0)),
    "F.pad": Apply(lambda self, x: F.pad(x, (1, 1))),
}


@pytest.mark.parametrize("between", ROWS.values(), ids=ROWS)
def test_what_scales_links_two_convolutions(between):
    assert check(nn.Sequential(conv(), between, conv())) == [("0", "2")]


BREAKS = {
    "sigmoid": nn.Sigmoid(),
    "hardswish": nn.Hardswish(),
    "max pool": nn.MaxPool2d(2),
    "two-sided clip": nn.Hardtanh(-1, 1),
    "two clips": nn.Sequential(nn.ReLU6(), nn.Hardtanh(0, 3)),
    "residual": Apply(lambda self, x: x + x.relu()),
    "two readers": Apply(lambda self, x: torch.cat([x[:, :2], x[:, 2:]], 1)),
    "batch norm": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
    "shifted padding": nn.ConstantPad2d(1, 0.5),
    "F.pad with a value": Apply(lambda self, x: F.pad(x, (1, 1), value=0.5)),
    "F.pad of channels": Apply(lambda self, x: F.pad(x, (0, 0, 0, 0, 1, -1))),
    "subclass": type("MyReLU", (nn.ReLU,), {"forward": lambda self, x: x.relu() + 1})(),
}


@pytest.mark.parametrize("between", BREAKS.values(), ids=BREAKS)
def test_what_does_not_scale_ends_a_chain(between):
    assert check(nn.Sequential(conv(), between, conv())) == []


def test_depthwise_layers_continue_a_chain_and_grouped_ones_do_not():
    layers = [conv(), conv(groups=4), nn.ReLU6(), conv(groups=4), conv(), nn.ReLU6(), conv(groups=2), nn.ReLU(), conv()]
    assert check(nn.Sequential(*layers)) == [("0", "1", "3", "4"), ("6", "8")]


def test_transposed_convolutions_scale():
    layers = [conv(), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, groups=1), nn.ReLU(), conv(6, 2)]
    assert check(nn.Sequential(*layers)) == [("0", "2", "4")]
    layers = [nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 6, 3, groups=6), conv(6, 2)]
    assert check(nn.Sequential(*layers)) == [("0", "2", "3")]


@pytest.mark.parametrize(
    "pool",
    [
        lambda self, x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        lambda self, x: x.mean([2, 3]),
        lambda self, x: torch.mean(x, dim=(-2, -1)),
        lambda self, x: F.avg_pool2d(x, 8).view(x.shape[0], -1),
        lambda self, x: torch.flatten(self.pool(x), 1),
    ],
)
def test_a_classifier_after_global_pooling_ends_a_chain(pool):
    network = nn.Sequential(conv(), nn.ReLU6(), Apply(pool, pool=nn.AdaptiveAvgPool2d(1)), nn.ReLU6(), nn.Linear(4, 3))
    assert check(network) == []  # two clips
    network[3] = nn.ReLU()
    assert check(network) == [("0", "4")]


def test_flattening_a_whole_image_ends_a_chain_before_it():
    layers = [conv(), nn.ReLU(), nn.Flatten(), nn.Linear(256, 6), nn.ReLU6(), nn.Dropout(), nn.Linear(6, 3)]
    assert check(nn.Sequential(*layers)) == [("3", "6")]


def test_linears_on_tokens_scale_by_feature():
    tokens = Apply(lambda self, x: x.flatten(2).transpose(1, 2))
    assert check(nn.Sequential(tokens, nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))) == [("1", "3")]
    # Dimension 1 of (N, T, D) is no channel, so there is no clip for each.
    assert check(nn.Sequential(tokens, nn.Linear(4, 6), nn.ReLU6(), nn.Linear(6, 3))) == []


def test_layers_with_shared_weights_are_left_out():
    def function(self, x):
        return self.last(self.twice(self.twice(self.first(x).relu()).relu()).relu())

    assert check(Apply(function, first=conv(), twice=conv(), last=conv())) == []


def test_one_activation_module_may_serve_several_links():
    def function(self, x):
        return self.act(self.c(self.act(self.b(self.act(self.a(x))))))

    network = Apply(function, a=conv(), b=conv(), c=conv(), act=nn.ReLU6())
    graph, found = chains(network)
    assert [link.clip for link in found[0].links] == ["act", "act_1"]
    make_equivariant(graph)
    kinds = {
        node.name: type(graph.get_submodule(node.target)) for node in graph.graph.nodes if node.op == "call_module"
    }
    assert (kinds["act"], kinds["act_1"], kinds["act_2"]) == (ChannelClip, ChannelClip, nn.ReLU6)
    assert len(blocks(graph)) == 3
    assert check(network) == [("a", "b", "c")]


def test_relu_instead_of_the_exact_clip():
    graph, _ = chains(nn.Sequential(conv(), nn.ReLU6(), conv(), nn.ReLU6()))
    images = 20 * torch.randn(2, 4, 8, 8)
    before = graph(images)
    make_equivariant(graph, exact=False)
    assert [type(module) for module in graph.children()] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU6]
    assert not torch.allclose(graph(images), before)
    assert equalizable_chains(graph)[0].links[0].clip is None


def test_a_network_that_already_has_channel_clips_keeps_its_chains():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), ChannelClip(torch.rand(4) + 1), nn.Conv2d(4, 2, 1)).eval()
    (chain,) = equalizable_chains(capture(network, torch.zeros(2, 3, 4, 4)))
    assert chain.layers == ("0", "2")
