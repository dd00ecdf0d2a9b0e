import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from zsq.core import RecipeError
from zsq.quant import REPQ_VIT_PASSES, MinMax, RidgeCorrection, Scheme
from zsq.quant.quantizers import ActivationQuantizer, float_weight, weight_quantizers
from zsq.quant.ridge import ridge_update
from zsq.synthesis import Noise


def problem(seed=0, tokens=200, inputs=6, outputs=4, bits=3):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens // 2, inputs, generator=rng, dtype=torch.float64) + 0.5
    quantizer = ActivationQuantizer(bits, Scheme()).double()
    quantizer.observe(MinMax())
    quantizer(x)
    quantizer.observe(None)
    weight = torch.randn(outputs, inputs, generator=rng, dtype=torch.float64)
    return x, quantizer.rounded(x), weight


def loss(x, rounded, weight, update):
    return (x @ weight.T - rounded @ (weight + update[:, :-1]).T - update[:, -1]).square().sum()


def test_exact_inputs_need_no_correction():
    x, _, weight = problem()
    assert ridge_update(x, x, weight, 10.0).abs().max() == 0


def test_an_endless_ridge_corrects_nothing():
    update = ridge_update(*problem(), 1e12)
    assert 0 < update.abs().max() < 1e-9


@given(st.integers(0, 2**31), st.sampled_from([0.1, 10.0, 1000.0]))
def test_the_error_of_the_calibration_data_never_rises(seed, ridge):
    x, rounded, weight = problem(seed)
    update = ridge_update(x, rounded, weight, ridge)
    zero = torch.zeros_like(update)
    found = loss(x, rounded, weight, update) + ridge * update.square().sum()
    assert found <= loss(x, rounded, weight, zero)
    for direction in (update, torch.randn(update.shape, dtype=torch.float64)):  # it is the minimum
        moved = update + 1e-3 * direction
        assert loss(x, rounded, weight, moved) + ridge * moved.square().sum() > found


def test_it_is_least_squares_with_rows_for_the_ridge():
    x, rounded, weight = problem()
    a = torch.cat([rounded.flatten(0, 1), torch.ones(200, 1, dtype=torch.float64)], 1)
    y = x.flatten(0, 1) @ weight.T - a[:, :-1] @ weight.T
    below = torch.cat([a, 5.0**0.5 * torch.eye(7, dtype=torch.float64)])
    expected = torch.linalg.lstsq(below, torch.cat([y, torch.zeros(7, 4, dtype=torch.float64)])).solution
    assert_close(ridge_update(x, rounded, weight, 5.0), expected.T)


def test_the_pass_updates_each_linear_on_its_own(vit, job_of, apply):
    job = job_of(vit)
    apply(job, *REPQ_VIT_PASSES, synthesizer=Noise(samples=16))
    student = job.student
    before = {
        name: (float_weight(layer).clone(), layer.bias.clone())
        for name, (layer, _) in weight_quantizers(student).items()
    }
    apply(job, RidgeCorrection(ridge=3.0, batch_size=5), synthesizer=Noise(samples=16))
    for name, (layer, quantizer) in weight_quantizers(student).items():
        weight, bias = before[name]
        changed = not torch.equal(float_weight(layer), weight) and not torch.equal(layer.bias, bias)
        assert changed == (name != "patches"), name
        assert quantizer.codes is None


def test_the_update_of_a_layer_is_that_of_its_float_input(vit, job_of, apply):
    job = job_of(vit)
    apply(job, *REPQ_VIT_PASSES, synthesizer=Noise(samples=16))
    student, name = job.student, "blocks.0.mlp.2"
    layer = student.get_submodule(name)
    quantizer = student.get_submodule("activation_quantizers.blocks_0_mlp_1")
    seen, weight = [], float_weight(layer).clone()
    hook = vit.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = Noise(samples=16).pixels.draw((16, 3, 8, 8), job.run.fresh("noise"))
    with torch.no_grad():
        vit(images)
    hook.remove()
    apply(job, RidgeCorrection(ridge=3.0), synthesizer=Noise(samples=16))
    update = ridge_update(seen[0], quantizer.rounded(seen[0]), weight, 3.0)
    assert_close(float_weight(layer) - weight, update[:, :-1].float(), rtol=1e-3, atol=1e-5)


def test_a_ridge_is_positive():
    with pytest.raises(RecipeError, match="a ridge must be positive"):
        RidgeCorrection(ridge=0.0)
