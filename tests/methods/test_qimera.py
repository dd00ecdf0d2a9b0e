from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from zsq.core import Bits, Job, RecipeError, Run, Teacher, View
from zsq.losses import CrossEntropy
from zsq.methods import METHODS
from zsq.methods.qimera import SuperposedClasses
from zsq.nets.graph import capture
from zsq.synthesis import ConvTrunk
from zsq.synthesis.networks import Drawn
from zsq.zoo import entry

QIMERA = METHODS["qimera"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def code_of(job, seed=0, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SuperposedClasses(superposed=2, **settings).build(job, 5)


def drawn_of(labels, shares, size=6):
    return Drawn(labels, shares, torch.randn(*labels.shape, size, generator=rng(9)))


@pytest.fixture
def job(cnn, job_for):
    """On a network whose classifier is 5x6."""
    return job_for(cnn)


def test_without_superposition_every_batch_is_plain_and_the_loss_is_that_of_labels(job):
    recipe, code, stream = SuperposedClasses(share=0.0), code_of(job), rng()
    for _ in range(200):
        drawn = recipe.draw(3, 5, code, stream)
        assert drawn.labels.shape == (3, 1)
        assert torch.equal(drawn.shares, torch.ones(3, 1))
    labels = drawn.targets(5)
    logits = torch.randn(3, 5, generator=rng())
    hard = CrossEntropy().value(View(torch.empty(0), logits, labels=labels))
    soft = CrossEntropy().value(View(torch.empty(0), logits, labels=F.one_hot(labels, 5).float()))
    assert_close(soft, hard, atol=1e-6, rtol=0)


def test_whole_batches_are_superposed_as_often_as_asked_for(job):
    recipe, code, stream = SuperposedClasses(superposed=3, share=0.4), code_of(job), rng()
    slots = [recipe.draw(2, 5, code, stream).labels.shape[1] for _ in range(2000)]
    assert set(slots) == {1, 3}
    assert abs(slots.count(3) / 2000 - 0.4) < 0.03


@pytest.mark.parametrize(
    ("superposed", "classes", "largest", "entropy"),
    [(2, 10, 0.755, 0.484), (10, 100, 0.329, 1.88), (25, 100, 0.202, 2.66)],
)
def test_targets_are_as_mixed_as_those_of_the_released_sampler(job, superposed, classes, largest, entropy):
    drawn = SuperposedClasses(superposed=superposed, share=1.0).draw(20_000, classes, code_of(job), rng())
    targets = drawn.targets(classes)
    assert_close(targets.sum(1), torch.ones(20_000))
    assert abs(targets.amax(1).mean() - largest) < 0.01
    assert abs(torch.special.entr(targets).sum(1).mean() - entropy) < 0.02


def test_a_plain_latent_vector_is_normalized_on_its_own(job):
    labels = torch.tensor([[0], [1], [4]])
    rows = code_of(job, mapping=False)(drawn_of(labels, torch.ones(3, 1)))
    assert rows.mean(1).abs().max() < 1e-5
    assert_close(rows.var(1, correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_superposed_latent_vectors_are_normalized_slot_by_slot_over_the_batch(job):
    labels = torch.randint(5, (64, 2), generator=rng())
    for slot in range(2):  # all of the share on one slot shows that slot
        shares = F.one_hot(torch.tensor(slot), 2).float().expand(64, 2)
        rows = code_of(job, mapping=False)(drawn_of(labels, shares))
        assert abs(rows.mean()) < 1e-5
        assert abs(rows.var(correction=0) - 1) < 1e-4
        assert (rows.var(1, correction=0) - 1).abs().max() > 0.1  # a row only roughly


def test_latents_are_the_formula(job):
    code = code_of(job)
    labels = torch.randint(5, (7, 2), generator=rng())
    drawn = drawn_of(labels, torch.rand(7, 2, generator=rng(1)).softmax(1))
    table, weight, bias = (t.detach().double() for t in (code.table.weight, code.mapping.weight, code.mapping.bias))
    a = table[labels] + drawn.noise.double()  # (N, S, D)
    wanted = torch.zeros(7, 100, dtype=torch.float64)
    for slot in range(2):
        normal = (a[:, slot] - a[:, slot].mean()) / (a[:, slot].var(correction=0) + 1e-5).sqrt()
        wanted += drawn.shares[:, slot, None] * (normal @ weight.T + bias)
    assert_close(code(drawn).double(), wanted, atol=1e-5, rtol=1e-5)


def test_mapping_before_or_after_superposing_is_the_same(job):
    labels = torch.randint(5, (8, 2), generator=rng())
    drawn = drawn_of(labels, torch.randn(8, 2, generator=rng(1)).softmax(1))
    mapped, plain = code_of(job), code_of(job, mapping=False)
    assert_close(mapped(drawn), mapped.mapping(plain(drawn)), atol=1e-5, rtol=0)


def test_the_size_of_a_latent_is_that_of_the_features_or_of_the_mapping(job):
    assert (code_of(job).size, code_of(job, latent=7).size, code_of(job, mapping=False).size) == (100, 7, 6)


def test_embeddings_start_at_the_classifier_and_learn_without_it(cnn, job_for):
    things = {}

    class Open(Run):
        def track(self, name, thing):
            things[name] = super().track(name, thing)
            return thing

    job = job_for(cnn, Open(device="cpu"))
    classifier = job.teacher.module[-1].weight
    before = classifier.clone()
    assert torch.equal(code_of(job).table.weight, before)
    assert not torch.equal(code_of(job, from_classifier=False).table.weight, before)
    recipe = replace(
        QIMERA.synthesizer, latents=SuperposedClasses(superposed=2), trunk=ConvTrunk(wide=6, narrow=4), batch_size=8
    )
    stream = recipe.stream(job)
    for _ in range(3):
        next(stream)
    assert not torch.equal(things["generator/network"][0].table.weight, before)
    assert torch.equal(classifier, before)


def test_a_classifier_may_be_a_convolution(job_for):
    head = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 5, 1), nn.Flatten()]
    network = tiny.lively(nn.Sequential(*tiny.conv_bn(3, 4), nn.ReLU(), *head))
    assert torch.equal(code_of(job_for(network)).table.weight, network[4].weight[:, :, 0, 0])


def test_the_generator_without_mapping_has_the_parameters_of_the_released_one():
    network = entry("resnet20-cifar10").build().eval()
    student = capture(network, torch.zeros(2, 3, 32, 32))
    job = Job(Teacher(network), student, Bits(), Run(device="cpu"), (3, 32, 32))
    code = SuperposedClasses(mapping=False).build(job, 10)
    trunk = ConvTrunk().build(code.size, (3, 32, 32), 10)
    parts = [parameter.numel() for module in (code, trunk) for parameter in module.parameters()]
    assert parts[0] == 10 * 64
    assert sum(parts) == 756_867


# the card's table: superposed classes, share; the default is ResNet-18 at 4 bits
@pytest.mark.parametrize(("preset", "superposed"), [("paper", 500), ("cifar", 2), ("fast", 2)])
def test_the_settings_are_those_of_the_card(preset, superposed):
    latents = QIMERA.preset(preset).synthesizer.latents
    assert (latents.superposed, latents.share, latents.latent) == (superposed, 0.4, 100)
    assert latents.mapping
    assert latents.from_classifier


def test_the_released_code_maps_nothing_and_averages_superposed_normalizations():
    released = QIMERA.preset("released").synthesizer
    assert not released.latents.mapping
    assert not released.latents.from_classifier
    assert released.trunk.superposed == "mean"
    assert QIMERA.synthesizer.trunk.superposed == "sum"


@pytest.mark.parametrize("preset", ["paper", "cifar", "fast"])
def test_all_but_the_latents_is_gdfqs(preset):
    qimera, gdfq = QIMERA.preset(preset), METHODS["gdfq"].preset(preset)
    assert qimera.override({"synthesizer.latents": gdfq.synthesizer.latents}).parts() == gdfq.parts()


def test_shares_beyond_all_are_refused():
    with pytest.raises(RecipeError, match=r"share must lie in \[0, 1\], got 1.5"):
        SuperposedClasses(share=1.5)
