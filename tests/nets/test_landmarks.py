"""Where methods look: the classifier, the last map and the ends of branches, whatever their names and their order."""

import operator
import warnings

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from zsq.compat import import_torchvision
from zsq.core import MissingExtra, Source
from zsq.core.teacher import Landmarks
from zsq.nets.graph import capture
from zsq.quant import QAT_LOWBIT_ALL, InsertFakeQuant
from zsq.synthesis import Noise
from zsq.zoo.networks import MobileNetV2, ResNet


def found(network, size=8):
    return capture(network.eval(), torch.zeros(2, 3, size, size)).meta["landmarks"]


def published(name):
    """A network of torchvision in which everything is 0: landmarks read no weights. The linears of VGG are narrow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torchvision was built for another torch
        try:
            models = import_torchvision().models
        except MissingExtra as error:
            pytest.skip(str(error))
        with torch.device("meta"):
            network = models.get_model(name, weights=None)
            if name.startswith("vgg"):
                sizes = (512 * 7 * 7, 8), (8, 8), (8, 5)
                network.classifier[0], network.classifier[3], network.classifier[6] = (nn.Linear(*s) for s in sizes)
    network.to_empty(device="cpu")
    for tensor in network.state_dict().values():
        tensor.zero_()
    return network


def test_a_network_with_one_branch():
    assert found(tiny.cnn()) == Landmarks(classifier="12", convolution="7", branches=("3.body.4",))


def test_without_branches_each_convolution_ends_one():
    assert found(tiny.mobile()) == Landmarks(classifier="10", convolution="6", branches=("1", "4", "7"))
    assert found(tiny.plain()) == Landmarks(classifier="6", convolution="2", branches=("0", "2"))  # no BatchNorm either


def test_a_resnet_of_the_zoo():
    branches = tuple(f"stages.{stage}.{block}.conv2.1" for stage in (0, 1) for block in (0, 1))
    assert found(ResNet(2, (4, 6), 5)) == Landmarks("head", "stages.1.1.conv2.0", branches)


def test_a_mobilenet_of_the_zoo_has_branches_where_it_adds():
    # blocks per stage 1, 2, 3, 3, 2, 2: the first of each has no shortcut
    branches = tuple(f"blocks.{index}.body.7" for index in (2, 4, 5, 7, 8, 10, 12))
    assert found(MobileNetV2(5, last=8), 16) == Landmarks("head", "last.0", branches)


def test_resnet18():
    branches = tuple(f"layer{stage}.{block}.bn2" for stage in (1, 2, 3, 4) for block in (0, 1))
    assert found(published("resnet18"), 64) == Landmarks("fc", "layer4.1.conv2", branches)


def test_the_last_convolution_has_a_map_and_not_a_pixel():
    assert found(published("resnet18"), 32).convolution == "layer3.1.conv2"  # layer4 makes 1 x 1


def test_mobilenet_v2():
    branches = tuple(f"features.{index}.conv.3" for index in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16))
    assert found(published("mobilenet_v2"), 64) == Landmarks("classifier.1", "features.18.0", branches)


def test_vgg11_with_batchnorm():
    branches = tuple(f"features.{index}" for index in (1, 5, 9, 12, 16, 19, 23, 26))
    assert found(published("vgg11_bn"), 32) == Landmarks("classifier.6", "features.25", branches)


class Backwards(nn.Module):
    """Everything is registered in the opposite of the order in which it runs, and the shortcut last of its block."""

    def __init__(self, add=operator.add, shortcut_first=False, tail=nn.Identity):
        super().__init__()
        self.head = nn.Conv2d(6, 5, 1)
        self.relu = nn.ReLU()
        self.tail = tail()
        self.body = nn.Sequential(*tiny.conv_bn(4, 6), nn.ReLU(), *tiny.conv_bn(6, 6))
        self.shortcut = nn.Sequential(*tiny.conv_bn(4, 6, kernel=1))
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.add, self.shortcut_first = add, shortcut_first

    def forward(self, x):
        x = self.stem(x)
        body, shortcut = self.tail(self.body(x)), self.shortcut(x)
        x = self.add(shortcut, body) if self.shortcut_first else self.add(body, shortcut)
        return self.head(F.adaptive_avg_pool2d(self.relu(x), 1)).flatten(1)


@pytest.mark.parametrize("tail", [nn.Identity, nn.Dropout], ids=["bare", "dropout"])
@pytest.mark.parametrize(
    "add", [operator.add, operator.iadd, torch.add, lambda a, b: a.add_(b)], ids=["+", "+=", "add", "add_"]
)
@pytest.mark.parametrize("shortcut_first", [True, False])
def test_order_of_execution_decides_and_a_head_may_be_a_convolution(add, shortcut_first, tail):
    # the head makes one pixel, so the last map is that of the layer before it in time: the shortcut's
    assert found(Backwards(add, shortcut_first, tail)) == Landmarks("head", "shortcut.0", ("body.4",))


def test_a_head_before_the_pool_is_classifier_and_last_map_at_once():
    network = nn.Sequential(*tiny.conv_bn(3, 4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert found(network) == Landmarks("3", "3", ("1", "3"))


def test_a_network_of_linears_has_no_map():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 5))
    assert found(network) == Landmarks("3", "", ())


@pytest.mark.parametrize("make", [tiny.cnn, tiny.mobile, Backwards, lambda: ResNet(1, (4, 6), 5)])
def test_teacher_and_quantized_student_share_them(make, job_for):
    job = job_for(make().eval())
    InsertFakeQuant(protocol=QAT_LOWBIT_ALL).apply(job, Source(Noise(samples=2), job))
    marks = job.teacher.landmarks
    assert marks == found(make())
    for name in (marks.classifier, marks.convolution, *marks.branches):
        assert isinstance(job.student.get_submodule(name), type(job.teacher.module.get_submodule(name)))


# --- transformers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.vit, tiny.unfused_vit])
def test_a_transformer_has_attention_tokens_and_a_class_token(make):
    marks = found(make())
    assert (marks.attention, marks.tokens, marks.prefix, marks.grid) == (2, "drop", 1, (4, 4))
    assert marks.classifier == "head"


def test_a_cnn_has_no_attention():
    marks = found(tiny.cnn())
    assert (marks.attention, marks.tokens, marks.prefix, marks.grid) == (0, "", 0, (0, 0))


class Patches(nn.Module):
    """A transformer on 16 patches without a class token, with ``between`` the embedding and the first block."""

    def __init__(self, between, after=None):
        super().__init__()
        self.embed, self.between = nn.Conv2d(3, 8, 2, 2), between
        self.block, self.after, self.head = tiny.TransformerBlock(8, 2, fused=True), after, nn.Linear(8, 5)

    def forward(self, x):
        x = self.between(self.embed(x).flatten(2).transpose(1, 2))
        x = self.block(x)
        return self.head((x if self.after is None else self.after(x)).mean(1))


class Window(nn.Module):
    """What needs all tokens: a map of 4 x 4 again."""

    def forward(self, x):
        return x.unflatten(1, (4, 4)).amax(2)


@pytest.mark.parametrize(
    ("between", "name"),
    [
        (nn.Dropout(), "between"),
        (nn.LayerNorm(8), "between"),
        (nn.Sequential(nn.LayerNorm(8), nn.Identity(), nn.Dropout()), "between.2"),
    ],
)
def test_the_last_module_that_makes_the_tokens_is_found(between, name):
    marks = found(Patches(between))
    assert (marks.tokens, marks.prefix, marks.grid) == (name, 0, (4, 4))


def test_tokens_that_no_module_makes_or_that_are_all_needed_cannot_be_left_out():
    assert found(Patches(Scale())).tokens == ""
    marks = found(Patches(nn.Dropout(), Window()))
    assert (marks.tokens, marks.attention) == ("", 1)


class Scale(nn.Module):
    """No layer of torch: what it makes is a product in the graph."""

    def forward(self, x):
        return 2 * x


def test_blocks_whose_two_branches_run_side_by_side():
    class Parallel(tiny.TransformerBlock):
        def forward(self, x):
            y = self.norm1(x)
            q, k, v = self.qkv(y).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return x + (self.proj(attention) + self.mlp(y))

    network = Patches(nn.Dropout())
    network.block = Parallel(8, 2, fused=True)
    assert found(network).tokens == "between"
