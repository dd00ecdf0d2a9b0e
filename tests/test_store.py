import json
import pickle
from dataclasses import replace

import pytest
import safetensors.torch
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from vits import vit

from zsq.core import Bits, CheckpointError, Job, Run, Source, Teacher, needs, smoke
from zsq.methods import BASELINES, METHODS
from zsq.nets.clip import ChannelClip
from zsq.nets.graph import capture
from zsq.quant import (
    REPQ_VIT,
    REPQ_VIT_PASSES,
    Log2,
    LogSqrt2,
    PowerOfTwoFactors,
    RidgeCorrection,
    Scheme,
    TwinGELU,
    TwinSoftmax,
)
from zsq.quant.placement import float_tensors
from zsq.quant.quantizers import freeze, weight_quantizers
from zsq.store import load_student, pack, save_student, unpack
from zsq.zoo.networks import InvertedResidual, ResNet

SHAPE = (3, 8, 8)
EXAMPLE = torch.zeros(2, *SHAPE)
EVERY = {**METHODS, **BASELINES}


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU6())
        self.blocks = nn.Sequential(InvertedResidual(4, 6, 2, 3), InvertedResidual(6, 6, 1, 2))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


class Undecided(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() < 1e9 else x[:, :, 1:-1, 1:-1]


class Gated(nn.Module):
    """One submodule cannot be traced."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.middle, self.head = Undecided(), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.middle(self.stem(x)).mean((2, 3)))


NETWORKS = {
    "resnet": lambda: ResNet(1, (4, 6), 5),
    "mobilenet": MobileNet,
    "gated": Gated,
    "vit": tiny.VisionTransformer,
}
FITTING = [
    (method, name)
    for method, recipe in EVERY.items()
    for name in NETWORKS
    if needs(recipe).isdisjoint({"bn"} if name == "vit" else {"attention"})
]


def build(name, seed=0):
    torch.manual_seed(seed)
    network = NETWORKS[name]()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.3, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 1.0)
    return network.eval()


def quantized(method, network, bits="w4a4"):
    job = Job(Teacher(network), capture(network, EXAMPLE), Bits.parse(bits), Run(device="cpu"), SHAPE)
    recipe = smoke(EVERY[method])
    source = Source(recipe.synthesizer, job)
    for each in recipe.quantizer:
        each.apply(job, source)
    freeze(job.student)
    return job.student.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A resnet that SQuant quantized to W3A4, on disk."""
    path = tmp_path_factory.mktemp("store") / "student.safetensors"
    student = quantized("squant", build("resnet"), "w3a4")
    path.write_bytes(save_student(student, {"teacher": "abc", "method": "squant"}))
    return path


@given(st.integers(1, 8), st.data())
def test_unpacking_gives_back_what_was_packed(bits, data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple))
    seed = data.draw(st.integers(0, 2**31))
    codes = torch.randint(2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-codes.numel() * bits // 8)  # no byte more than needed
    assert torch.equal(unpack(packed, bits, shape), codes)


def test_packing_by_hand():
    # 3 bits: 101 010 111, and 7 bits of padding
    assert pack(torch.tensor([5, 2, 7], dtype=torch.uint8), 3).tolist() == [0b10101011, 0b10000000]
    assert pack(torch.tensor([200, 1], dtype=torch.uint8), 8).tolist() == [200, 1]


@pytest.mark.parametrize(("method", "name"), FITTING)
def test_outputs_are_equal_to_the_bit(method, name, tmp_path):
    network = build(name)
    bits = "w8a8" if method == "dfq" else "w3a5"
    student = quantized(method, network, bits)
    path = tmp_path / "student.safetensors"
    path.write_bytes(save_student(student, {"teacher": "abc", "method": method}))
    loaded, about = load_student(path, build(name, seed=7), EXAMPLE)  # other weights: none of them may be left
    x = torch.randn(32, *SHAPE)
    assert torch.equal(loaded(x), student(x))
    assert (about["teacher"], about["method"]) == ("abc", method)
    assert float_tensors(loaded) == float_tensors(student)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    clips = [sum(isinstance(module, ChannelClip) for module in each.modules()) for each in (student, loaded)]
    assert clips[0] == clips[1] == (5 if (method, name) == ("dfq", "mobilenet") else 0)


def test_a_loaded_student_is_saved_as_the_same_file(saved):
    loaded, about = load_student(saved, build("resnet"), EXAMPLE)
    content = save_student(loaded, {key: about[key] for key in ("teacher", "method")})
    assert content == saved.read_bytes()


def test_weights_take_their_bits_and_no_float_copy_is_kept(saved):
    tensors = safetensors.torch.load(saved.read_bytes())
    student, _ = load_student(saved, build("resnet"), EXAMPLE)
    for name, (layer, quantizer) in weight_quantizers(student).items():
        assert tensors[f"{name}.weight.codes"].numel() == -(-layer.weight.numel() * quantizer.bits // 8)
        assert f"{name}.weight" not in tensors
    assert not any("parametrizations" in name or "original" in name for name in tensors)


def test_the_network_that_was_handed_in_does_not_change(saved):
    network = build("resnet", seed=3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    load_student(saved, network, EXAMPLE)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_student_that_is_not_frozen_cannot_be_saved():
    network = build("resnet")
    student = capture(network, EXAMPLE)
    job = Job(Teacher(network), student, Bits(), Run(device="cpu"), SHAPE)
    EVERY["nearest"].quantizer[0].apply(job, None)
    with pytest.raises(CheckpointError, match=r"the weight of stem\.0 is not frozen"):
        save_student(student, {})


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_a_truncated_file_is_refused(share, saved, tmp_path):
    content, path = saved.read_bytes(), tmp_path / "student.safetensors"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="is no complete safetensors file"):
        load_student(path, build("resnet"), EXAMPLE)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"student\.safetensors is no complete"):
        load_student(tmp_path / "student.safetensors", build("resnet"), EXAMPLE)


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(build("resnet").state_dict(), path)
    with pytest.raises(CheckpointError, match="is no student saved by this version"):
        load_student(path, build("resnet"), EXAMPLE)


@pytest.mark.parametrize("other", ["mobilenet", "gated"])
def test_another_architecture_is_refused(other, saved):
    with pytest.raises(CheckpointError, match="does not fit this network"):
        load_student(saved, build(other), EXAMPLE)


@pytest.mark.parametrize(
    "network", [ResNet(1, (4, 8), 5), ResNet(2, (4, 6), 5), ResNet(1, (4, 6), 6), ResNet(1, (4, 6, 6), 5)]
)
def test_a_network_of_another_size_is_refused(network, saved):
    with pytest.raises(CheckpointError, match="does not fit this network"):
        load_student(saved, network.eval(), EXAMPLE)


def metadata(content):
    size = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["zsq"])


def rewritten(saved, path, change):
    """The file with its plan changed; ``change`` gets the plan and the tensors."""
    content = saved.read_bytes()
    about, tensors = metadata(content), safetensors.torch.load(content)
    plan = json.loads(about["plan"])
    replaced = change(plan, tensors)
    about["plan"] = json.dumps(plan) if replaced is None else replaced
    path.write_bytes(safetensors.torch.save(tensors, {"zsq": json.dumps(about)}))


def lose(tensors, name):
    del tensors[name]


STRANGE_EDGE = {"bits": 4, "low": 0, "grid": {"kind": "Scheme"}, "ready": True, "source": "x", "readers": []}
DAMAGES = {
    "no json": lambda plan, tensors: "{",
    "a list": lambda plan, tensors: "[]",
    "no weights": lambda plan, tensors: lose(plan, "weights"),
    "a lost tensor": lambda plan, tensors: lose(tensors, "head.weight.codes"),
    "a lost float": lambda plan, tensors: lose(tensors, "head.bias"),
    "a strange tensor": lambda plan, tensors: tensors.update(extra=torch.zeros(1)),
    "a lost layer": lambda plan, tensors: lose(plan["weights"], "head"),
    "a strange layer": lambda plan, tensors: plan["weights"].update(nose=plan["weights"]["head"]),
    "another width": lambda plan, tensors: plan["weights"]["head"].update(bits=8),
    "another shape": lambda plan, tensors: plan["weights"]["head"].update(shape=[5, 7]),
    "a strange edge": lambda plan, tensors: plan["activations"].update(x=STRANGE_EDGE),
    "a strange grid": lambda plan, tensors: next(iter(plan["activations"].values())).update(grid={"kind": "Nose"}),
    "a strange edit": lambda plan, tensors: plan["edits"].append([]),
    "text for a number": lambda plan, tensors: plan["weights"]["head"].update(bits="3"),
}


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_file_whose_parts_do_not_belong_together_is_refused(change, saved, tmp_path):
    path = tmp_path / "student.safetensors"
    rewritten(saved, path, change)
    with pytest.raises(CheckpointError, match="does not fit this network"):
        load_student(path, build("resnet"), EXAMPLE)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("dump", [torch.save, lambda trap, path: path.write_bytes(pickle.dumps(trap))])
def test_no_code_in_a_file_is_run(dump, tmp_path):
    path, sprung = tmp_path / "student.safetensors", tmp_path / "sprung"
    dump(Trap(sprung), path)
    with pytest.raises(CheckpointError):
        load_student(path, build("resnet"), EXAMPLE)
    assert not sprung.exists()


def test_symmetric_grids_come_back_with_their_ends(tmp_path):
    network = build("resnet")
    recipe = EVERY["nearest"].override(
        {
            "quantizer.insert_fake_quant.protocol.weights.symmetric": True,
            "quantizer.insert_fake_quant.protocol.activations": Scheme(symmetric=True),
        }
    )
    job = Job(Teacher(network), capture(network, EXAMPLE), Bits(), Run(device="cpu"), SHAPE)
    source = Source(recipe.synthesizer, job)
    for each in recipe.quantizer:
        each.apply(job, source)
    freeze(job.student)
    path = tmp_path / "student.safetensors"
    path.write_bytes(save_student(job.student, {}))
    loaded, _ = load_student(path, build("resnet", seed=5), EXAMPLE)
    x = torch.randn(8, *SHAPE)
    assert torch.equal(loaded(x), job.student(x))
    assert {quantizer.low for _, quantizer in weight_quantizers(loaded).values()} == {-8}


@pytest.mark.parametrize(
    ("grids", "merged"),
    [
        ({}, True),
        ({}, False),  # a grid for each channel
        ({"probabilities": Log2(), "gelus": TwinGELU(), "norms": PowerOfTwoFactors()}, False),
        ({"probabilities": LogSqrt2(zero="beside")}, True),
        ({"probabilities": TwinSoftmax(splits=5)}, True),
        ({"probabilities": "float", "norms": PowerOfTwoFactors()}, True),
    ],
)
def test_transformers_come_back_to_the_bit(grids, merged, tmp_path):
    insert, calibrate, merge = REPQ_VIT_PASSES
    passes = [replace(insert, protocol=replace(REPQ_VIT, **grids)), calibrate]
    passes += [merge, RidgeCorrection(ridge=1.0)] if merged else []
    job = Job(Teacher(vit()), capture(vit(), EXAMPLE), Bits.parse("w4a4"), Run(device="cpu"), SHAPE)
    source = Source(EVERY["nearest"].synthesizer, job)
    for each in passes:
        each.apply(job, source)
    freeze(job.student)
    path = tmp_path / "student.safetensors"
    path.write_bytes(save_student(job.student, {}))
    loaded, _ = load_student(path, vit(seed=7), EXAMPLE)
    x = torch.randn(32, *SHAPE)
    assert torch.equal(loaded(x), job.student(x))
    assert float_tensors(loaded) == float_tensors(job.student)
    assert save_student(loaded, {}) == path.read_bytes()
