import itertools
import math

import pytest
import tiny
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from zsq.core import Attention, RecipeError, Source, View
from zsq.losses.patches import PatchSimilarityEntropy, kernel_entropy, similarity_entropy
from zsq.methods import METHODS
from zsq.quant import SIMULATE_ALL, Calibrate, InsertFakeQuant
from zsq.quant.quantizers import activation_quantizers
from zsq.synthesis import Noise

PSAQ = METHODS["psaq-vit"]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def entropy_of(values, points=10, bandwidth=0.01):
    at = torch.linspace(values.min().item(), values.max().item(), points, dtype=torch.float64)
    return kernel_entropy(values[None], torch.full_like(values, 1 / len(values)), at, bandwidth)[0].item()


def one_cluster():
    return torch.cat([0.9 + 0.02 * random(38_220), torch.ones(196, dtype=torch.float64)])


def two_clusters():
    halves = [0.3 + 0.15 * random(19_110), 0.8 + 0.08 * random(19_110, seed=1)]
    return torch.cat([*halves, torch.ones(196, dtype=torch.float64)]).clamp(max=1)


# --- the card: "How to check", 1 --------------------------------------------------------------------------------


def test_equal_values_have_no_entropy():
    assert entropy_of(torch.full((100,), 0.7, dtype=torch.float64)) == 0  # a grid of width 0


@pytest.mark.parametrize(("low", "found"), [(0, 0.0384), (-1, 0.6932)])
def test_the_entropy_of_evenly_spaced_values(low, found):
    # ln 1 and ln 2 in the limit: at the two ends half of a kernel lies outside
    assert entropy_of(torch.linspace(low, 1, 40_001, dtype=torch.float64)) == pytest.approx(found, abs=1e-4)


def test_two_clusters_have_more_entropy_than_one():
    one, two = entropy_of(one_cluster()), entropy_of(two_clusters())
    assert one == pytest.approx(-2.36, abs=0.5)  # coarse: ten points, and a cluster narrower than their distance
    assert two == pytest.approx(-0.14, abs=0.1)
    assert two > one


def test_a_finer_grid_gives_the_same_entropy_of_a_smooth_density():
    values = torch.linspace(0, 1, 40_001, dtype=torch.float64).sqrt()
    assert entropy_of(values, points=200) == pytest.approx(entropy_of(values, points=50), rel=0.05)


# --- the equation -----------------------------------------------------------------------------------------------


def slow_entropies(output, drop, images, points=10, h=0.01):
    """The formula with loops: the outputs (N', heads, T, d) of one attention to entropies (N,)."""
    mean = output[:, :, drop:].mean(1)
    per = len(mean) // images
    similarity = [
        [[F.cosine_similarity(a, b, dim=0) for window in mean[n * per : (n + 1) * per] for a in window for b in window]]
        for n in range(images)
    ]
    values = [torch.stack(each[0]) for each in similarity]
    low, high = min(v.min() for v in values).item(), max(v.max() for v in values).item()
    step = (high - low) / (points - 1)
    entropies = []
    for v in values:
        terms = []
        for k in range(points):
            t = low + k * step
            p = (torch.exp(-((t - v) ** 2) / (2 * h * h)) / math.sqrt(2 * math.pi * h * h)).mean() + 1e-4
            terms.append(-p * p.log())
        entropies.append(sum((a + b) / 2 * step for a, b in itertools.pairwise(terms)))
    return torch.stack(entropies)


@pytest.mark.parametrize(("windows", "prefix"), [(1, 1), (3, 0)])
def test_the_loss_is_the_formula_and_its_gradient(windows, prefix):
    layers = [random(2 * windows, 3, 6, 4, seed=seed).requires_grad_() for seed in (0, 1)]
    loss = PatchSimilarityEntropy(bandwidth=0.1)
    view = View(torch.empty(2, 3, 4, 4), torch.empty(2, 5), attention=[Attention(x, x, prefix) for x in layers])
    slow = -sum(slow_entropies(x, prefix, 2, h=0.1).mean() for x in layers)
    assert_close(loss.value(view), slow)
    for found, wanted in zip(*(torch.autograd.grad(value, layers) for value in (loss.value(view), slow)), strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("windows", [1, 2])
def test_the_closed_gradient(windows):
    patches = F.normalize(random(2, windows, 5, 3), dim=-1).requires_grad_()
    at = torch.linspace(-1, 1, 10, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: similarity_entropy(x, at, 0.2), (patches,))


def test_the_order_of_patches_and_the_length_of_their_vectors_do_not_matter():
    x = random(2, 1, 9, 4)
    other = torch.cat([x[:, :, :1], x[:, :, 1:][:, :, torch.randperm(8, generator=torch.Generator())]], 2)
    other = other * torch.linspace(0.5, 2, 9, dtype=torch.float64)[:, None]
    loss = PatchSimilarityEntropy()
    assert_close(loss.entropy(Attention(x, x, 1), 2), loss.entropy(Attention(other, other, 1), 2))


def test_what_is_no_patch_is_left_out_and_the_released_code_leaves_out_the_first_token():
    x = random(2, 2, 5, 4)
    changed = x.clone()
    changed[:, :, 0] = 7.0
    for prefix, drop, same in ((1, None, True), (0, None, False), (0, 1, True), (2, 0, False)):
        loss = PatchSimilarityEntropy(drop=drop)
        pair = [loss.entropy(Attention(each, each, prefix), 2) for each in (x, changed)]
        assert torch.equal(*pair) == same


@pytest.mark.parametrize("wrong", [{"points": 1}, {"drop": -1}, {"bandwidth": 0.0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(RecipeError):
        PatchSimilarityEntropy(**wrong)


# --- the card: "How to check", 4 and 7 --------------------------------------------------------------------------


def test_every_term_improves_and_pixels_stay_in_their_box(job_for):
    job = job_for(tiny.vit())
    job.pixel_box = ((-0.5, 0.9), (-2.0, 0.4), (-1.0, 2.0))
    recipe = PSAQ.synthesizer.override({"samples": 16, "batch_size": 16, "steps": 200})
    batch = Source(recipe, job).take()
    noise = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(0))
    for term in recipe.loss.terms:
        before, after = (
            term.value(job.teacher.view(x, term.needs, labels=batch.labels)).item() for x in (noise, batch.images)
        )
        assert after < before, term
    for channel, (low, high) in enumerate(job.pixel_box):
        assert low <= batch.images[:, channel].min() + 1e-6
        assert batch.images[:, channel].max() - 1e-6 <= high
    assert batch.images[:, 1].max().item() == pytest.approx(0.4)  # where it is narrow it is reached


def test_calibration_does_not_depend_on_the_order_of_images(job_for):
    ranges = []
    for order in (torch.arange(16), torch.randperm(16, generator=torch.Generator().manual_seed(0))):
        job = job_for(tiny.vit(), bits="w4a8")
        source = Source(Noise(samples=16), job)
        source._joined = source.take()[order]
        InsertFakeQuant(protocol=SIMULATE_ALL).apply(job, source)
        Calibrate(samples=16, batch_size=16).apply(job, source)
        ranges.append([(q.scale.item(), q.zero_point.item()) for q in activation_quantizers(job.student).values()])
    assert ranges[0] == ranges[1]


def test_the_settings_are_those_of_the_card():
    makes = PSAQ.synthesizer
    terms = makes.loss.parts()
    assert {name: term.weight for name, term in terms.items()} == {
        "patch_similarity_entropy": 1,
        "cross_entropy": 1,
        "total_variation": 0.05,
    }
    assert terms["total_variation"].target == (2500, 3000)
    assert (terms["patch_similarity_entropy"].points, terms["patch_similarity_entropy"].bandwidth) == (10, 0.01)
    assert (makes.samples, makes.batch_size, makes.steps, makes.lr, makes.betas) == (32, 32, 1000, 0.2, (0.5, 0.9))
    assert (makes.schedule.rounds, makes.schedule.warm_up * 500) == (2, 100)
    pixels = [round(224 * makes.jitter.at(step / 1000).limit) for step in (0, 499, 500, 999)]
    assert pixels == [15, 15, 30, 30]
    assert makes.jitter.first.diagonal
    assert makes.jitter.second.diagonal
    assert makes.clamp
    assert PSAQ.preset("swin").synthesizer.lr == 0.25
    assert PSAQ.preset("released").synthesizer.loss.parts()["patch_similarity_entropy"].drop == 1
