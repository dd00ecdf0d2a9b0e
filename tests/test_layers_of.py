import json
import math

import pytest
import tiny
import torch
from torch import nn
from torch.testing import assert_close

from zsq.api import load, quantize
from zsq.cli import main
from zsq.core import DataError, RecipeError
from zsq.layers import Sums, decibels, inspect_layers, layers_of, represented
from zsq.nets.load import load_network
from zsq.quant.quantizers import activation_quantizers, weight_quantizers


def inspected(network: nn.Module, method: str, bits: str, photos: torch.Tensor, **more):
    """The layers of a student on ``photos``, the student and its network."""
    student = quantize(network, method, bits, estimate=False, **tiny.settings(method), **more).student
    about = load_network(network, input_shape=tiny.SHAPE)
    return inspect_layers(student, about, photos), student, about


# --- the numbers ------------------------------------------------------------------------------------------------


def test_decibels_by_hand():
    assert decibels(1000.0, 1.0) == 30.0
    assert decibels(5.0, 0.0) == 200.0
    assert decibels(0.0, 0.0) == 200.0
    assert decibels(0.0, 1.0) == -200.0
    assert decibels(1.0, math.nan) == -200.0


def test_signal_to_noise_by_hand():
    sums = Sums()
    sums.add(torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 0.5]]))
    sums.add(torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 4.0]]))
    # signal 9 + 16, noise 1/4: 100 times
    assert sums.snr() == pytest.approx(20.0)


def test_aligned_channels_are_compared_up_to_scale_and_offset():
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scale, offset = torch.tensor([2.0, 0.1, 5.0])[:, None, None], torch.tensor([1.0, 0.0, -3.0])[:, None, None]
    sums = Sums()
    sums.add(x, x * scale + offset)
    assert sums.snr() < 0
    assert sums.snr(aligned=True) > 100
    noisy = Sums()
    noise = torch.randn(2000, 1, generator=torch.Generator().manual_seed(1))
    signal = torch.randn(2000, 1, generator=torch.Generator().manual_seed(2))
    noisy.add(signal, 3 * (signal + 0.1 * noise) + 7)
    assert noisy.snr(aligned=True) == pytest.approx(20.0, abs=0.3)  # a noise of a tenth


def test_a_layer_that_never_ran_has_no_noise():
    assert Sums().snr() == 200.0


# --- one layer at a time ----------------------------------------------------------------------------------------


def test_without_quantizers_nothing_hurts(photos):
    found, _, _ = inspected(tiny.cnn(), "nearest", "w32a32", photos)
    assert found.agreement == 100
    assert found.kl < 1e-6
    assert all(layer.snr > 100 for layer in found.layers)
    assert all((layer.weight_bits, layer.input_bits, layer.weight_snr) == (None, None, None) for layer in found.layers)
    assert all(layer.kl < 1e-6 and layer.agreement == 100 for layer in found.layers)


@pytest.mark.parametrize("network", ["cnn", "mobile", "gated", "vit"])
def test_a_layer_alone_is_the_teacher_with_that_layer_quantized(network, photos):
    """The same by hand: the weight of one layer of the float network replaced, no activation quantized."""
    model = getattr(tiny, network)()
    found, student, about = inspected(model, "nearest", "w3a32", photos)
    names = list(weight_quantizers(student))
    assert [layer.name for layer in found.layers] == names
    with torch.no_grad():
        exact = about.module(photos).double().log_softmax(1)
        for layer in found.layers:
            before = about.module.get_submodule(layer.name).weight.clone()
            about.module.get_submodule(layer.name).weight.copy_(student.get_submodule(layer.name).weight)
            changed = about.module(photos).double().log_softmax(1)
            about.module.get_submodule(layer.name).weight.copy_(before)
            kl = float((exact.exp() * (exact - changed)).sum(1).mean())
            assert layer.kl == pytest.approx(kl, abs=2e-6)
            assert layer.agreement == pytest.approx(100 * (exact.argmax(1) == changed.argmax(1)).double().mean().item())
            gap = (student.get_submodule(layer.name).weight - before).square().sum() / before.square().sum()
            assert layer.weight_snr == pytest.approx(-10 * math.log10(gap), abs=0.01)
    assert sum(layer.kl > 1e-4 for layer in found.layers) >= 3
    assert found.worst[0].kl == max(layer.kl for layer in found.layers)


def test_noise_is_that_of_the_student_against_the_teacher(photos):
    model = tiny.cnn()
    found, student, about = inspected(model, "nearest", "w4a4", photos)
    seen: dict[str, list[torch.Tensor]] = {}
    for graph in (about.module, student):
        for layer in found.layers:
            graph.get_submodule(layer.name).register_forward_hook(
                lambda _, __, output, name=layer.name: seen.setdefault(name, []).append(output.detach())
            )
        graph(photos)
    for layer in found.layers:
        signal, other = seen[layer.name]
        expected = 10 * math.log10(signal.square().sum() / (other - signal).square().sum())
        assert layer.snr == pytest.approx(expected, abs=0.02)


def test_the_input_of_a_layer_is_quantized_with_it(photos):
    """Weights float: what a layer alone costs is what its input's quantizer costs."""
    found, student, _ = inspected(tiny.cnn(), "nearest", "w32a3", photos)
    assert activation_quantizers(student)
    reading = [layer for layer in found.layers if layer.input_bits == 3]
    assert len(reading) >= 3
    assert any(layer.kl > 1e-4 for layer in reading)
    assert all(layer.kl < 1e-6 for layer in found.layers if layer.input_bits is None)
    for layer in reading:
        low, high = layer.input_range
        assert low < high
        assert sum(layer.inputs.counts) > 0
        assert layer.inputs.low >= low or layer.clipped > 0


def test_folded_layers_are_compared_with_the_folded_teacher(photos):
    found, _, _ = inspected(tiny.cnn(), "nearest", "w8a8", photos, protocol="ort-x86")
    assert not found.aligned
    assert all(layer.snr > 15 for layer in found.layers)
    assert all(layer.kl < 0.05 for layer in found.layers)


def test_a_method_that_moves_scales_is_compared_up_to_them(photos):
    found, student, _ = inspected(tiny.mobile(), "dfq", "w8a8", photos)
    assert any(edit[0] == "equivariant" for edit in student.meta["edits"])
    assert found.aligned
    assert all(layer.kl is None and layer.agreement is None for layer in found.layers)
    assert all(layer.snr > 10 for layer in found.layers)
    assert found.worst[0].snr == min(layer.snr for layer in found.layers)


def test_histograms_count_everything(photos):
    found, _, about = inspected(tiny.cnn(), "nearest", "w4a4", photos)
    first = found.layers[0]
    weight = about.module.get_submodule(first.name).weight.detach()
    assert sum(first.weights.counts) == weight.numel()
    assert (first.weights.low, first.weights.high) == (float(weight.min()), float(weight.max()))
    assert sum(first.inputs.counts) == photos.numel()
    assert (first.inputs.low, first.inputs.high) == (float(photos.min()), float(photos.max()))


def test_what_is_clipped_lies_beyond_the_range(photos):
    found, student, about = inspected(tiny.cnn(), "nearest", "w4a4", photos)
    reads = {}
    for layer in found.layers:
        about.module.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, read, name=layer.name: reads.update({name: read[0].detach()})
        )
    about.module(photos * 3)
    again = inspect_layers(student, about, photos * 3)
    for layer in again.layers:
        if layer.input_range is not None:
            low, high = layer.input_range
            beyond = ((reads[layer.name] < low) | (reads[layer.name] > high)).double().mean()
            assert layer.clipped == pytest.approx(100 * float(beyond), abs=1e-3)
    assert any(layer.clipped for layer in again.layers if layer.clipped is not None)


def test_a_range_reaches_half_a_step_beyond_its_ends():
    from zsq.quant.grid import Scheme
    from zsq.quant.quantizers import ActivationQuantizer

    quantizer = ActivationQuantizer(2, Scheme())
    quantizer.set_range(torch.tensor(0.0), torch.tensor(3.0), signed=False)  # 0, 1, 2, 3
    assert_close(torch.tensor(represented(quantizer)), torch.tensor([-0.5, 3.5]))


def test_nothing_is_changed(photos):
    model = tiny.cnn()
    student = quantize(model, "squant", "w3a3", estimate=False, **tiny.settings("squant")).student
    about = load_network(model, input_shape=tiny.SHAPE)
    before = {name: tensor.clone() for name, tensor in (*student.state_dict().items(), *model.state_dict().items())}
    logits = student(photos)
    inspect_layers(student, about, photos)
    after = dict((*student.state_dict().items(), *model.state_dict().items()))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(student(photos), logits)
    assert not any(module._forward_hooks for module in (*student.modules(), *about.module.modules()))


# --- runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("runs")
    for method in ("zeroq", "dfq"):
        quantize("zoo:digits-resnet", method, "w4a4", effort="smoke", device="cpu", out=folder / method)
    return folder


def test_the_command(runs, capsys):
    assert main(["layers", str(runs / "zeroq")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["layer", "kind", "weight", "input"]
    assert len([line for line in lines if " Conv2d " in line]) == 21
    assert lines[-2].endswith("64 held-out images")
    assert lines[-1].startswith("Hurt most, of the divergence that layers cause alone: ")
    assert main(["layers", str(runs / "zeroq"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["layers"]) == 22
    worst = max(facts["layers"], key=lambda layer: layer["kl"])["name"]
    assert f": {worst} (" in lines[-1]


def test_own_images(runs):
    own, other = layers_of(runs / "zeroq", "own"), layers_of(runs / "zeroq")
    assert own.images == 8  # of a smoke run
    assert own.source == "own"
    assert own.layers[0].inputs != other.layers[0].inputs
    assert layers_of(runs / "zeroq") == other


def test_a_run_without_images_has_none_of_its_own(runs, capsys):
    with pytest.raises(DataError, match="holds no images"):
        layers_of(runs / "dfq", "own")
    assert main(["layers", str(runs / "dfq")]) == 0
    assert "moved scales between channels" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="own or held-out"):
        layers_of(runs / "dfq", "real")
    assert main(["layers", str(runs)]) == 2
    assert "holds no finished run" in capsys.readouterr().err


def test_a_loaded_student_is_inspected_like_the_one_that_was_made(photos, tmp_path):
    model = tiny.vit()
    made = quantize(model, "nearest", "w4a4", out=tmp_path / "run", estimate=False, **tiny.settings("nearest"))
    student, about = load(tmp_path / "run", model)
    assert inspect_layers(student, about, photos) == inspect_layers(made.student, about, photos)
