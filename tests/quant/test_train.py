"""Passes that train: what they move, what they leave alone, and that a death in the middle changes no bit."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from zsq.core import Batch, Loss, MultiStep, NoData, Recipe, RecipeError, Run, RunError
from zsq.losses import BranchEnergies, CrossEntropy, Distillation, StudentCrossEntropy
from zsq.quant import (
    QAT_LOWBIT_ALL,
    Distill,
    InsertFakeQuant,
    Nesterov,
    Once,
    Perturbed,
    RangeAverage,
    TrackRanges,
    WarmUp,
)
from zsq.quant.inundation import Inundation
from zsq.quant.quantizers import activation_quantizers, float_weight, freeze, weight_quantizers
from zsq.quant.train import _let_learn
from zsq.synthesis import ConvTrunk, CropAndFlip, LabelTimesNoise, Noise, TrainGenerator

INSERT = InsertFakeQuant(protocol=QAT_LOWBIT_ALL, follow=True)
TRACK = TrackRanges(steps=3, batch_size=4)
NOISE = Noise(samples=8)
KL = Distillation()
GENERATOR = TrainGenerator(
    loss=CrossEntropy(), latents=LabelTimesNoise(latent=4), trunk=ConvTrunk(wide=4, narrow=4), batch_size=4
)


def distill(**settings):
    return Distill(**{"loss": Distillation(), "lr": 1e-2, "steps": 4, "batch_size": 4, **settings})


@pytest.fixture
def ready(job_of, apply):
    """A job whose student is quantized, with ranges of noise."""

    def make(network, bits="w4a4"):
        job = job_of(network, bits)
        apply(job, INSERT, TRACK, synthesizer=NOISE)
        return job

    return make


def taught(job):
    """The tensors of the student under the names of the teacher, weights as they are before quantization."""
    state = job.student.state_dict()
    for name, (layer, _) in weight_quantizers(job.student).items():
        state[f"{name}.weight"] = float_weight(layer).detach()
    return {name: state[name].clone() for name in job.teacher.module.state_dict()}


def ranges(job):
    return {name: quantizer.range_state() for name, quantizer in activation_quantizers(job.student).items()}


def watched(module):
    """What ``module`` is given from now on."""
    seen = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    return seen


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# --- ranges ----------------------------------------------------------------------------------------------------------


def test_tracking_ranges_leaves_every_tensor_of_the_network_as_the_teachers(resnet, ready):
    job = ready(resnet)
    assert same(taught(job), job.teacher.module.state_dict())
    quantizers = activation_quantizers(job.student).values()
    assert len(quantizers) == 5  # behind each ReLU
    assert all(quantizer.ready and quantizer.scale != 1 for quantizer in quantizers)


@pytest.mark.parametrize("correction", ["on reading", "fed back"])
def test_the_range_is_the_moving_average_of_what_batches_reach(correction, resnet, job_of, apply):
    job = job_of(resnet)
    apply(job, INSERT)
    quantizer = next(iter(activation_quantizers(job.student).values()))
    seen = watched(quantizer)
    apply(
        job,
        TrackRanges(steps=6, batch_size=2, average=RangeAverage(decay=0.7, correction=correction)),
        synthesizer=NOISE,
    )
    kept = 0.0  # the end of a ReLU's output that is not 0, in Python's float64
    for count, x in enumerate(seen, 1):
        kept = 0.7 * kept + 0.3 * x.max().item()
        high = kept / (1 - 0.7**count)
        if correction == "fed back":
            kept = high
    assert len(seen) == 6
    assert quantizer.scale.item() == pytest.approx(high / 15, rel=1e-5)
    assert (quantizer.zero_point.item(), quantizer.low, quantizer.high) == (0, 0, 15)


def test_ranges_are_frozen_afterwards(resnet, ready, images):
    job = ready(resnet)
    before = ranges(job)
    with torch.no_grad():
        job.student(100 * images)
    assert ranges(job) == before


def test_ranges_can_be_found_on_images_of_their_own(resnet, job_of, apply):
    job, other = job_of(resnet), job_of(resnet)
    own = TrackRanges(steps=3, batch_size=4, images=NOISE)
    apply(job, INSERT, own, synthesizer=NoData())
    with other.run.named("ranges"):  # whose streams are not those of the method's own images
        apply(other, INSERT, TRACK, synthesizer=NOISE)
    assert ranges(job) == ranges(other)


def test_warming_up_draws_batches_and_changes_no_student(resnet, job_of, apply):
    made = []

    @dataclass(frozen=True, kw_only=True)
    class Endless(Recipe):
        live: ClassVar[bool] = True

        def stream(self, job):
            while True:
                made.append(len(made))
                yield Batch(torch.zeros(2, 3, 8, 8))

    job = job_of(resnet)
    before = copy.deepcopy(job.student.state_dict())
    apply(job, WarmUp(steps=5), synthesizer=Endless())
    assert made == [0, 1, 2, 3, 4]
    assert same(job.student.state_dict(), before)
    apply(job, WarmUp(steps=0), synthesizer=Endless())
    assert len(made) == 5


# --- what distillation moves -----------------------------------------------------------------------------------------


def test_only_parameters_learn_and_statistics_and_ranges_stay(resnet, ready, apply):
    job = ready(resnet)
    teacher, before = job.teacher.digest(), ranges(job)
    apply(job, distill(), synthesizer=NOISE)
    assert job.teacher.digest() == teacher
    assert ranges(job) == before
    now, then = taught(job), job.teacher.module.state_dict()
    parameters = dict(job.teacher.module.named_parameters())
    for name, tensor in now.items():
        assert torch.equal(tensor, then[name]) != (name in parameters), name
    assert not any(parameter.requires_grad for parameter in job.student.parameters())
    assert not any(module.training for module in job.student.modules())


def test_the_grid_of_a_weight_follows_it(resnet, ready, apply):
    job = ready(resnet)
    scales = {name: quantizer.scale.clone() for name, (_, quantizer) in weight_quantizers(job.student).items()}
    apply(job, distill(lr=0.1), synthesizer=NOISE)
    learned = {
        name: float_weight(layer).detach().clone() for name, (layer, _) in weight_quantizers(job.student).items()
    }
    freeze(job.student)
    for name, (layer, quantizer) in weight_quantizers(job.student).items():
        assert not torch.equal(quantizer.scale, scales[name])
        # not even the least and the largest weight of a channel are clipped
        assert ((layer.weight - learned[name]).abs() <= quantizer.scale * (0.5 + 1e-3)).all()


@pytest.mark.parametrize("gradient", [Once(), Perturbed()], ids=["once", "perturbed"])
def test_distillation_brings_the_student_closer_to_the_teacher(gradient, cnn, ready, apply):
    job = ready(cnn, "w2a4")
    batch, loss = Batch(NOISE.pixels.draw((8, 3, 8, 8), job.run.fresh("noise"))), Distillation()

    def distance():
        with torch.no_grad():
            return loss.value(job.view(batch, loss.needs)).item()

    before = distance()
    apply(job, distill(gradient=gradient, lr=1e-3, steps=60, batch_size=8), synthesizer=NOISE)
    freeze(job.student)
    assert distance() < 0.1 * before


def test_a_float_student_has_nothing_to_learn(resnet, ready, apply, images):
    job = ready(resnet, "w32a32")
    _let_learn(job.student, "all", "eval")
    for loss in (Distillation(), BranchEnergies()):
        x = images.clone().requires_grad_()
        value = loss.value(job.view(Batch(x), loss.needs))
        gradients = torch.autograd.grad(value, [x, *job.student.parameters()], materialize_grads=True)
        assert abs(value.item()) < 1e-6
        assert max(gradient.abs().max().item() for gradient in gradients) < 1e-5
    apply(job, distill(optimizer=Nesterov(weight_decay=0.0), lr=1.0), synthesizer=NOISE)
    for name, tensor in taught(job).items():
        assert_close(tensor, job.teacher.module.state_dict()[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["all", "inside"])
def test_which_activations_a_gradient_reaches_is_said_once(mode, resnet, ready, apply):
    job = ready(resnet)
    apply(job, distill(straight_through=mode, steps=1), synthesizer=NOISE)
    assert {each.clips_gradient for each in activation_quantizers(job.student).values()} == {mode == "inside"}


def test_the_learning_rate_falls_at_its_step(resnet, ready, apply):
    short, long = ready(resnet), ready(resnet)
    apply(short, distill(steps=2), synthesizer=NOISE)
    apply(long, distill(steps=4, schedule=MultiStep(at=(2,), factor=1e-9)), synthesizer=NOISE)
    for name, tensor in taught(long).items():
        assert_close(tensor, taught(short)[name])


# --- what the networks look at ---------------------------------------------------------------------------------------


def test_the_teacher_looks_at_a_finite_set_once(resnet, ready, apply):
    job = ready(resnet)
    looks = watched(job.teacher.module)
    apply(job, distill(steps=5), synthesizer=NOISE)
    assert [len(images) for images in looks] == [8]


def test_known_logits_teach_what_another_look_would(resnet, ready, apply):
    class Unchanged(Recipe):
        def move(self, images, rng):
            return images

    known, asked = ready(resnet), ready(resnet)
    apply(known, distill(batch_size=8), synthesizer=NOISE)
    apply(asked, distill(batch_size=8, transforms=(Unchanged(),)), synthesizer=NOISE)
    for name, tensor in taught(known).items():  # in another order of the images, so to rounding
        assert_close(tensor, taught(asked)[name])


def test_transformed_images_are_what_both_networks_see(resnet, ready, apply):
    job = ready(resnet)
    teacher, student = watched(job.teacher.module), watched(job.student)
    apply(job, distill(transforms=(CropAndFlip(),), steps=3), synthesizer=NOISE)
    assert len(teacher) == len(student) == 3
    assert all(torch.equal(a, b) for a, b in zip(teacher, student, strict=True))
    assert not torch.equal(teacher[0], teacher[1])


def test_images_that_are_moved_are_seen_by_all_their_tokens():
    """Their patches are elsewhere now."""
    batch = Batch(torch.rand(2, 3, 8, 8), tokens=torch.tensor([[0, 3], [0, 7]]))
    still, moving = (Distill(loss=Distillation(), transforms=each) for each in ((), (CropAndFlip(),)))
    assert still._moved(batch, torch.Generator()) is batch
    assert moving._moved(batch, torch.Generator()).tokens is None


def test_the_teacher_looks_once_at_the_batch_of_a_live_source(resnet, job_of, apply):
    counts = []
    for step in (WarmUp(steps=4), distill(steps=4)):
        job = job_of(resnet)
        looks = watched(job.teacher.module)
        apply(job, INSERT, step, synthesizer=GENERATOR)
        counts.append(len(looks))
    assert counts[0] == counts[1]


# --- the perturbed batch ---------------------------------------------------------------------------------------------


def slow_kl(student, teacher):
    """T^2 KL(softmax(t/T) || softmax(s/T)), T = 20, the mean over images."""
    p, q = (teacher.double() / 20).softmax(1), (student.double() / 20).softmax(1)
    return 400 * (p * (p.log() - q.log())).sum(1).mean()


def descended(job, gradient, images, loss=KL, labels=None):
    """What the student was shown, and the gradients that were left, by parameter."""
    _let_learn(job.student, "all", "eval")
    job.student.zero_grad()
    seen = []
    handle = job.student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    value = gradient.build(job, loss, labels)(Batch(images))
    handle.remove()
    return seen, {name: p.grad.clone() for name, p in job.student.named_parameters() if p.grad is not None}, value


def test_every_pixel_that_matters_moves_by_epsilon(images, job_of, apply):
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    skipping = nn.Sequential(nn.Conv2d(3, 4, 1, stride=2), nn.BatchNorm2d(4), nn.ReLU(), *head).eval()
    job = job_of(skipping)
    apply(job, INSERT, TRACK, synthesizer=NOISE)
    (clean, moved), _, _ = descended(job, Perturbed(epsilon=0.01), images)
    x = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(slow_kl(job.student(x), job.teacher.module(x)), x)  # through both networks
    assert torch.equal(clean, images)
    step = moved - clean
    assert step.abs().max().item() == pytest.approx(0.01, rel=1e-4)
    plain = slope.abs() > 1e-3 * slope.abs().max()  # where rounding does not decide the sign
    assert_close(step[plain], 0.01 * slope.sign()[plain], atol=1e-6, rtol=0)
    assert (step[:, :, 1::2].count_nonzero(), step[:, :, :, 1::2].count_nonzero()) == (0, 0)  # no layer reads these


def test_a_small_move_makes_nearly_every_batch_harder(cnn, ready):
    job = ready(cnn, "w32a32")  # beyond rounding the gradient is no guess
    rng, harder = torch.Generator().manual_seed(0), 0
    with torch.no_grad():
        for parameter in job.student.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=rng))
    for _ in range(40):
        (clean, moved), _, _ = descended(job, Perturbed(epsilon=0.01), torch.randn(8, 3, 8, 8, generator=rng))
        with torch.no_grad():
            before, after = (KL.value(job.view(Batch(x), KL.needs)) for x in (clean, moved))
        harder += bool(after >= before)
    assert harder > 0.95 * 40


def test_gradients_are_the_sum_of_those_at_both_batches(cnn, ready, images):
    job = ready(cnn)
    recipe = Perturbed(epsilon=0.05, weight=0.7, moved=3 * Distillation(), beside=2 * BranchEnergies())
    (clean, moved), found, value = descended(job, recipe, images, 0.5 * Distillation())
    parameters = {name: p for name, p in job.student.named_parameters() if p.requires_grad}

    def kl(x):
        return slow_kl(job.student(x), job.teacher.module(x).detach())

    beside = BranchEnergies().value(job.view(Batch(clean), BranchEnergies.needs))
    terms = 0.5 * kl(clean), 0.7 * 3 * kl(moved), 2 * beside
    assert value.item() == pytest.approx(sum(term.item() for term in terms), rel=1e-3)
    each = [torch.autograd.grad(t, parameters.values(), allow_unused=True, materialize_grads=True) for t in terms]
    for name, *parts in zip(parameters, *each, strict=True):
        wanted = sum(parts)
        assert_close(found[name], wanted, atol=1e-4 * wanted.abs().max().item() + 1e-7, rtol=1e-3)


def test_what_stands_beside_has_no_say_in_the_direction(resnet, ready, images):
    job = ready(resnet)
    alone, gradients, _ = descended(job, Perturbed(), images)
    beside, others, _ = descended(job, Perturbed(beside=1e6 * BranchEnergies()), images)
    assert torch.equal(beside[1], alone[1])
    assert not same(gradients, others)


def test_the_moved_batch_has_the_same_loss_unless_told_otherwise(resnet, ready, images):
    job = ready(resnet)
    loss = Distillation() + 10 * BranchEnergies()
    _, silent, value = descended(job, Perturbed(), images, loss)
    _, told, again = descended(job, Perturbed(moved=loss), images, loss)
    assert same(silent, told)
    assert value == again
    _, other, _ = descended(job, Perturbed(moved=Distillation()), images, loss)
    assert not same(silent, other)


def test_a_label_is_believed_for_the_moved_batch_where_it_is_for_the_clean_one(resnet, ready, images):
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Bright(Recipe):
        """The teacher's class where an image is bright, else none."""

        def believed(self, view):
            return torch.where(view.images.flatten(1).mean(1) > 0, view.logits.argmax(1), -1)

    @dataclass(frozen=True, kw_only=True)
    class Listening(StudentCrossEntropy):
        def value(self, view):
            seen.append((view.labels.tolist(), Bright().believed(view).tolist()))
            return super().value(view)

    job = ready(resnet)
    descended(job, Perturbed(epsilon=2.0), images, Listening(), Bright())
    (clean, judged_clean), (moved, judged_moved) = seen
    assert clean == judged_clean == moved
    assert -1 in clean
    assert judged_moved != moved  # at the moved batch it would have said something else


def test_without_a_move_two_looks_are_twice_one(resnet, ready, images):
    job = ready(resnet)
    _, once, value = descended(job, Once(), images)
    _, twice, doubled = descended(job, Perturbed(epsilon=0.0), images)
    assert doubled.item() == pytest.approx(2 * value.item())
    for name, gradient in once.items():
        assert_close(twice[name], 2 * gradient)


# --- deaths and divergence -------------------------------------------------------------------------------------------


class Death(Exception):
    pass


class Killer:
    """Ends a run just before the checkpoint of a step."""

    def __init__(self, label, done):
        self.moment = label, done

    def progress(self, label, done, count):
        if (label, done) == self.moment:
            raise Death


CROPS = (CropAndFlip(),)
WAYS = {
    "finite": (NOISE, distill(optimizer=Inundation(capped_steps=2), schedule=MultiStep(at=(2,)), transforms=CROPS)),
    "known": (NOISE, distill()),
    "live": (GENERATOR, distill(loss=Distillation() + StudentCrossEntropy(), gradient=Perturbed())),
}


@pytest.mark.parametrize("moment", [("track ranges", 2), ("warm up", 1), ("distill", 1), ("distill", 3)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_dies_goes_on_to_the_same_bits(way, moment, resnet, job_of, apply, tmp_path):
    synthesizer, step = WAYS[way]
    track = TrackRanges(steps=3, batch_size=4, average=RangeAverage(correction="fed back"))
    passes = INSERT, track, WarmUp(steps=2), step
    whole = job_of(resnet)
    apply(whole, *passes, synthesizer=synthesizer)
    settings = {"folder": tmp_path, "save_every": 0.0}
    with pytest.raises(Death):
        apply(job_of(resnet, **settings, reporter=Killer(*moment)), *passes, synthesizer=synthesizer)
    resumed = job_of(resnet, **settings)
    apply(resumed, *passes, synthesizer=synthesizer)
    assert same(resumed.student.state_dict(), whole.student.state_dict())
    assert ranges(resumed) == ranges(whole)


@dataclass(frozen=True, kw_only=True)
class Poisoned(Loss):
    """Not a number from some look on."""

    needs: ClassVar[frozenset[str]] = frozenset({"student"})
    at: int = 2

    def begin(self, job):
        looks = []

        def term(view):
            looks.append(view)
            return view.student.square().mean() * (float("nan") if len(looks) > self.at else 1.0)

        return term

    def value(self, view):
        raise NotImplementedError


def test_a_loss_that_is_no_number_ends_the_run_and_its_checkpoint_stays(resnet, job_of, apply, tmp_path):
    settings = {"folder": tmp_path, "save_every": 0.0}
    job = job_of(resnet, **settings)
    with pytest.raises(RunError, match="distill diverged at step 2: poisoned is nan; a lower learning rate may help"):
        apply(job, INSERT, TRACK, distill(loss=Distillation() + Poisoned()), synthesizer=NOISE)
    assert all(tensor.isfinite().all() for tensor in taught(job).values())  # the step was not taken
    assert list(Run(tmp_path, device="cpu").steps(4, "distill")) == [2, 3]
    resumed = job_of(resnet, **settings)
    apply(resumed, INSERT, TRACK, distill(loss=Distillation() + Poisoned(at=9)), synthesizer=NOISE)
    assert all(tensor.isfinite().all() for tensor in taught(resumed).values())


def test_a_moved_batch_that_is_no_number_is_noticed_too(resnet, ready, apply):
    job = ready(resnet)
    with pytest.raises(RunError, match="distill diverged at step 1: poisoned is nan"):
        apply(job, distill(gradient=Perturbed(moved=Poisoned(at=1))), synthesizer=NOISE)


def test_a_batch_larger_than_the_set_is_refused(resnet, job_of, apply):
    for step in (distill(batch_size=9), TrackRanges(batch_size=9)):
        with pytest.raises(RecipeError, match="a batch of 9 is larger than the set of 8 images"):
            apply(job_of(resnet), INSERT, step, synthesizer=NOISE)


@pytest.mark.parametrize(
    ("recipe", "wrong"),
    [
        (Distill, {"loss": Distillation(), "steps": 0}),
        (Distill, {"loss": Distillation(), "batch_size": 0}),
        (Distill, {"loss": Distillation(), "lr": 0.0}),
        (Distill, {"loss": Distillation(), "lr": -1e-4}),
        (Distill, {"loss": Distillation(), "lr": float("nan")}),
        (TrackRanges, {"steps": 0}),
        (TrackRanges, {"batch_size": 0}),
        (WarmUp, {"steps": -1}),
        (Perturbed, {"epsilon": -0.1}),
        (Perturbed, {"weight": float("nan")}),
    ],
)
def test_settings_that_make_no_sense(recipe, wrong):
    with pytest.raises(RecipeError):
        recipe(**wrong)
