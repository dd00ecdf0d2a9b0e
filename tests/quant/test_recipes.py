from dataclasses import replace

import pytest
import tiny
import torch

from zsq.api import load, protocol_of, quantize, resolve
from zsq.methods import BASELINES, METHODS
from zsq.quant import MINMAX_PTQ, MINMAX_VIT, REPQ_VIT, Calibrate, Log2, LogSqrt2, PercentileSearch, ReconstructBlocks
from zsq.quant.quantizers import activation_quantizers
from zsq.quant.recipes import MINMAX_VIT_PASSES, REPQ_VIT_PASSES, under


def kinds(method):
    return [type(step).__name__ for step in method.quantizer]


def test_repq_vit_brings_its_ranges_and_its_reparameterization():
    recipe = resolve("nearest", protocol="repq-vit")
    assert recipe.quantizer == REPQ_VIT_PASSES
    assert recipe.quantizer[0].range == recipe.quantizer[1].range == PercentileSearch()
    assert protocol_of(recipe) == REPQ_VIT
    assert recipe.synthesizer == BASELINES["nearest"].synthesizer


def test_minmax_vit_sees_the_float_network():
    assert resolve("nearest", protocol="minmax-vit").quantizer == MINMAX_VIT_PASSES
    assert Calibrate(samples=32, batch_size=32, inputs="float") in MINMAX_VIT_PASSES


def test_passes_that_are_no_calibration_stay_in_their_order():
    genie, dfq = under(METHODS["genie"], REPQ_VIT), under(METHODS["dfq"], REPQ_VIT)
    assert kinds(genie) == ["InsertFakeQuant", "Calibrate", "Reparameterize", "ReconstructBlocks"]
    assert next(s for s in genie.quantizer if isinstance(s, ReconstructBlocks)) in METHODS["genie"].quantizer
    own = kinds(METHODS["dfq"])
    place = own.index("InsertFakeQuant")
    brought = ["InsertFakeQuant", "Calibrate", "Reparameterize"]
    assert kinds(dfq) == [*own[:place], *brought, *own[place + 1 :]]


@pytest.mark.parametrize("name", [*METHODS, *BASELINES])
def test_other_protocols_change_the_places_alone(name):
    method = {**METHODS, **BASELINES}[name]
    assert kinds(under(method, MINMAX_PTQ)) == kinds(method)
    assert protocol_of(under(method, MINMAX_PTQ)) == MINMAX_PTQ


def test_a_changed_protocol_keeps_what_goes_with_its_name():
    changed = replace(REPQ_VIT, probabilities=Log2())
    recipe = under(BASELINES["nearest"], changed)
    assert protocol_of(recipe) == changed
    assert kinds(recipe) == ["InsertFakeQuant", "Calibrate", "Reparameterize"]


def test_single_values_and_efforts_reach_the_passes_that_were_brought():
    recipe = resolve("nearest", protocol="repq-vit", effort="smoke", overrides={"quantizer.calibrate.samples": 6})
    assert recipe.quantizer[1].samples == 6
    assert recipe.quantizer[1].batch_size == 4
    settings = {"quantizer.insert_fake_quant.protocol.probabilities": "float"}
    assert resolve("nearest", protocol="repq-vit", overrides=settings).quantizer[0].protocol.probabilities == "float"
    assert resolve("nearest", protocol="minmax-vit").quantizer[0].protocol == MINMAX_VIT


@pytest.mark.parametrize("method", ["psaq-vit", "smi", "nearest"])
@pytest.mark.parametrize("protocol", ["minmax-vit", "repq-vit", "deploy-vit"])
def test_protocols_on_a_transformer_from_any_images(method, protocol, tmp_path):
    network, photos = tiny.vit(), torch.randn(16, *tiny.SHAPE, generator=torch.Generator().manual_seed(1))
    settings = tiny.settings(method)
    result = quantize(network, method, "w4a4", protocol=protocol, out=tmp_path / "run", **settings)
    assert result.metrics["protocol"] == protocol
    student, _ = load(tmp_path / "run", network)
    assert torch.equal(student(photos), result.student(photos))
    quantizers = activation_quantizers(result.student).values()
    assert all(quantizer.ready and quantizer.scale.dim() == 0 for quantizer in quantizers)
    logarithmic = [quantizer for quantizer in quantizers if quantizer.scheme == LogSqrt2()]
    assert len(logarithmic) == (2 if protocol == "repq-vit" else 0)
