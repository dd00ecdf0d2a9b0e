"""BatchNorm folding: exact where it is done, and refused with a reason where it is not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn, tensor
from torch.testing import assert_close

from zsq.core.errors import UnsupportedModel
from zsq.nets.folding import fold_batchnorm, fold_batchnorms
from zsq.nets.graph import capture
from zsq.zoo.networks import MobileNetV2, ResNet


def randomised(network: nn.Module) -> nn.Module:
    """``network`` in eval mode with BN statistics and parameters of a trained look, some gammas negative."""
    torch.manual_seed(0)
    for bn in network.modules():
        if isinstance(bn, nn.modules.batchnorm._BatchNorm):
            bn.running_mean.normal_(0, 0.3)
            bn.running_var.uniform_(0.2, 2)
            if bn.affine:
                nn.init.normal_(bn.weight, 0.5)
                nn.init.normal_(bn.bias)
    return network.eval()


def folded(network: nn.Module, example: torch.Tensor):
    """The folded graph and the moments, checked against the network."""
    graph = capture(randomised(network), example)
    moments = fold_batchnorms(graph)
    with torch.no_grad():
        expected = network(example)
        assert (graph(example) - expected).abs().max() <= 1e-5 * expected.abs().max()
    return graph, moments


def kinds(graph) -> list[str]:
    return [type(module).__name__ for module in graph.modules()]


def test_fold_by_hand():
    # gamma / sqrt(var + eps) = (6 / 2, -4 / 1); bias (1 - 3) * 3 + 0.5 = -5.5 and (2 - 0) * -4 + 0 = -8
    bn = nn.BatchNorm1d(2, eps=0).eval()
    bn.running_mean, bn.running_var = tensor([3.0, 0.0]), tensor([4.0, 1.0])
    bn.weight, bn.bias = nn.Parameter(tensor([6.0, -4.0])), nn.Parameter(tensor([0.5, 0.0]))
    weight, bias = fold_batchnorm(tensor([[1.0, 2.0], [3.0, 0.0]]), tensor([1.0, 2.0]), bn)
    assert weight.tolist() == [[3.0, 6.0], [-12.0, 0.0]]
    assert bias.tolist() == [-5.5, -8.0]
    assert not weight.requires_grad


def test_fold_without_statistics_is_refused():
    with pytest.raises(UnsupportedModel, match="running statistics"):
        fold_batchnorm(torch.ones(2, 1), None, nn.BatchNorm1d(2, track_running_stats=False))


@pytest.mark.parametrize(
    ("layer", "bn", "inputs"),
    [
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 7)),
        (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 7, 7)),
        (
            nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(6, affine=False),
            (2, 4, 7, 7),
        ),
        (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 4, 4, 4)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), nn.BatchNorm1d(6), (2, 4, 7)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        (nn.Linear(5, 6), nn.BatchNorm1d(6), (3, 5)),
    ],
)
def test_folding_changes_nothing(layer, bn, inputs):
    graph, moments = folded(nn.Sequential(layer, nn.Identity(), bn, nn.ReLU()), torch.randn(inputs))
    assert graph.meta["unfolded"] == {}
    assert list(moments) == ["0"]
    assert type(bn).__name__ not in kinds(graph)
    assert_close(moments["0"].mean, torch.zeros(bn.num_features) if bn.bias is None else bn.bias.data)
    assert_close(moments["0"].std, torch.ones(bn.num_features) if bn.weight is None else bn.weight.data.abs())


@pytest.mark.parametrize("network", [ResNet(1, (8, 16), 10), MobileNetV2(10)])
def test_all_batchnorms_of_the_shipped_networks_fold(network):
    graph, moments = folded(network, torch.randn(2, 3, 16, 16))
    assert graph.meta["unfolded"] == {}
    assert len(moments) == sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert "BatchNorm2d" not in kinds(graph)


def test_moments_are_those_of_the_output():
    # Standardised by its own statistics, a layer's output has mean beta and deviation |gamma|.
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=None, eps=1e-9))
    nn.init.normal_(network[1].weight)
    nn.init.normal_(network[1].bias)
    images = torch.randn(16, 3, 32, 32)
    network(images)
    graph = capture(network, images)
    moments = fold_batchnorms(graph)["0"]
    out = graph(images).transpose(0, 1).flatten(1)
    assert_close(out.mean(1), moments.mean, rtol=0, atol=1e-4)
    assert_close(out.std(1), moments.std, rtol=1e-3, atol=0)


def test_the_graph_before_is_untouched_by_folding_a_copy():
    graph = capture(randomised(ResNet(1, (4,), 10)), torch.randn(1, 3, 8, 8))
    before = copy.deepcopy(graph.state_dict())
    fold_batchnorms(copy.deepcopy(graph))
    assert_close(graph.state_dict(), before, rtol=0, atol=0)


class Apply(nn.Module):
    """A function of named layers as a network on (N, 4, 6, 6)."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(self, x)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Sharpened(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 1)


@pytest.mark.parametrize(
    ("function", "children", "reason"),
    [
        (lambda self, x: self.bn(x.relu()), {}, "comes from relu, which is no layer"),
        (lambda self, x: self.bn(self.pool(x)), {"pool": nn.MaxPool2d(2)}, "comes from pool, which is no layer"),
        (lambda self, x: self.bn(y := self.conv(x)) + y, {"conv": conv()}, "what conv computes is also read elsewhere"),
        (lambda self, x: self.bn(self.conv(self.conv(x))), {"conv": conv()}, "weights of conv are used more than once"),
        (
            lambda self, x: self.bn(self.conv(x)) + self.conv.weight.sum(),
            {"conv": conv()},
            "weights of conv are used more than once",
        ),
        (lambda self, x: self.bn(self.b(self.bn(self.a(x)))), {"a": conv(), "b": conv()}, "runs more than once"),
        (lambda self, x: self.bn(self.conv(x)), {"conv": Standardised(4, 4, 3)}, "Standardised conv is not linear in"),
        (lambda self, x: self.bn(self.conv(x)), {"conv": conv(), "bn": Sharpened(4)}, "Sharpened changes what"),
        (
            lambda self, x: self.bn(self.conv(x)),
            {"conv": conv(), "bn": nn.BatchNorm2d(4, track_running_stats=False)},
            "statistics of the batch",
        ),
        (
            lambda self, x: self.bn(self.linear(x.flatten(2))),
            {"linear": nn.Linear(36, 4), "bn": nn.BatchNorm1d(4)},
            "does not normalise the features of linear",
        ),
    ],
)
def test_what_does_not_fold_stays_and_is_listed(function, children, reason):
    network = Apply(function, **{"bn": nn.BatchNorm2d(4), **children})
    if network.bn.running_mean is not None:
        randomised(network)
    graph = capture(network, torch.randn(2, 4, 6, 6))
    assert fold_batchnorms(graph) == {}
    assert list(graph.meta["unfolded"]) == ["bn"]
    assert reason in graph.meta["unfolded"]["bn"]
    x = torch.randn(2, 4, 6, 6)
    assert_close(graph(x), network.eval()(x))


def test_a_subclass_that_is_linear_in_its_weight_folds():
    graph, moments = folded(nn.Sequential(Padded(4, 4, 2), nn.BatchNorm2d(4)), torch.randn(2, 4, 6, 6))
    assert list(moments) == ["0"]
    assert graph.meta["unfolded"] == {}


def test_batchnorm_before_convolution_is_left():
    network = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4), nn.ReLU(), conv())
    graph, moments = folded(network, torch.randn(2, 4, 6, 6))
    assert list(moments) == ["2"]
    assert list(graph.meta["unfolded"]) == ["0"]


def test_the_activation_inside_a_norm_outlives_it():
    class NormAct(nn.BatchNorm2d):
        def __init__(self):
            super().__init__(4)
            self.act = nn.PReLU(4)

        def forward(self, x):
            return self.act(super().forward(x))

    graph, moments = folded(nn.Sequential(conv(), NormAct()), torch.randn(2, 4, 6, 6))
    assert list(moments) == ["0"]
    assert [str(node.target) for node in graph.graph.nodes] == ["images", "0", "1.act", "output"]
    assert list(graph.state_dict()) == ["0.weight", "0.bias", "1.act.weight"]
