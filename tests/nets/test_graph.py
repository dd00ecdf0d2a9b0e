"""Capture, and what may be asked of a graph; on networks of a few layers."""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from zsq.core.errors import UnsupportedModel
from zsq.core.teacher import only_tokens
from zsq.nets.graph import blocks, capture, consumers, hidden_layers, layers, matmuls, module_of, producer
from zsq.zoo.networks import ResNet


class Net(nn.Module):
    """A 3x3 convolution, then ``middle`` on (N, 4, 8, 8), pooling and a linear."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.middle = middle
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.middle(self.conv(x)).mean((2, 3)))


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(self, x)


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


def captured(middle: nn.Module | None = None, function=None, **children: nn.Module):
    """A captured ``Net``, checked at three batch sizes against the network."""
    torch.manual_seed(0)
    network = Net(middle if middle is not None else Apply(function, **children))
    graph = capture(network, images())
    for count in (1, 2, 5):
        with torch.no_grad():
            assert_close(graph(images(count)), network.eval()(images(count)))
    return graph


def names(nodes) -> list[str]:
    return [str(node.target) for node in nodes]


def test_layers_keep_their_dotted_names_in_the_order_in_which_they_run():
    graph = capture(ResNet(1, (4, 8), 10), torch.randn(2, 3, 8, 8))
    assert names(layers(graph)) == [
        *("stem.0", "stages.0.0.conv1.0", "stages.0.0.conv2.0", "stages.1.0.conv1.0", "stages.1.0.conv2.0"),
        *("stages.1.0.shortcut.0", "head"),
    ]
    assert isinstance(graph.get_submodule("stages.1.0.shortcut.1"), nn.BatchNorm2d)


def test_a_subclass_of_a_layer_is_a_layer():
    class SameConv(nn.Conv2d):
        def forward(self, x):
            return super().forward(F.pad(x, (1, 1, 1, 1)))

    graph = captured(SameConv(4, 4, 3))
    assert names(layers(graph)) == ["conv", "middle", "head"]
    assert isinstance(graph.middle, SameConv)


def test_the_model_is_left_alone():
    model = Net(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True))).train()
    before = copy.deepcopy(model.state_dict())
    graph = capture(model, images())
    assert model.training
    assert model.middle[1].inplace
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not graph.training
    assert graph.conv.weight is not model.conv.weight


def test_nodes_know_their_module_and_their_shape():
    graph = capture(ResNet(1, (4, 8), 10), torch.randn(2, 3, 8, 8))
    nodes = {node.name: node.meta for node in graph.graph.nodes}
    assert nodes["add"]["module_path"] == "stages.0.0"
    assert nodes["stages_0_0_conv1_0"]["module_path"] == "stages.0.0.conv1"
    assert nodes["flatten"]["module_path"] == ""
    assert nodes["add_1"]["shape"] == (2, 8, 4, 4)


def test_a_copy_keeps_what_is_known():
    graph = captured(function=lambda self, x: x * x.shape[0])
    other = copy.deepcopy(graph)
    assert other.meta["untraced"] == {}
    assert [node.meta["module_path"] for node in other.graph.nodes] == [
        node.meta["module_path"] for node in graph.graph.nodes
    ]
    assert module_of(layers(other)[0]) is other.conv


def test_arguments_beside_the_images_keep_their_defaults():
    class Optional(Net):
        def forward(self, x, mask=None, *more, scale=2.0, **rest):
            x = super().forward(x) * scale
            return x if mask is None else x * mask

    network = Optional(nn.ReLU())
    assert_close(capture(network, images())(images()), network.eval()(images()))


def test_control_flow_on_values_makes_one_leaf_with_a_reason():
    def choose(self, x):
        return self.left(x) if x.sum() > 0 else self.right(x)

    graph = captured(function=choose, left=nn.Conv2d(4, 4, 1), right=nn.Conv2d(4, 4, 1))
    assert graph.meta["untraced"] == {"middle": "TraceError: control flow that depends on the values of a tensor"}
    assert names(layers(graph)) == ["conv", "head"]
    assert list(hidden_layers(graph)) == ["middle.left", "middle.right"]
    assert hidden_layers(graph)["middle.left"] is graph.get_submodule("middle.left")
    assert "middle" in names(graph.graph.nodes)


def test_only_the_innermost_module_becomes_a_leaf():
    inner = Apply(lambda self, x: x if x.mean() > 0 else -x)
    graph = captured(nn.Sequential(nn.Conv2d(4, 4, 1), Apply(lambda self, x: self.inner(x) + x, inner=inner)))
    assert list(graph.meta["untraced"]) == ["middle.1.inner"]
    assert names(layers(graph)) == ["conv", "middle.0", "head"]
    assert "add" in [node.name for node in graph.graph.nodes]


def test_a_network_that_cannot_be_traced_is_one_leaf():
    class Chooses(Net):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)

    network = Chooses(nn.ReLU())
    graph = capture(network, images())
    assert list(graph.meta["untraced"]) == ["root"]
    assert list(hidden_layers(graph)) == ["root.conv", "root.head"]
    assert_close(graph(images(5)), network.eval()(images(5)))


def test_conditions_and_loops_over_sizes_are_decided():
    def sized(self, x):
        assert x.ndim == 4
        if x.shape[-1] % 2 == 0 and x.dtype == torch.float32 and len(x.shape) == 4:
            for _ in range(int(x.size(1))):
                x = x + torch.ones((x.shape[2], 1))
        left, right = x.chunk(2, dim=1)
        return torch.cat([*(part + 1 for part in x.chunk(2, dim=1)), left - right], 1).split(4, dim=1)[0]

    assert captured(function=sized).meta["untraced"] == {}


def test_a_condition_on_the_number_of_images_makes_a_leaf():
    graph = captured(function=lambda self, x: x * 2 if x.shape[0] > 1 else x)
    assert graph.meta["untraced"] == {"middle": "TraceError: control flow that depends on the number of images"}


def test_sizes_that_all_images_share_are_written_down():
    graph = captured(function=lambda self, x: x.reshape(x.shape[0], x.shape[1], x.shape[2] * x.shape[3]).view(x.shape))
    reshape = next(node for node in graph.graph.nodes if node.target == "reshape")
    assert reshape.args[2:] == (4, 64)
    assert reshape.args[1].target == "size"


def test_what_depends_on_chance_is_refused():
    with pytest.raises(UnsupportedModel, match="random numbers"):
        capture(Net(Apply(lambda self, x: x + torch.rand(8))), images())


def test_several_outputs_are_refused():
    with pytest.raises(UnsupportedModel, match="returns a tuple"):
        capture(Apply(lambda self, x: (x, x)), images())


@pytest.mark.parametrize(
    "write",
    [
        lambda self, x: F.relu(x, inplace=True) + x,
        lambda self, x: torch.relu_(x) + x,
        lambda self, x: x.add_(1).mul_(2) + x,
        lambda self, x: (self.relu(x), x)[1],  # the result of the module is thrown away, what it wrote is not
        lambda self, x: self.relu(self.relu(x) - 1),
    ],
)
def test_writing_in_place_becomes_a_new_tensor(write):
    graph = captured(function=write, relu=nn.ReLU(inplace=True))
    assert graph.meta["untraced"] == {}
    x = torch.randn(2, 4, 8, 8)
    before = x.clone()
    for node in graph.graph.nodes:
        if node.name.startswith(("relu", "middle", "add", "mul")) and node.op != "call_module":
            values = [x if isinstance(each, torch.fx.Node) else each for each in node.args]
            getattr(values[0], node.target)(*values[1:]) if node.op == "call_method" else node.target(
                *values, **node.kwargs
            )
    assert_close(x, before, rtol=0, atol=0)
    assert not any(getattr(module, "inplace", False) for module in graph.modules())


def test_writing_through_a_view_makes_a_leaf():
    def write(self, x):
        x = x.clone()
        x[:, 1:2].zero_()
        return x

    assert captured(function=write).meta["untraced"] == {"middle": "zero_ writes into a tensor through a view of it"}


def test_items_may_be_assigned():
    def write(self, x):
        x = x * 1
        x[:, 1:, 0] = 0.5
        x[:, 0] += x[:, 3]
        return x

    assert captured(function=write).meta["untraced"] == {}


def attend(**options):
    def function(self, x):
        tokens = x.flatten(2).transpose(1, 2)  # (N, 64, 4)
        heads = tokens.unflatten(-1, (2, 2)).transpose(1, 2)
        out = F.scaled_dot_product_attention(heads, heads, heads, **options)
        return out.transpose(1, 2).reshape(x.shape[0], 64, 4).transpose(1, 2).unflatten(2, (8, 8))

    return function


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.linspace(-1, 1, 64 * 64).view(64, 64)},
        {"attn_mask": torch.arange(64 * 64).view(64, 64) % 7 < 5},
    ],
)
def test_fused_attention_becomes_two_products(options):
    graph = captured(function=attend(**options))
    assert [node.target.__name__ for node, _, _ in matmuls(graph)] == ["matmul", "matmul"]
    softmax = next(node for node in graph.graph.nodes if node.target is torch.softmax)
    assert matmuls(graph)[1].left is softmax


def test_a_switch_between_fused_and_plain_attention_is_found_by_its_name():
    def attention(self, x):
        x = x.flatten(2)
        score = x @ x.transpose(1, 2) if not self.fused_attn else F.linear(x, x)
        return (score.softmax(-1) @ x).unflatten(2, (8, 8))

    module = Apply(attention)
    module.fused_attn = False
    network = Net(module)
    module.fused_attn = True
    with pytest.raises(RuntimeError):
        network(images())
    module.fused_attn = False
    assert len(matmuls(capture(network, images()))) == 2


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_torch_self_attention_is_opened(batch_first, need_weights):
    def attention(self, x):
        tokens = x.flatten(2).transpose(1, 2) if batch_first else x.flatten(2).permute(2, 0, 1)
        out, weights = self.attention(tokens, tokens, tokens, need_weights=need_weights)
        out = out.transpose(1, 2) if batch_first else out.permute(1, 2, 0)
        return out.unflatten(2, (8, 8)) + (weights.mean() if need_weights else 0)

    graph = captured(function=attention, attention=nn.MultiheadAttention(4, 2, batch_first=batch_first))
    assert graph.meta["untraced"] == {}
    assert names(layers(graph)) == ["conv", "middle.attention.in_proj", "middle.attention.out_proj", "head"]
    assert len(matmuls(graph)) == 2


def test_a_transformer_layer_of_torch_is_opened():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    graph = captured(
        function=lambda self, x: self.layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (8, 8)),
        layer=layer,
    )
    assert graph.meta["untraced"] == {}
    assert names(layers(graph))[1:5] == [
        f"middle.layer.{name}" for name in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    ]


def test_cross_attention_of_torch_is_a_leaf():
    def attention(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens * 2, tokens)[0].transpose(1, 2).unflatten(2, (8, 8))

    graph = captured(function=attention, attention=nn.MultiheadAttention(4, 2, batch_first=True))
    assert list(graph.meta["untraced"]) == ["middle.attention"]


def test_an_activation_inside_a_norm_is_its_own_node():
    class NormAct(nn.BatchNorm2d):
        def __init__(self):
            super().__init__(4)
            self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

        def forward(self, x):
            return self.act(self.drop(super().forward(x)))

    graph = captured(NormAct())
    assert type(graph.middle) is nn.BatchNorm2d
    assert names(graph.graph.nodes)[2:5] == ["middle", "middle.drop", "middle.act"]


def test_a_parametrized_weight_becomes_a_plain_one():
    graph = captured(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))
    assert type(graph.middle) is nn.Conv2d
    assert "weight" in graph.middle._parameters


def double_linear(x, weight, bias):
    return F.linear(x, weight, bias) if x.shape[-1] else x


torch.fx.wrap("double_linear")


def test_a_function_with_the_weights_of_a_layer_calls_the_layer():
    def function(self, x):
        x = double_linear(x.movedim(1, -1), self.linear.weight, self.linear.bias)
        return F.linear(x, self.linear.weight).movedim(-1, 1)

    graph = captured(function=function, linear=nn.Linear(4, 4))
    assert names(layers(graph)) == ["conv", "middle.linear", "head"]
    assert len(matmuls(graph)) == 1  # the second use leaves out the bias, which the layer does not


def test_matmuls_name_their_operands():
    def products(self, x):
        a, b = x.flatten(2), x.flatten(2).transpose(1, 2)
        total = (a @ b) + torch.bmm(a, b) + a.matmul(b) + torch.einsum("nij,njk->nik", a, b)
        total = total + torch.baddbmm(total, a, b) + F.linear(a, input=None) if False else total
        total = total + torch.baddbmm(total, batch1=a, batch2=b)
        kernel = F.conv2d(x, weight=total.mean((0, 1)).view(4, 1, 1, 1), groups=4)
        return kernel + F.linear(total, self.weight, self.bias).mean()

    module = Apply(products)
    module.weight, module.bias = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2))
    found = matmuls(captured(module))
    a, b = found[0].left, found[0].right
    assert [a.target, b.target] == ["flatten", "transpose"]
    assert len(found) == 7
    assert all((left, right) == (a, b) for _, left, right in found[:5])
    assert (found[5].right.target, found[6].right.target) == ("view", "middle.weight")


def test_producer_and_consumers_look_through_what_keeps_the_value():
    def function(self, x):
        y = F.dropout(self.drop(self.same(x)).contiguous(), 0.5, self.training)
        return y.relu() + y.sigmoid()

    graph = captured(function=function, same=nn.Identity(), drop=nn.Dropout(0.3))
    nodes = {node.name: node for node in graph.graph.nodes}
    assert producer(nodes["relu"]) is nodes["conv"]
    assert consumers(nodes["conv"]) == [nodes["relu"], nodes["sigmoid"]]
    assert consumers(nodes["images"]) == [nodes["conv"]]
    assert consumers(nodes["head"]) == [nodes["output"]]
    assert producer(nodes["add"]) is nodes["relu"]


def test_who_asks_for_the_size_is_no_consumer():
    graph = captured(function=lambda self, x: x.relu().reshape(x.shape[0] * 2, 2, 64).view(x.shape))
    relu = next(node for node in graph.graph.nodes if node.target == "relu")
    assert [node.target for node in consumers(producer(relu))] == ["relu"]


def test_a_network_that_writes_into_its_input_leaves_the_example_alone():
    class Shifts(Net):
        def forward(self, x):
            return super().forward(x.sub_(1))

    example = images()
    network = Shifts(nn.ReLU())
    graph = capture(network, example)
    assert_close(example, images(), rtol=0, atol=0)
    assert_close(graph(example), network.eval()(example.clone()))
    assert_close(example, images(), rtol=0, atol=0)


@pytest.mark.parametrize("make", [tiny.vit, tiny.unfused_vit])
def test_the_graph_of_a_transformer_runs_on_some_of_its_tokens(make):
    network = make()
    graph, rng = capture(network, images()), torch.Generator().manual_seed(0)
    for count in (1, 2, 5):
        for left in (1, 4, 15):
            patches = [1 + torch.randperm(16, generator=rng)[:left] for _ in range(count)]
            tokens = torch.stack([torch.cat([torch.zeros(1, dtype=torch.int64), each]) for each in patches])
            with torch.no_grad(), only_tokens(graph, "drop", tokens), only_tokens(network, "drop", tokens):
                assert_close(graph(images(count)), network(images(count)))
    with torch.no_grad():
        assert_close(graph(images(5)), network(images(5)))  # and on all of them again
    assert [block.name for block in blocks(graph)] == ["patches", "blocks.0", "blocks.1", "head"]
