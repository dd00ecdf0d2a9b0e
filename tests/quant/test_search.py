from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from zsq.core import Batch, RecipeError
from zsq.quant import (
    REPQ_VIT,
    REPQ_VIT_PASSES,
    AdaRound,
    Calibrate,
    InsertFakeQuant,
    PerTensor,
    Scheme,
    SearchRanges,
    TwinSoftmax,
)
from zsq.quant.quantizers import activation_quantizers, weight_quantizers
from zsq.quant.search import _sites
from zsq.synthesis import Noise

NOISE = Noise(samples=16)
PER_TENSOR = replace(REPQ_VIT, norms=None, weights=Scheme(granularity=PerTensor()), probabilities=TwinSoftmax())


def prepared(vit, job_of, apply, protocol=PER_TENSOR, bits="w4a4"):
    job = job_of(vit, bits)
    apply(job, InsertFakeQuant(protocol=protocol), Calibrate(samples=16), synthesizer=NOISE)
    return job


def images_of(job):
    return NOISE.pixels.draw((16, 3, 8, 8), job.run.fresh("noise"))


def errors_of(sites):
    """The error of each layer and product; of those that read through one quantizer, their sum."""
    found = {}
    for site in sites:
        key = next(iter(site.quantizers))
        found[key] = found.get(key, 0.0) + site.errors().sum().item()
    return list(found.values())


@pytest.mark.parametrize("guide", ["gradient", "none"])
def test_no_error_rises(guide, vit, job_of, apply):
    job = prepared(vit, job_of, apply)
    sites = _sites(
        job.student, Batch(images_of(job)), job.teacher.landmarks, guide
    )  # the importance is that of the start
    before = errors_of(sites)
    apply(job, SearchRanges(guide=guide, candidates=21), synthesizer=NOISE)
    after = errors_of(sites)
    assert len(sites) == 16  # 12 layers and 4 products
    assert len(before) == 14  # q, k and v of the second block read one tensor
    assert all(new <= old * (1 + 1e-6) for new, old in zip(after, before, strict=True))
    assert sum(after) < 0.8 * sum(before)


def test_one_linear_by_hand(job_of, apply):
    """W32A3: the scale of the only quantizer is the best of 101, by the error of the output."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()
    job = prepared(network, job_of, apply, replace(PER_TENSOR, ends=replace(REPQ_VIT.ends, first_input=None)), "w32a3")
    (quantizer,) = activation_quantizers(job.student).values()
    begun, x = quantizer.scale.item(), images_of(job).flatten(1)
    apply(job, SearchRanges(guide="none", rounds=1), synthesizer=NOISE)
    wanted, errors = network[1](x), {}
    for step in range(101):
        scale = begun * (0.01 + step * 1.19 / 100)
        rounded = ((x / scale).round() + quantizer.zero_point).clamp(0, 7).sub(quantizer.zero_point) * scale
        errors[scale] = (network[1](rounded) - wanted).square().sum().item()
    assert quantizer.scale.item() == pytest.approx(min(errors, key=errors.get), rel=1e-4)
    assert quantizer.scale.item() < begun


def test_the_importance_is_the_gradient_of_the_divergence(vit, job_of, apply):
    job = prepared(vit, job_of, apply)
    images = images_of(job)
    sites = {
        str(site.node.target): site for site in _sites(job.student, Batch(images), job.teacher.landmarks, "gradient")
    }
    seen = []
    hook = job.student.head.register_forward_hook(lambda _, __, out: seen.append(out.retain_grad()) or seen.append(out))
    found = job.student(images.requires_grad_())
    F.kl_div(found.log_softmax(1), vit(images).softmax(1).detach(), reduction="batchmean").backward()
    hook.remove()
    # the gradient at the logits is (softmax(student) - softmax(teacher)) / N
    expected = (found.softmax(1) - vit(images).softmax(1)).detach() / 16
    assert_close(sites["head"].importance, expected, atol=1e-6, rtol=1e-4)
    assert_close(seen[1].grad, expected, atol=1e-6, rtol=1e-4)


def test_the_split_of_twin_grids_is_searched_too(vit, job_of, apply):
    job = prepared(vit, job_of, apply)
    quantizers = {name: q for name, q in activation_quantizers(job.student).items() if q.scheme == TwinSoftmax()}
    assert len(quantizers) == 2
    for quantizer in quantizers.values():  # a split that nobody would choose
        quantizer.set_grid(quantizer.grid._replace(scale=torch.tensor([2.0**-19 / 7])))
    apply(job, SearchRanges(guide="none", rounds=1, candidates=3), synthesizer=NOISE)
    for quantizer in quantizers.values():
        split = quantizer.scale.item() * 7
        assert split > 2**-8
        assert torch.tensor(split).log2().item() == pytest.approx(round(torch.tensor(split).log2().item()), abs=1e-4)


def test_each_row_of_a_weight_has_its_own_best_scale(vit, job_of, apply):
    job = job_of(vit)
    apply(job, *REPQ_VIT_PASSES, SearchRanges(rounds=1, candidates=21), synthesizer=NOISE)
    scales = [quantizer.scale for _, quantizer in weight_quantizers(job.student).values()]
    assert all(scale.numel() > 1 and scale.isfinite().all() and (scale > 0).all() for scale in scales)


def test_the_student_is_closer_to_the_teacher(vit, job_of, apply):
    job = prepared(vit, job_of, apply)
    images = images_of(job)

    def divergence():
        with torch.no_grad():
            return F.kl_div(job.student(images).log_softmax(1), vit(images).softmax(1), reduction="batchmean").item()

    before = divergence()
    apply(job, SearchRanges(candidates=41), synthesizer=NOISE)
    assert divergence() < before


def test_a_rounding_that_belongs_to_its_scale_is_refused(vit, job_of, apply):
    job = job_of(vit)
    apply(job, InsertFakeQuant(protocol=PER_TENSOR, rounding=AdaRound()), Calibrate(samples=16), synthesizer=NOISE)
    with pytest.raises(RecipeError, match="weights rounded to nearest, and patches is not"):
        apply(job, SearchRanges(), synthesizer=NOISE)
    with pytest.raises(RecipeError, match="narrowest"):
        SearchRanges(narrowest=2.0)


def test_only_the_tokens_that_an_image_keeps_are_looked_at(job_of, apply):
    network = tiny.vit()
    job = job_of(network)
    apply(job, InsertFakeQuant(protocol=PER_TENSOR), Calibrate(samples=16), synthesizer=NOISE)
    tokens = torch.tensor([[0, 3, 7], [0, 1, 16]])
    batch = Batch(images_of(job)[:2], tokens=tokens)
    sites = {str(site.node.target): site for site in _sites(job.student, batch, job.teacher.landmarks, "gradient")}
    assert {site.importance.shape[1] for name, site in sites.items() if name.endswith("qkv")} == {3}
    (operand,) = sites["blocks.0.proj"].node.all_input_nodes
    assert sites["blocks.0.proj"].values[operand].shape == (2, 3, 8)


def test_what_was_found_is_kept(vit, job_of, apply, tmp_path, monkeypatch):
    states = []
    for _ in range(2):
        job = job_of(vit, folder=tmp_path / "run")
        apply(job, *REPQ_VIT_PASSES, SearchRanges(rounds=1, candidates=5), synthesizer=NOISE)
        states.append({name: value.clone() for name, value in job.student.state_dict().items()})
        monkeypatch.setattr("zsq.quant.search._sites", None)  # a second time nothing is searched
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
