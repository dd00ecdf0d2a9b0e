import argparse
import subprocess
import sys
import textwrap
import urllib.error

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from zsq import compat
from zsq.core.errors import CheckpointError, MissingExtra, RecipeError, UnsupportedModel
from zsq.nets.load import Network, check_network, load_network, read_checkpoint
from zsq.zoo import load_weights
from zsq.zoo.pytorchcv import to_pytorchcv

SHAPE = (3, 4, 4)


def tiny() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5))


class Returning(nn.Module):
    """Applies a function to images that went through one linear layer (N, 5)."""

    def __init__(self, function) -> None:
        super().__init__()
        self.body, self.function = tiny(), function

    def forward(self, x):
        return self.function(self.body(x))


# -- sources ------------------------------------------------------------------------------------------------------


def test_a_module_is_copied_and_put_in_eval_mode():
    module = tiny()
    network = load_network(module, input_shape=SHAPE)
    assert network.module is not module
    assert module.training
    assert not network.module.training
    assert (network.name, network.input_shape, network.classes) == ("Sequential", SHAPE, 5)


def test_mean_and_std_are_imagenets_for_three_channels_and_plain_otherwise():
    colour = load_network(tiny(), input_shape=SHAPE)
    assert (colour.mean, colour.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    two = load_network(nn.Sequential(nn.Flatten(), nn.Linear(8, 2)), input_shape=(2, 2, 2))
    assert (two.mean, two.std) == ((0.0, 0.0), (1.0, 1.0))
    own = load_network(tiny(), input_shape=SHAPE, mean=[0, 0, 0], std=[1, 2, 3])
    assert (own.mean, own.std) == ((0.0, 0.0, 0.0), (1.0, 2.0, 3.0))


def test_a_zoo_network_brings_its_own_facts():
    network = load_network("zoo:digits-resnet")
    assert (network.name, network.input_shape, network.classes) == ("digits-resnet", (1, 8, 8), 10)
    assert network.mean == (0.3048,)
    with pytest.raises(UnsupportedModel, match="no network 'digit-resnet' in the zoo: it has digits-resnet"):
        load_network("zoo:digit-resnet")


def test_a_network_without_weights_starts_the_same_each_time_and_moves_no_global_random_state():
    before = torch.get_rng_state()
    one, two = (load_network("zoo:digits-resnet", pretrained=False).module.state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["stem.0.weight"], load_weights("digits-resnet").state_dict()["stem.0.weight"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the user's code; the working directory is another one."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "helper_of_mine.py").write_text("WIDTH = 48\n")
    (tmp_path / "code" / "nets_of_mine.py").write_text(
        textwrap.dedent("""\
            from torch import nn
            from helper_of_mine import WIDTH
            def small():
                return nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, 5))
            def broken():
                return 1 / 0
            def leaves():
                raise SystemExit("usage: ...")
            def number():
                return 3
            def asks(depth):
                return None
            ready = small()
        """)
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield tmp_path / "code"
    for name in ("helper_of_mine", "nets_of_mine"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("factory", ["small", "ready"])
def test_a_factory_in_a_file_of_another_folder(folder, factory):
    path = list(sys.path)
    network = load_network(f"{folder}/nets_of_mine.py:{factory}", input_shape=SHAPE)
    assert (network.name, network.classes) == (factory, 5)
    assert sys.path == path


def test_a_factory_of_a_package(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert load_network("nets_of_mine:small", input_shape=SHAPE).classes == 5


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nets_of_mine.py:broken", r"nets_of_mine\.py:6: ZeroDivisionError: division by zero$"),
        ("nets_of_mine.py:leaves", r"nets_of_mine\.py:8: SystemExit: usage: \.\.\.$"),
        ("nets_of_mine.py:number", "number in .* gives a int, not a torch.nn.Module"),
        ("nets_of_mine.py:asks", r"TypeError: asks\(\) missing 1 required positional argument"),
        ("nets_of_mine.py:smal", "has no 'smal': it has small$"),
        ("nothing.py:small", r"no file .*nothing\.py"),
    ],
)
def test_errors_in_the_users_file_are_one_line_with_file_and_line(folder, model, message):
    with pytest.raises(UnsupportedModel, match=message) as caught:
        load_network(f"{folder}/{model}", input_shape=SHAPE)
    assert "\n" not in str(caught.value)


def test_a_syntax_error_and_a_missing_import_have_their_line(folder):
    (folder / "syntax.py").write_text("x = 1\ndef f(:\n")
    (folder / "imports.py").write_text("\n\nimport not_a_module_of_anybody\n")
    with pytest.raises(UnsupportedModel, match=r"syntax\.py:2: SyntaxError"):
        load_network(f"{folder}/syntax.py:f")
    with pytest.raises(UnsupportedModel, match=r"imports\.py:3: ModuleNotFoundError: No module named 'not_a_mod"):
        load_network(f"{folder}/imports.py:f")


@pytest.mark.parametrize("model", ["resnet18", "", ":", "resnet18:", "tv:resnet18"])
def test_what_names_nothing_is_answered_with_the_forms(model):
    with pytest.raises(UnsupportedModel, match="the forms are zoo:NAME, torchvision:NAME, timm:NAME"):
        load_network(model)


# -- torchvision and timm -----------------------------------------------------------------------------------------


def test_torchvision_networks_bring_the_facts_of_their_default_weights(vision, tmp_path):
    network = load_network("torchvision:squeezenet1_1", pretrained=False)
    assert (network.input_shape, network.classes) == ((3, 224, 224), 1000)
    assert network.mean == (0.485, 0.456, 0.406)
    with pytest.raises(UnsupportedModel, match=r"torchvision has no network 'resnet81': close matches are .*resnet18"):
        load_network("torchvision:resnet81")


def test_timm_networks_bring_the_facts_of_their_configuration(vision):
    network = load_network("timm:test_resnet", pretrained=False)
    assert (network.input_shape, network.classes) == ((3, 160, 160), 1000)
    assert network.mean == pytest.approx(vision.data.resolve_model_data_config(network.module)["mean"])
    with pytest.raises(UnsupportedModel, match=r"timm has no network 'test_resnt': close matches are .*test_resnet"):
        load_network("timm:test_resnt")
    with pytest.raises(UnsupportedModel, match=r"Invalid pretrained tag \(nope\)"):
        load_network("timm:test_resnet.nope")


@pytest.mark.parametrize("model", ["torchvision:squeezenet1_1", "timm:test_resnet"])
def test_offline_names_the_way_out_and_a_checkpoint_downloads_nothing(vision, monkeypatch, tmp_path, model):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    import timm.models._builder
    import torchvision.models._api

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", offline)
    with pytest.raises(MissingExtra, match=f"could not download {model} .*: give --checkpoint FILE, or run where"):
        load_network(model)
    state = load_network(model, pretrained=False).module.state_dict()
    state = {key: value / 2 if value.is_floating_point() else value for key, value in state.items()}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    loaded = load_network(model, checkpoint=tmp_path / "a.safetensors").module.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


FAKE_TORCHVISION = """
import torch
import torchvision.part
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: None)
torch.library.register_fake("torchvision::qnms")(lambda dets, scores, iou_threshold: None)
__version__ = "0"
"""


def test_a_torchvision_without_its_operators_imports_and_warns_once(tmp_path):
    # In a process of its own: schemas are declared for the whole life of a process.
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "part.py").write_text("")
    (tmp_path / "torchvision" / "__init__.py").write_text(FAKE_TORCHVISION)
    code = f"""
        import sys, warnings
        sys.path.insert(0, {str(tmp_path)!r})
        from zsq.compat import import_torchvision
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert import_torchvision() is import_torchvision() is sys.modules["torchvision"]
        print(sum("built for another torch" in str(w.message) for w in seen))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("1", "")


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Puts a package ``torchvision`` with this code in front of the real one."""

    def package(code: str) -> None:
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)

    for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "timm")]:
        monkeypatch.delitem(sys.modules, name)
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]


def test_a_torchvision_that_works_declares_nothing(pretend, monkeypatch):
    monkeypatch.setattr(torch.library, "Library", None)
    pretend("")
    assert compat.import_torchvision().__name__ == "torchvision"


def test_another_runtime_error_is_not_hidden(pretend):
    pretend("raise RuntimeError('something else')")
    with pytest.raises(RuntimeError, match="something else"):
        compat.import_torchvision()


def test_what_is_not_installed_names_the_extra(pretend, monkeypatch):
    pretend("raise ImportError('libcudart.so')")
    with pytest.raises(
        MissingExtra, match=r"torchvision does not import \(libcudart.so\): pip install 'zsq\[vision\]'"
    ):
        load_network("torchvision:resnet18")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingExtra, match=r"torchvision is not installed: pip install 'zsq\[vision\]'"):
        load_network("timm:resnet18")


def test_importing_the_loaders_imports_no_extra():
    code = (
        "import sys, zsq.api, zsq.evaluate, zsq.nets.load, zsq.zoo\n"
        "print([m for m in ('torchvision', 'timm', 'sklearn', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# -- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap", [dict, lambda state: {"state_dict": state, "epoch": 3}, lambda state: {"model": state}]
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_load_from_their_usual_wrappings(tmp_path, wrap, prefix):
    state = tiny().state_dict()
    torch.save(wrap({prefix + key: value for key, value in state.items()}), tmp_path / "a.pt")
    loaded = load_network(tiny(), checkpoint=tmp_path / "a.pt", input_shape=SHAPE).module.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_the_zoos_resnet20_takes_pytorchcvs_names(tmp_path):
    state = load_weights("resnet20-cifar10").state_dict()
    safetensors.torch.save_file(to_pytorchcv(state), tmp_path / "a.safetensors")
    loaded = load_network("zoo:resnet20-cifar10", checkpoint=tmp_path / "a.safetensors").module.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"1.weight": torch.ones(5, 48)}, r"a\.pt does not fit Sequential: 1 missing \(1\.bias\)"),
        (
            {"1.weight": torch.ones(5, 48), "1.bias": torch.ones(5), **{f"a{n}": torch.ones(1) for n in range(4)}},
            r"4 unexpected \(a0, a1, a2, \.\.\.\)",
        ),
        ({"1.weight": torch.ones(2, 48), "1.bias": torch.ones(5)}, r"1\.weight is \(2, 48\), not \(5, 48\)"),
        ({"1.weight": torch.ones(5, 48), "1.bias": torch.full((5,), torch.nan)}, r"1\.bias of Sequential has NaN"),
        ({"1.weight": torch.ones(5, 48), "epoch": 3}, r"more than tensors by name: epoch"),
        ({}, "holds no tensors"),
        (torch.ones(3), "holds one Tensor"),
        ({"model": tiny().state_dict(), "args": argparse.Namespace()}, "it holds argparse.Namespace, which could run"),
        (tiny(), r"it holds torch\.nn\.modules\.container\.Sequential, which could run code"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_why(tmp_path, state, message):
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        load_network(tiny(), checkpoint=tmp_path / "a.pt", input_shape=SHAPE)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and no more"])
def test_a_damaged_checkpoint_is_reported(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is not a file of tensors \(it is damaged or of another kind"):
        read_checkpoint(tmp_path / name)


def test_a_missing_checkpoint_is_reported_before_anything_is_built(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_network("timm:resnet18", checkpoint=tmp_path / "a.pt")


# -- what a network must be ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Returning(lambda y: F.dropout(y, 0.5)), "changes its output in eval mode"),
        (Returning(lambda y: (y, y)), "returns a tuple: it must return logits"),
        (Returning(lambda y: {"out": y}), "returns a dict: it must return logits"),
        (Returning(lambda y: y[:, :, None]), r"returns a tensor \(1, 5, 1\)"),
        (Returning(lambda y: y[:1]), r"returns \(1, 5\) for 2 images, expected \(2, 5\)"),
        (Returning(lambda y: y.view(1, 5)), r"does not run on images \(2, 3, 4, 4\): RuntimeError: shape '\[1, 5\]'"),
        (Returning(lambda y: y / 0), "returns NaN or infinite logits"),
        (nn.Linear(7, 2), r"Linear does not run on images \(1, 3, 4, 4\): RuntimeError: mat1 and mat2"),
    ],
)
def test_networks_that_cannot_be_quantized_are_refused_in_one_line(module, message):
    with pytest.raises(UnsupportedModel, match=message) as caught:
        load_network(module, input_shape=SHAPE)
    assert "\n" not in str(caught.value)


def test_a_damaged_buffer_is_named():
    module = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Flatten())
    module[1].running_mean[1] = torch.inf
    with pytest.raises(CheckpointError, match=r"1\.running_mean of Sequential has NaN or infinite values \(1 of 2\)"):
        load_network(module, input_shape=SHAPE)


def test_training_mode_is_refused_with_the_name_of_the_layer():
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval()
    module[1].train()
    network = Network(module, "mine", SHAPE, (0.0,) * 3, (1.0,) * 3, 5)
    with pytest.raises(UnsupportedModel, match=r"1 is in training mode: call \.eval\(\)"):
        check_network(network)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "input shape of Sequential is not known: give input_shape"),
        ({"input_shape": (3, 4)}, r"input_shape is \(3, 4\)"),
        ({"input_shape": (3, 4, 0)}, r"input_shape is \(3, 4, 0\)"),
        ({"input_shape": SHAPE, "mean": (0.5,)}, "takes 3 channels, so give 3 numbers each"),
        ({"input_shape": SHAPE, "std": (1, 1, 0)}, "std above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        load_network(tiny(), **settings)
