import pytest
import torch
from torch import nn

from zsq.core import FLOAT, RecipeError
from zsq.methods import METHODS
from zsq.nets.graph import capture
from zsq.quant import (
    MINMAX_PTQ,
    PROTOCOLS,
    PTQ_8BIT_ENDS,
    SIMULATE_ALL,
    AfterActivations,
    Ends,
    EqualizeLayers,
    InsertFakeQuant,
    LayerInputs,
)
from zsq.quant.layers import edge_of
from zsq.quant.placement import DEPLOYED, float_tensors, is_activation
from zsq.quant.quantizers import activation_quantizers, weight_quantizers

SQUANT = METHODS["squant"].quantizer[0].protocol
DFQ = METHODS["dfq"].quantizer[2].protocol

# W4A5: source -> readers, bits
RESNET_INPUTS = {
    "stem_2": ("stages_0_0_conv1_0 stages_0_0_shortcut", 5),  # the second layer, and the shortcut through an identity
    "stages_0_0_relu1": ("stages_0_0_conv2_0", 5),
    "stages_0_0_relu2": ("stages_1_0_conv1_0 stages_1_0_shortcut_0", 5),
    "stages_1_0_relu1": ("stages_1_0_conv2_0", 5),
    "flatten": ("head", 8),
}
RESNET_8BIT_SECOND = {**RESNET_INPUTS, "stem_2": ("stages_0_0_conv1_0 stages_0_0_shortcut", 8)}
RESNET_RELUS = {
    **{source: kept for source, kept in RESNET_INPUTS.items() if source != "flatten"},
    "stages_1_0_relu2": ("pool", 5),
}
RESNET_ALL = {
    **RESNET_RELUS,
    "images": ("stem_0", 5),
    "stages_0_0_conv2_0": ("add", 5),  # BatchNorm is folded
    "stages_1_0_conv2_0": ("add_1", 5),
    "stages_1_0_shortcut_0": ("add_1", 5),
    "pool": ("flatten", 5),
}
MOBILENET_RELUS = {
    "stem_2": ("blocks_0_body_0", 5),
    "blocks_0_body_2": ("blocks_0_body_3", 5),
    "blocks_0_body_5": ("blocks_0_body_6", 5),
    "blocks_1_body_2": ("blocks_1_body_3", 5),
    "blocks_1_body_5": ("blocks_1_body_6", 5),
}
MOBILENET_INPUTS = {**MOBILENET_RELUS, "blocks_0_body_7": ("blocks_1_body_0 add", 5), "flatten": ("head", 8)}
MOBILENET_8BIT_SECOND = {**MOBILENET_INPUTS, "stem_2": ("blocks_0_body_0", 8)}
MOBILENET_ALL = {
    **MOBILENET_RELUS,
    "images": ("stem_0", 5),
    "blocks_0_body_6": ("blocks_1_body_0 add", 5),
    "blocks_1_body_6": ("add", 5),
    "add": ("pool", 5),
    "pool": ("flatten", 5),
}
EIGHT = ["images", "stages_0_0_conv2_0", "stages_1_0_conv2_0", "stages_1_0_shortcut_0", "stages_1_0_relu2", "pool"]
RESNET_DEPLOYED = {**RESNET_ALL, **{source: (RESNET_ALL[source][0], 8) for source in EIGHT}}
EIGHT = ["images", "blocks_1_body_6", "add", "pool"]  # the ends, and what no layer reads
MOBILENET_DEPLOYED = {**MOBILENET_ALL, **{source: (MOBILENET_ALL[source][0], 8) for source in EIGHT}}


def placed(graph):
    """Source -> readers, bits."""
    found = {}
    for name, quantizer in activation_quantizers(graph).items():
        edge = edge_of(graph, name)
        found[edge.source.name] = (" ".join(sorted(node.name for node in edge.readers)), quantizer.bits)
    return found


def ordered(expected):
    return {source: (" ".join(sorted(readers.split())), bits) for source, (readers, bits) in expected.items()}


def quantized(job_of, apply, network, protocol, bits="w4a5", shape=(3, 8, 8)):
    job = job_of(network, bits, shape)
    apply(job, InsertFakeQuant(protocol=protocol))
    return job.student


@pytest.mark.parametrize(
    ("protocol", "in_resnet", "in_mobilenet"),
    [
        (MINMAX_PTQ, RESNET_RELUS, MOBILENET_RELUS),  # ZeroQ: after activations, and nowhere else
        (PTQ_8BIT_ENDS, RESNET_8BIT_SECOND, MOBILENET_8BIT_SECOND),  # GENIE
        (SIMULATE_ALL, RESNET_ALL, MOBILENET_ALL),
        (SQUANT, RESNET_INPUTS, MOBILENET_INPUTS),
        (DFQ, RESNET_ALL, MOBILENET_ALL),
        (DEPLOYED["ort-x86"], RESNET_DEPLOYED, MOBILENET_DEPLOYED),
    ],
    ids=["minmax-ptq", "ptq-8bit-ends", "simulate-all", "squant", "dfq", "ort-x86"],
)
def test_exactly_these_edges_are_quantized(protocol, in_resnet, in_mobilenet, resnet, mobilenet, job_of, apply):
    assert placed(quantized(job_of, apply, resnet, protocol)) == ordered(in_resnet)
    assert placed(quantized(job_of, apply, mobilenet, protocol)) == ordered(in_mobilenet)


@pytest.mark.parametrize(
    ("protocol", "first", "last"),
    [(MINMAX_PTQ, 4, 4), (PTQ_8BIT_ENDS, 8, 8), (SIMULATE_ALL, 4, 4), (SQUANT, 4, 4), (DEPLOYED["tensorrt"], 8, 8)],
)
def test_widths_of_weights(protocol, first, last, resnet, job_of, apply):
    student = quantized(job_of, apply, resnet, protocol)
    bits = {name: quantizer.bits for name, (_, quantizer) in weight_quantizers(student).items()}
    assert len(bits) == 7  # stem, two convolutions in each block, one in a shortcut, head
    assert (bits.pop("stem.0"), bits.pop("head")) == (first, last)
    assert set(bits.values()) == {4}


def test_the_methods_use_the_protocols_of_their_papers():
    protocols = {name: method.quantizer for name, method in METHODS.items()}
    assert protocols["zeroq"][0].protocol == MINMAX_PTQ
    assert protocols["genie"][0].protocol == PTQ_8BIT_ENDS
    assert not PTQ_8BIT_ENDS.weights.symmetric
    assert PTQ_8BIT_ENDS.activations.symmetric


def test_what_is_left_in_float_is_listed_and_nothing_else(resnet, job_of, apply):
    sums = ["add <- stages.0.0.conv2.1", "add_1 <- stages.1.0.conv2.1", "add_1 <- stages.1.0.shortcut.1"]
    expected = {
        "minmax-ptq": ["stem.0 <- images", "head <- flatten", *sums],  # averages leave the grid: the head reads float
        "ptq-8bit-ends": ["stem.0 <- images", *sums],
        "qat-lowbit-all": ["stem.0 <- images", "head <- flatten", *sums],
        "simulate-all": [],
        **{name: [] for name in (*DEPLOYED, "deploy")},
    }
    for name, protocol in PROTOCOLS.items():
        assert float_tensors(quantized(job_of, apply, resnet, protocol)) == expected[name]


def test_without_quantizers_everything_is_left_in_float(mobilenet, job_of, apply):
    student = quantized(job_of, apply, mobilenet, SIMULATE_ALL, "w4a32")
    assert activation_quantizers(student) == {}
    assert len(float_tensors(student)) == 8 + 2  # one for each layer, and two for the sum


def test_float_weights_stay_float(resnet, job_of, apply):
    student = quantized(job_of, apply, resnet, MINMAX_PTQ, "w32a4")
    assert weight_quantizers(student) == {}
    assert len(activation_quantizers(student)) == 5


def test_the_convolution_and_the_shortcut_read_one_quantizer(resnet, job_of, apply):
    student = quantized(job_of, apply, resnet, PTQ_8BIT_ENDS)
    nodes = {node.name: node for node in student.graph.nodes}
    for convolution, shortcut in [
        ("stages_0_0_conv1_0", "stages_0_0_shortcut"),
        ("stages_1_0_conv1_0", "stages_1_0_shortcut_0"),
    ]:
        (left,), (right,) = nodes[convolution].all_input_nodes, nodes[shortcut].all_input_nodes
        assert left is right
        assert student.get_submodule(left.target) in activation_quantizers(student).values()


def test_a_layer_behind_dropout_has_the_width_of_its_end(job_of, apply):
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(64, 5)
    )
    student = quantized(job_of, apply, network.eval(), PTQ_8BIT_ENDS, "w4a4")
    assert [bits for _, bits in placed(student).values()] == [8, 8]
    assert placed(student)["_4"] == ("_5", 8)  # the source of the edge is what the dropout reads
    assert float_tensors(student) == ["0 <- images"]


@pytest.mark.parametrize("exact", [True, False])
def test_equalization_moves_no_quantizer(exact, mobilenet, job_of, apply):
    job = job_of(mobilenet, "w8a5")
    apply(job, EqualizeLayers(exact_clip=exact), InsertFakeQuant(protocol=DFQ))
    assert placed(job.student) == ordered(MOBILENET_ALL)


class Undecided(nn.Module):
    """Cannot be traced: takes a way that depends on values."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.left(x) if x.sum() > -1e9 else self.right(x)


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, 4, 3), Undecided(), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.middle(torch.relu(self.stem(x))).mean((2, 3)))


def test_layers_inside_an_untraced_module_are_quantized_in_place(job_of, apply):
    student = quantized(job_of, apply, Partly().eval(), PTQ_8BIT_ENDS, "w3a5")
    assert set(student.meta["untraced"]) == {"middle"}
    bits = {name: quantizer.bits for name, (_, quantizer) in weight_quantizers(student).items()}
    assert bits == {"stem": 8, "middle.left": 3, "middle.right": 3, "head": 8}  # the head runs last, and is the end
    widths = {name: quantizer.bits for name, quantizer in activation_quantizers(student).items()}
    assert widths.pop("middle.left.input_quantizer") == 8  # the second layer
    assert widths.pop("middle.right.input_quantizer") == 5
    assert list(widths.values()) == [8]  # of the head
    assert edge_of(student, "middle.left.input_quantizer") is None
    hidden = ["middle.left <- input", "middle.right <- input"]
    assert float_tensors(student) == ["stem <- images", *hidden]
    student.middle.left.input_quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    assert float_tensors(student) == ["stem <- images", hidden[1]]


def test_what_a_hidden_layer_reads_lies_on_its_grid(job_of, apply):
    student = quantized(job_of, apply, Partly().eval(), PTQ_8BIT_ENDS, "w3a5")
    quantizer = student.middle.left.input_quantizer
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    x = torch.randn(1, 4, 5, 5)
    seen = []
    student.middle.left.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    student.middle(x)
    assert torch.equal(seen[0], quantizer(x))


def test_ends_of_a_network_of_two_layers_are_the_first_and_the_last():
    ends = Ends(first_weights=8, first_input=FLOAT, second_input=6, last_weights=7, last_input=5)
    assert [ends.weights(position, 2, 4) for position in range(2)] == [8, 7]
    assert [ends.inputs(position, 2, 4) for position in range(2)] == [FLOAT, 5]
    assert [ends.inputs(position, 4, 4) for position in range(4)] == [FLOAT, 6, 4, 5]
    with pytest.raises(RecipeError, match=r"Ends.last_input must have 2 to 8 bits"):
        Ends(last_input=9)


@pytest.mark.parametrize("placement", [AfterActivations(), LayerInputs()])
def test_activations_are_found_in_every_form(placement):
    class Forms(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x):
            x = torch.relu(self.convs[0](x))
            x = nn.functional.relu6(self.convs[1](x))
            x = self.convs[2](x).relu()
            return nn.functional.softmax(self.convs[3](x).flatten(1), 1)

    graph = capture(Forms().eval(), torch.zeros(2, 3, 2, 2))
    assert sum(is_activation(node) for node in graph.graph.nodes) == 3
    assert len(placement.edges(graph)) == (3 if isinstance(placement, AfterActivations) else 4)
