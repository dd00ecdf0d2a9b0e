import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from vits import vit as small_vit

from zsq.quant import (
    REPQ_VIT,
    REPQ_VIT_PASSES,
    Calibrate,
    InsertFakeQuant,
    PercentileSearch,
    PowerOfTwoFactors,
    Reparameterize,
    Scheme,
)
from zsq.quant.layers import edge_of
from zsq.quant.quantizers import (
    activation_quantizers,
    float_mode,
    float_weight,
    weight_quantizer,
    weight_quantizers,
)
from zsq.synthesis import Noise

INSERT, CALIBRATE, REPARAMETERIZE = REPQ_VIT_PASSES


def norms(student):
    """The quantizers behind LayerNorms by the name of the LayerNorm."""
    found = {edge_of(student, name).source.name: q for name, q in activation_quantizers(student).items()}
    return {name: q for name, q in found.items() if "norm" in name and name != "norm"}


def codes(quantizer, x):
    return ((x / quantizer.scale).round() + quantizer.zero_point).clamp(quantizer.low, quantizer.high)


def outputs(student, names, images):
    """What the LayerNorms ``names`` put out."""
    seen = {}
    modules = {name: student.get_submodule(name.replace("s_", "s.").replace("_norm", ".norm")) for name in names}
    hooks = [
        m.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out})) for name, m in modules.items()
    ]
    with torch.no_grad(), float_mode(student):
        logits = student(images)
    for hook in hooks:
        hook.remove()
    return seen, logits


@pytest.fixture
def calibrated(vit, job_of, apply):
    job = job_of(vit)
    apply(job, INSERT, CALIBRATE, synthesizer=Noise(samples=32))
    return job


def test_the_float_function_and_every_code_stay(calibrated, vit, images, apply):
    student = calibrated.student
    before = {name: copy.deepcopy(quantizer) for name, quantizer in norms(student).items()}
    assert {q.scale.shape for q in before.values()} == {(8,)}
    spread = [(q.scale.max() / q.scale.min()).item() for q in before.values()]
    assert min(spread) > 3
    old, logits = outputs(student, before, images)
    assert_close(logits, vit(images), rtol=0, atol=1e-5)
    apply(calibrated, REPARAMETERIZE)
    new, merged = outputs(student, before, images)
    assert_close(merged, logits, rtol=0, atol=1e-5 * logits.abs().max().item())
    for name, quantizer in norms(student).items():
        assert quantizer.scale.shape == ()
        assert quantizer.zero_point.dtype == torch.int32
        assert quantizer.scheme == Scheme()
        assert_close(quantizer.scale.detach(), before[name].scale.mean().detach())
        per_tensor, per_channel = codes(quantizer, new[name]), codes(before[name], old[name])
        ties = (old[name] / before[name].scale % 1 - 0.5).abs() < 1e-4  # which rounding may move
        assert torch.equal(per_tensor[~ties], per_channel[~ties])
        assert ties.float().mean() < 0.01


def test_by_hand(job_of, apply):
    """Two channels: s = 1, 3 and z = 4, 0: S = 2, Z = 2, r = 1/2, 3/2, shift (z - Z) S = 4, -4."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(2), nn.Linear(2, 1, bias=False)

        def forward(self, x):
            return self.linear(self.norm(x.reshape(-1, 4, 2))).flatten(1)

    network = Net().eval()
    network.norm.weight.data, network.norm.bias.data = torch.tensor([1.0, 6.0]), torch.tensor([2.0, 3.0])
    network.linear.weight.data = torch.tensor([[10.0, 20.0]])
    job = job_of(network, "w32a4", (1, 4, 2))
    apply(job, InsertFakeQuant(protocol=REPQ_VIT))
    (quantizer,) = norms(job.student).values() if norms(job.student) else activation_quantizers(job.student).values()
    quantizer.bits = 4
    quantizer.set_range(torch.tensor([-4.0, 0.0]), torch.tensor([11.0, 45.0]))
    assert quantizer.scale.tolist() == [1, 3]
    assert quantizer.zero_point.tolist() == [4, 0]
    apply(job, Reparameterize())
    student = job.student
    assert (quantizer.scale.item(), quantizer.zero_point.item()) == (2, 2)
    assert student.norm.weight.tolist() == [2, 4]  # gamma / r
    assert student.norm.bias.tolist() == [2 / 0.5 + 4, 3 / 1.5 - 4]
    assert student.linear.weight.tolist() == [[5, 30]]
    assert student.linear.bias.tolist() == [-(5 * 4) - (30 * -4)]
    assert student.meta["edits"] == [["complete", "linear"]]


def test_weights_are_fitted_to_what_they_became(calibrated, apply):
    student = calibrated.student
    before = {name: q.scale.clone() for name, (_, q) in weight_quantizers(student).items()}
    apply(calibrated, REPARAMETERIZE)
    for name, (layer, quantizer) in weight_quantizers(student).items():
        fresh = INSERT.range.of(float_weight(layer).detach().flatten(1), 4, REPQ_VIT.weights, True)
        if isinstance(layer, nn.Linear):
            assert_close(quantizer.scale.flatten().detach(), ((fresh[1] - fresh[0]) / 15))
        moved = not torch.equal(before[name], quantizer.scale)
        assert moved == ("qkv" in name or ".q" in name or ".k" in name or ".v" in name or "mlp.0" in name), name
    assert weight_quantizer(student.get_submodule("blocks.1.attention.q")).again is not None


def test_a_second_time_nothing_is_left_to_merge(calibrated, apply):
    apply(calibrated, REPARAMETERIZE)
    before = {name: value.clone() for name, value in calibrated.student.state_dict().items()}
    apply(calibrated, REPARAMETERIZE)
    after = calibrated.student.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_linear_that_runs_twice_keeps_its_weight(job_of, apply, images):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(self.linear(self.norm(x))).flatten(1)

    job = job_of(Net().eval())
    apply(job, INSERT, CALIBRATE, Reparameterize(), synthesizer=Noise(samples=8))
    assert {tuple(q.scale.shape) for q in activation_quantizers(job.student).values()} == {(8,), ()}
    assert job.student(images).isfinite().all()


def test_a_layer_norm_without_parameters_gets_some(job_of, apply, images):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 5, bias=False)

        def forward(self, x):
            return self.linear(self.norm(x * torch.arange(1.0, 9))).flatten(1)

    network = Net().eval()
    job = job_of(network)
    apply(job, INSERT, CALIBRATE, Reparameterize(), synthesizer=Noise(samples=8))
    with torch.no_grad(), float_mode(job.student):
        assert_close(job.student(images), network(images), atol=1e-5, rtol=0)
    assert job.student.meta["edits"] == [["complete", "norm"], ["complete", "linear"]]


def test_exponents_of_channels_can_be_merged_too(job_of, apply, images, vit):
    job = job_of(vit, "w8a8")
    insert = replace(INSERT, protocol=replace(REPQ_VIT, norms=PowerOfTwoFactors()))
    apply(job, insert, Calibrate(), Reparameterize(), synthesizer=Noise(samples=32))
    assert {q.scale.shape for q in norms(job.student).values()} == {()}
    with torch.no_grad(), float_mode(job.student):
        assert_close(job.student(images), vit(images), atol=1e-4, rtol=0)


def test_it_beats_one_grid_for_all_channels(job_of, apply):
    network = small_vit(width=16)
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    error = {}
    for name, steps in {
        "channels": REPQ_VIT_PASSES,
        "tensor": (replace(INSERT, protocol=replace(REPQ_VIT, norms=None)), Calibrate(range=PercentileSearch())),
    }.items():
        job = job_of(network)
        apply(job, *steps, synthesizer=Noise(samples=32))
        with torch.no_grad():
            error[name] = (job.student(images) - network(images)).square().mean().item()
    assert error["channels"] < 0.7 * error["tensor"]
