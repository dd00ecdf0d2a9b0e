"""Blocks: where networks are divided, and that the parts make up the whole."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from zsq.core.errors import UnsupportedModel
from zsq.nets.blocks import constants
from zsq.nets.folding import fold_batchnorms
from zsq.nets.graph import blocks, capture, extract, layers, module_of
from zsq.zoo.networks import MobileNetV2, ResNet


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(self, x)


def conv(inputs: int = 4, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1)


def check(graph, images: torch.Tensor) -> list[str]:
    """The names of the blocks of ``graph``, after checks that they divide it and make up the whole."""
    found = blocks(graph)
    nodes = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    held = [node for block in found for node in block.nodes]
    assert sorted(held, key=nodes.index) == nodes
    assert [block.entry for block in found[1:]] == [block.exit for block in found[:-1]]
    assert found[0].entry.op == "placeholder"
    with torch.no_grad():
        value = images
        for block in found:
            value = extract(graph, block)(value)
        assert_close(value, graph(images), rtol=0, atol=0)
    return [block.name for block in found]


def names(network: nn.Module, inputs: tuple[int, ...] = (4, 8, 8)) -> list[str]:
    torch.manual_seed(0)
    return check(capture(network, torch.randn(2, *inputs)), torch.randn(3, *inputs))


def test_resnet20_is_stem_nine_blocks_and_head():
    expected = ["stem.0", *(f"stages.{stage}.{block}" for stage in range(3) for block in range(3)), "head"]
    assert names(ResNet(3, (16, 32, 64), 10), (3, 16, 16)) == expected


def test_the_sum_of_a_residual_block_is_in_it_and_pooling_is_after_it():
    found = {block.name: block for block in blocks(capture(ResNet(1, (4, 8), 10), torch.randn(1, 3, 8, 8)))}
    assert found["stages.1.0"].exit.target == "stages.1.0.relu2"
    assert "add_1" in [node.name for node in found["stages.1.0"].nodes]
    assert [str(node.target) for node in found["head"].nodes] == ["pool", "flatten", "head"]


def test_each_inverted_residual_is_a_block():
    count = sum(stage[2] for stage in MobileNetV2.stages)
    assert names(MobileNetV2(10), (3, 32, 32)) == [
        "stem.0",
        *(f"blocks.{index}" for index in range(count)),
        "last.0",
        "head",
    ]


def test_a_plain_row_of_layers_goes_layer_by_layer():
    features = [layer for _ in range(3) for layer in (conv(), nn.BatchNorm2d(4), nn.ReLU())]
    network = nn.Sequential(*features, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 5))
    graph = capture(network, torch.randn(1, 4, 8, 8))
    assert [(block.name, block.exit.target) for block in blocks(graph)] == [
        *[("0", "2"), ("3", "5"), ("6", "10"), ("11", "11")]
    ]


def test_a_long_module_that_can_be_cut_goes_layer_by_layer():
    chain = Apply(lambda self, x: self.layers(x), layers=nn.Sequential(*[conv() for _ in range(9)]))
    assert names(nn.Sequential(chain)) == [f"0.layers.{index}" for index in range(9)]
    chain.layers = chain.layers[:8]
    assert names(nn.Sequential(chain)) == ["0"]


def test_a_long_module_that_cannot_be_cut_is_one_block():
    class Dense(nn.ModuleDict):
        def forward(self, x):
            values = [x]
            for layer in self.values():
                values.append(layer(torch.cat(values, 1)))
            return torch.cat(values, 1)

    dense = Dense({f"layer{index}": conv(4 + 2 * index, 2) for index in range(9)})
    assert names(nn.Sequential(conv(), dense, conv(22, 4))) == ["0", "1", "2"]


def test_a_stage_gives_way_to_its_blocks():
    def block():
        return Apply(lambda self, x: x + self.b(self.a(x).relu()), a=conv(), b=conv())

    def stage(*blocks):
        return Apply(lambda self, x: self.blocks(x), blocks=nn.Sequential(*blocks))

    assert names(nn.Sequential(stage(block(), block()), stage(block()))) == ["0.blocks.0", "0.blocks.1", "1.blocks.0"]


def test_a_gate_inside_a_block_is_no_block():
    def gated(self, x):
        return self.last(self.gate(self.first(x).relu()))

    gate = Apply(lambda self, x: x * self.b(self.a(x.mean((2, 3), True)).relu()).sigmoid(), a=conv(), b=conv())
    assert names(nn.Sequential(conv(), Apply(gated, first=conv(), gate=gate, last=conv()))) == ["0", "1"]


def test_a_sum_outside_of_modules_keeps_its_layers_together():
    network = Apply(lambda self, x: self.c(x + self.b(self.a(x).relu())), a=conv(), b=conv(), c=conv())
    assert names(network) == ["a", "c"]


def test_a_size_that_is_read_later_does_not_tie_blocks_together():
    def function(self, x):
        count, channels, height, width = x.shape
        y = self.b(self.a(x))
        return self.c(y.reshape(count, channels, height * width).view(count, channels, height, width))

    assert names(Apply(function, a=conv(), b=conv(), c=conv())) == ["a", "b", "c"]


def test_a_module_that_runs_twice_is_two_blocks():
    pair = Apply(lambda self, x: x + self.b(self.a(x).relu()), a=conv(), b=conv())
    network = Apply(lambda self, x: self.pair(self.other(self.pair(x))), pair=pair, other=conv())
    assert names(network) == ["pair", "other", "pair@2"]


def test_an_untraced_module_is_a_block():
    odd = Apply(lambda self, x: self.b(self.a(x)) if x.sum() > 0 else x, a=conv(), b=conv())
    graph = capture(nn.Sequential(conv(), odd, conv()), torch.randn(1, 4, 8, 8))
    assert check(graph, torch.randn(2, 4, 8, 8)) == ["0", "1", "2"]
    assert list(extract(graph, "1").meta["untraced"]) == ["1"]


def test_a_network_without_layers_is_one_block():
    assert names(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2))) == ["network"]


def test_a_parameter_that_two_blocks_read_is_in_both():
    def function(self, x):
        shift = self.shift.exp()
        return self.b((self.a(x) + shift).relu()) * shift

    network = Apply(function, a=conv(), b=conv())
    network.shift = nn.Parameter(torch.randn(4, 1, 1))
    graph = capture(network, torch.randn(1, 4, 8, 8))
    assert [node.target for node in graph.graph.nodes if node in constants(graph.graph)] == ["shift", "exp"]
    assert check(graph, torch.randn(2, 4, 8, 8)) == ["a", "b"]
    assert extract(graph, "b").shift is graph.shift


def test_a_block_shares_its_modules():
    graph = capture(ResNet(1, (4, 8), 10), torch.randn(1, 3, 8, 8))
    part = extract(graph, "stages.0.0")
    assert part.get_submodule("stages.0.0.conv1.0") is graph.get_submodule("stages.0.0.conv1.0")
    assert [str(node.target) for node in layers(part)] == ["stages.0.0.conv1.0", "stages.0.0.conv2.0"]
    assert blocks(part)[0].name == "stages.0.0"


def test_an_unknown_block_is_named():
    graph = capture(ResNet(1, (4,), 10), torch.randn(1, 3, 8, 8))
    with pytest.raises(UnsupportedModel, match=r"no block 'stem': the graph has stem\.0, stages\.0\.0, head"):
        extract(graph, "stem")
    with pytest.raises(UnsupportedModel, match="capture"):
        blocks(torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())))


class Round(nn.Module):
    """Like a quantizer, and counts its calls."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step, self.calls = step, 0

    def forward(self, x):
        self.calls += 1
        return (x / self.step).round() * self.step


def quantized(graph):
    """A copy of ``graph`` with a ``Round`` behind every node but constants, one for all its readers."""
    graph = copy.deepcopy(graph)
    fixed = constants(graph.graph)
    for index, node in enumerate(list(graph.graph.nodes)):
        if node.op == "output" or node in fixed or "shape" not in node.meta:
            continue
        graph.add_submodule(f"round{index}", Round(0.01 * (index + 1)))
        with graph.graph.inserting_after(node):
            inserted = graph.graph.call_module(f"round{index}", (node,))
        node.replace_all_uses_with(inserted, delete_user_cb=lambda user, inserted=inserted: user is not inserted)
    graph.recompile()
    return graph


@pytest.mark.parametrize("folded", [False, True])
def test_quantizers_belong_to_the_block_that_reads_them(folded):
    torch.manual_seed(0)
    clean = capture(ResNet(2, (4, 8), 10), torch.randn(1, 3, 8, 8))
    if folded:
        fold_batchnorms(clean)
    graph = quantized(clean)
    images = torch.randn(3, 3, 8, 8)
    assert check(graph, images) == [block.name for block in blocks(clean)]
    entering, block = blocks(graph)[0].exit, blocks(graph)[1]
    assert entering.target == "stem.2"
    (rounding,) = entering.users
    assert isinstance(module_of(rounding), Round)
    assert rounding in block.nodes
    assert [node.name for node in rounding.users] == ["stages_0_0_conv1_0", "stages_0_0_shortcut"]
    module_of(rounding).calls = 0
    extract(graph, blocks(clean)[1])(torch.randn(3, 4, 8, 8))  # a block of another copy is found by its name
    assert module_of(rounding).calls == 1
    assert blocks(graph)[-1].exit.target.startswith("round")


def test_folding_moves_the_end_of_a_block():
    network = nn.Sequential(conv(), nn.BatchNorm2d(4), conv(), nn.BatchNorm2d(4))
    graph = capture(network, torch.randn(1, 4, 8, 8))
    assert [block.exit.target for block in blocks(graph)] == ["1", "3"]
    fold_batchnorms(graph)
    assert [block.exit.target for block in blocks(graph)] == ["0", "2"]
    assert check(graph, torch.randn(2, 4, 8, 8)) == ["0", "2"]
