"""What every method promises, on networks small enough to run them all. Nobody is excused."""

import copy
from functools import partial

import pytest
import tiny
import torch
from torch.testing import assert_close

import zsq.api
import zsq.core.run
from zsq.api import find_method, load, quantize, resolve, synthesize
from zsq.core import (
    ALWAYS,
    FLOAT,
    Bits,
    Job,
    NoData,
    RecipeError,
    Run,
    Source,
    Teacher,
    UnsupportedModel,
    needs,
    smoke,
)
from zsq.methods import METHODS
from zsq.nets.graph import capture
from zsq.nets.load import load_network
from zsq.quant import InsertFakeQuant
from zsq.quant.quantizers import activation_quantizers, float_mode, weight_quantizers


def state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_makes_a_low_bit_network(method, result_of, photos):
    result = result_of(method)
    logits = result.student(photos)
    assert logits.shape == (16, 5)
    assert logits.isfinite().all()
    assert not result.student.training
    assert not any(parameter.requires_grad for parameter in result.student.parameters())
    assert weight_quantizers(result.student)
    assert activation_quantizers(result.student)


def test_every_channel_has_at_most_two_to_the_bits_weights(method, result_of):
    for name, (layer, quantizer) in weight_quantizers(result_of(method).student).items():
        assert quantizer.bits in (3, 8), name
        assert quantizer.codes.dtype == torch.uint8
        assert int(quantizer.codes.max()) < 2**quantizer.bits
        assert quantizer.high - quantizer.low == 2**quantizer.bits - 1
        assert all(channel.unique().numel() <= 2**quantizer.bits for channel in layer.weight)
    widths = {quantizer.bits for _, quantizer in weight_quantizers(result_of(method).student).values()}
    assert 3 in widths  # the widths asked for, and 8 only where a protocol says so


def test_every_quantized_edge_carries_at_most_two_to_the_bits_values(method, result_of, photos):
    seen = []
    quantizers = activation_quantizers(result_of(method).student).values()
    hooks = [each.register_forward_hook(lambda q, _, out: seen.append((q.bits, out))) for each in quantizers]
    result_of(method).student(photos)
    for hook in hooks:
        hook.remove()
    assert len(seen) >= len(quantizers)
    assert all(out.unique().numel() <= 2**bits for bits, out in seen)


@pytest.mark.parametrize("training", [True, False])
def test_the_network_handed_in_is_untouched(method, training, tmp_path):
    network = tiny.fitting(method).train(training)
    before, flags = state(network), [parameter.requires_grad for parameter in network.parameters()]
    quantize(network, method, "w4a4", out=tmp_path / "run", **tiny.settings(method))
    assert_same(state(network), before)
    assert all(module.training is training for module in network.modules())
    assert [parameter.requires_grad for parameter in network.parameters()] == flags
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


def test_the_teacher_is_untouched(method):
    recipe = smoke(find_method(method))
    teacher = Teacher(tiny.fitting(method))
    before = state(teacher.module)
    job = Job(teacher, capture(teacher.module, torch.zeros(2, *tiny.SHAPE)), Bits(), Run(device="cpu"), tiny.SHAPE)
    source = Source(recipe.synthesizer, job)
    for step in recipe.quantizer:
        step.apply(job, source)
    assert_same(state(teacher.module), before)
    assert not any(module.training for module in teacher.module.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.module.parameters())


def test_the_same_seed_gives_the_same_bits(method, result_of, photos):
    torch.rand(7)  # the global stream has no say
    again = quantize(tiny.fitting(method), method, "w3a4", seed=0, **tiny.settings(method))
    first = result_of(method)
    assert_same(state(again.student), state(first.student))
    assert torch.equal(again.student(photos), first.student(photos))


def test_global_randomness_is_neither_read_nor_moved(method):
    network, before = tiny.fitting(method), torch.get_rng_state()
    quantize(network, method, **tiny.settings(method))
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_makes_other_images(method, result_of):
    first, other = result_of(method), result_of(method, seed=1)
    if isinstance(first.recipe.synthesizer, NoData):
        assert first.images is None
        assert_same(state(first.student), state(other.student))
    else:
        assert not torch.equal(first.images.images, other.images.images)
        assert not all(torch.equal(a, b) for a, b in zip(*map(_values, (first, other)), strict=True))


def _values(result):
    return list(result.student.state_dict().values())


class Killed(Exception):
    pass


def test_a_run_that_dies_at_every_write_ends_with_the_same_bits(method, result_of, tmp_path, monkeypatch, photos):
    """Each process lives until one more file or step has been saved; the next continues in the same folder."""
    write = zsq.core.run.save_atomically

    def write_and_die(path, content):
        further = not path.exists() or path.name == "checkpoint.pt"
        write(path, content)
        if further:
            raise Killed

    deaths, student = 0, None
    while student is None:
        with monkeypatch.context() as patch:
            patch.setattr(zsq.core.run, "save_atomically", write_and_die)
            patch.setattr(zsq.api, "Run", partial(Run, save_every=0))  # a checkpoint at every step of a loop
            try:
                student = quantize(
                    tiny.fitting(method), method, "w3a4", out=tmp_path / "run", **tiny.settings(method)
                ).student
            except Killed:
                deaths += 1
    assert deaths >= 4  # identity, recipe, student, metrics, and every piece
    assert_same(state(student), state(result_of(method).student))
    assert torch.equal(student(photos), result_of(method).student(photos))


@pytest.mark.parametrize("network", ["cnn", "mobile", "gated"])
def test_a_saved_student_computes_the_same_bits(method, network, tmp_path, photos):
    model = tiny.fitting(method, network)
    result = quantize(model, method, "w3a4", out=tmp_path / "run", **tiny.settings(method))
    assert bool(result.metrics["untraced"]) == (network == "gated")
    student, found = load(tmp_path / "run", model)
    assert found.input_shape == tiny.SHAPE
    assert torch.equal(student(photos), result.student(photos))
    assert torch.equal(student(photos[:1]), result.student(photos[:1]))


def test_a_student_made_in_bfloat16_computes_the_same_bits_from_its_file(method, tmp_path, photos):
    model = tiny.fitting(method)
    result = quantize(model, method, "w3a4", out=tmp_path / "run", precision="bfloat16", **tiny.settings(method))
    assert result.metrics["precision"] == "bfloat16"
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in result.student.parameters())
    student, _ = load(tmp_path / "run", model)
    assert torch.equal(student(photos), result.student(photos))


def test_images_can_be_had_alone(method, result_of):
    model, recipe, settings = tiny.fitting(method), find_method(method), tiny.settings(method)
    if isinstance(recipe.synthesizer, NoData):
        with pytest.raises(RecipeError, match=f"{method} makes no images"):
            synthesize(model, method, 5, **settings)
        return
    batch, network = synthesize(model, method, 5, **settings)
    assert batch.images.shape == (5, *tiny.SHAPE)
    assert network.input_shape == tiny.SHAPE
    if recipe.synthesizer.live:  # what the generator makes after as many steps as beside the student
        assert torch.equal(batch.images, result_of(method).images.images[:5])


def test_another_teacher_is_refused_on_loading(method, tmp_path):
    quantize(tiny.fitting(method), method, out=tmp_path / "run", **tiny.settings(method))
    other = tiny.lively(tiny.fitting(method), seed=2)
    with pytest.raises(UnsupportedModel, match="other weights"):
        load(tmp_path / "run", other)


def test_every_leaf_can_be_overridden(method):
    recipe = find_method(method)
    leaves = dict(recipe.leaves())
    assert leaves
    assert recipe.override(leaves) == recipe
    for path, value in leaves.items():
        assert recipe.override({path: value}) == recipe, path


def test_every_preset_fits_its_own_images(method, job_for):
    recipe, teacher = find_method(method), job_for(tiny.fitting(method)).teacher
    for preset in ("paper", *recipe.presets):
        for effort in ("paper", "smoke", *({"fast"} & recipe.presets.keys())):
            resolved = resolve(method, preset=preset, effort=effort)
            if (preset, effort) == ("released", "smoke") and recipe.trains:
                with pytest.raises(RecipeError, match="take 200 steps to settle, got 3"):
                    resolved.check(teacher)
            else:
                resolved.check(teacher)


def test_nothing_is_printed(method, tmp_path, capfd):
    quantize(
        tiny.fitting(method), method, out=tmp_path / "run", **tiny.settings(method)
    )  # warnings are errors in all tests
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("network", ["cnn", "mobile", "gated"])
def test_with_quantizers_off_the_student_is_the_teacher(method, network, job_for, photos):
    model = tiny.fitting(method, network)
    job = job_for(model, bits="w2a2")
    insert = next(step for step in find_method(method).quantizer if isinstance(step, InsertFakeQuant))
    insert.apply(job, Source(NoData(), job))
    for quantizer in activation_quantizers(job.student).values():
        quantizer.set_range(torch.tensor(-0.5), torch.tensor(0.5))
    with torch.no_grad():
        assert not torch.allclose(job.student(photos), model(photos), atol=1e-2)
        with float_mode(job.student):
            assert_close(job.student(photos), model(photos), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", ["w2a2", "w3a5", "w5a3", "w6a7", "w7a6", "w8a8", "w4a32", "w32a4", "w32a32"])
def test_every_width_runs(method, bits, result_of, photos):
    result, asked = result_of(method, bits=bits), Bits.parse(bits)
    assert result.metrics["bits"] == str(asked)
    assert result.student(photos).isfinite().all()
    found = {quantizer.bits for _, quantizer in weight_quantizers(result.student).values()}
    assert found <= {asked.weights, 8} - {FLOAT}
    found = {quantizer.bits for quantizer in activation_quantizers(result.student).values()}
    assert found <= {asked.activations, 8} - {FLOAT}
    if bits == "w32a32":
        assert found == set()


def test_eight_bits_are_closer_than_two(method, result_of, photos):
    wanted = tiny.fitting(method)(photos).detach()
    error = {bits: (result_of(method, bits=bits).student(photos) - wanted).square().mean() for bits in ("w8a8", "w2a2")}
    assert error["w8a8"] < error["w2a2"]


def test_dead_channels_have_finite_scales(method, result_of, photos):
    student = result_of(method, network="dead").student
    scales = [quantizer.scale for _, quantizer in weight_quantizers(student).values()]
    scales += [quantizer.scale for quantizer in activation_quantizers(student).values()]
    assert all(scale.isfinite().all() and (scale > 0).all() for scale in scales)
    assert student(photos).isfinite().all()


@pytest.mark.parametrize("network", ["cnn", "plain", "vit"])
def test_a_network_without_what_is_looked_at_is_refused_and_another_works(method, network, job_for, photos):
    model = getattr(tiny, network)()
    shown = job_for(model).teacher.offers | ALWAYS
    missing = needs(find_method(method)) - shown
    if not missing:
        assert quantize(model, method, **tiny.settings(method)).student(photos).isfinite().all()
    else:
        with pytest.raises(UnsupportedModel) as refusal:
            quantize(model, method, **tiny.settings(method))
        words = {"bn": "BatchNorm layers with running statistics", "attention": "attention maps"}
        assert str(refusal.value).startswith(f"{method} reads ")
        assert all(words[name] in str(refusal.value) for name in missing & words.keys())
        fitting = [name for name, each in METHODS.items() if needs(each) <= shown]
        assert str(refusal.value).endswith(f"methods that fit: {', '.join(fitting)}")


def test_a_network_of_one_logit_is_refused_or_works(method, tmp_path, photos):
    network = tiny.with_one_logit(tiny.fitting(method))
    if "labels" not in needs(find_method(method)):
        assert quantize(network, method, **tiny.settings(method)).student(photos).shape == (16, 1)
    else:
        with pytest.raises(
            UnsupportedModel, match="makes images for classes, and this network has 1 logit; methods that"
        ):
            quantize(network, method, out=tmp_path / "run", **tiny.settings(method))
        assert not list(tmp_path.rglob("*.*"))


def test_a_refused_network_leaves_no_folder_behind(plain, tmp_path):
    with pytest.raises(UnsupportedModel):
        quantize(plain, "zeroq", out=tmp_path / "run", **tiny.settings("zeroq"))
    assert not list(tmp_path.rglob("*.*"))
    quantize(plain, "nearest", out=tmp_path / "run", **tiny.settings("nearest"))  # the folder is free


def test_a_network_object_is_left_where_it_is(method):
    network = load_network(tiny.fitting(method), input_shape=tiny.SHAPE)
    before = copy.deepcopy(network.module)
    quantize(network, method, **{**tiny.settings(method), "input_shape": None})
    assert_same(state(network.module), state(before))
    assert not any(module._forward_pre_hooks for module in network.module.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_an_accelerator_sees_the_same_noise(method, result_of):
    result = quantize(tiny.fitting(method).cuda(), method, "w3a4", **{**tiny.settings(method), "device": "cuda"})
    here = result_of(method)
    assert result.student(torch.zeros(1, *tiny.SHAPE, device="cuda")).isfinite().all()
    if here.images is not None:
        assert_close(result.images.images.cpu(), here.images.images, atol=0.1, rtol=0.1)
