"""What compares the student with the teacher: logits, channel energies, class activation maps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from zsq.core import Batch, Job, RecipeError, Run, View, needs
from zsq.losses import BranchEnergies, CamAlignment, Distillation
from zsq.losses.distillation import grad_cam

IMAGES = torch.zeros(1, 3, 2, 2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(teacher: Tensor, student: Tensor) -> View:
    return View(IMAGES, teacher, student=student)


def branches(teacher: list[Tensor], student: list[Tensor]) -> View:
    return View(IMAGES, torch.zeros(1, 2), branches=teacher, student_branches=student)


@pytest.fixture
def job(cnn, job_for) -> Job:
    """A student whose parameters learn and are not the teacher's."""
    job = job_for(cnn)
    job.student.requires_grad_(True)
    with torch.no_grad():
        for index, parameter in enumerate(job.student.parameters()):
            parameter += 0.3 * normal(*parameter.shape, seed=index).float()
    return job


# --- logits -----------------------------------------------------------------------------------------------------


def test_distillation_by_hand():
    # teacher (1/4, 3/4), student (1/2, 1/2) at T = 1: 1/4 ln 1/2 + 3/4 ln 3/2
    view = pair(torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2))
    wanted = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert Distillation(temperature=1.0).value(view).item() == pytest.approx(wanted)
    # logits twice as large at T = 2 have the same softened distributions: T^2 times as much
    twice = pair(2 * view.logits, 2 * view.student)
    assert Distillation(temperature=2.0).value(twice).item() == pytest.approx(4 * wanted)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_distillation_is_the_equation(temperature):
    teacher, student = 5 * normal(6, 4), 5 * normal(6, 4, seed=1)
    total = 0.0
    for t, s in zip(teacher.tolist(), student.tolist(), strict=True):
        p, q = ([math.exp(z / temperature) for z in row] for row in (t, s))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = Distillation(temperature=temperature).value(pair(teacher, student))
    assert found.item() == pytest.approx(temperature**2 * total / 6, rel=1e-9)


@pytest.mark.parametrize("classes", [10, 100])
def test_the_mean_divides_by_the_number_of_classes_too(classes):
    view = pair(normal(8, classes), normal(8, classes, seed=1))
    each = Distillation(reduction="batchmean").value(view)
    assert_close(each, classes * Distillation(reduction="mean").value(view))


@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_equal_logits_are_no_distance_and_no_gradient(reduction):
    teacher = 10 * normal(8, 10)
    student = teacher.clone().requires_grad_()
    loss = Distillation(reduction=reduction).value(pair(teacher, student))
    loss.backward()
    assert loss.abs() < 1e-10
    assert student.grad.abs().max() < 1e-13


@pytest.mark.parametrize(("classes", "wanted"), [(10, 8.9), (100, 9.9), (1000, 10.0)])
def test_logits_that_are_off_by_one_weigh_ten(classes, wanted):
    # softened so much, alpha T^2 KL is about alpha / (2 K) |gap - its mean|^2 = 10 (K - 1) / K at alpha 20
    teacher = normal(1000, classes)
    loss = 20 * Distillation()
    assert loss.weight * loss.temperature**2 == 8000
    view = pair(teacher, teacher + normal(1000, classes, seed=1))
    assert loss.weight * loss.value(view).item() == pytest.approx(wanted, abs=0.2)


@given(st.integers(0, 50), st.floats(-100, 100))
def test_a_divergence_is_positive_and_blind_to_a_common_shift(seed, shift):
    teacher, student = 3 * normal(4, 5, seed=seed), 3 * normal(4, 5, seed=seed + 100)
    loss = Distillation().value(pair(teacher, student))
    assert loss > 0
    assert_close(Distillation().value(pair(teacher + shift, student - shift)), loss, rtol=1e-7, atol=1e-10)


def test_extreme_logits_stay_finite():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = Distillation(temperature=1.0).value(pair(torch.tensor([[-1e4, 1e4, 0.0]]), student))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_is_positive(temperature):
    with pytest.raises(RecipeError, match=f"temperature must be positive, got {temperature}"):
        Distillation(temperature=temperature)


# --- channel energies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 5])
def test_energies_in_different_channels_are_apart_by_2_of_all(channels):
    # one-hot energies differ by 1 in two of C channels
    teacher, student = torch.zeros(2, 1, channels, 3, 3)
    teacher[0, 0], student[0, 1] = 4.0, -0.1
    assert BranchEnergies().value(branches([teacher], [student])).item() == pytest.approx(2 / channels)
    # and the branches are added up
    assert BranchEnergies().value(branches([teacher] * 3, [student] * 3)).item() == pytest.approx(6 / channels)


def test_channel_energies_by_hand():
    # squares have the means (9, 16) = 25 * (0.36, 0.64), of length sqrt(9^2 + 16^2) = sqrt 337; the student's (1, 0)
    teacher = torch.tensor([[[[3.0, -3.0]], [[4.0, 4.0]]]])
    student = torch.tensor([[[[2.0, 0.0]], [[0.0, 0.0]]]])
    wanted = ((1 - 9 / math.sqrt(337)) ** 2 + (16 / math.sqrt(337)) ** 2) / 2
    assert BranchEnergies().value(branches([teacher], [student])).item() == pytest.approx(wanted)


def test_channel_energies_are_the_equation():
    teacher = [normal(3, 4, 5, 5), normal(3, 6, 2, 2, seed=1)]
    student = [normal(3, 4, 5, 5, seed=2), normal(3, 6, 2, 2, seed=3)]
    total = 0.0
    for t, s in zip(teacher, student, strict=True):
        distances = []
        for image in range(3):
            e_t = [(t[image, c] ** 2).mean().item() for c in range(t.shape[1])]
            e_s = [(s[image, c] ** 2).mean().item() for c in range(s.shape[1])]
            a_t, a_s = ([x / math.hypot(*e) for x in e] for e in (e_t, e_s))
            distances += [(a - b) ** 2 for a, b in zip(a_t, a_s, strict=True)]
        total += sum(distances) / len(distances)
    assert BranchEnergies().value(branches(teacher, student)).item() == pytest.approx(total, rel=1e-9)


@given(st.floats(1e-3, 1e3))
def test_the_size_of_a_branch_does_not_matter(factor):
    teacher = normal(2, 4, 3, 3)
    assert BranchEnergies().value(branches([teacher], [factor * teacher])) < 1e-20
    assert BranchEnergies().value(branches([teacher], [-factor * teacher])) < 1e-20


def test_a_dead_branch_has_finite_gradients():
    student = torch.zeros(2, 4, 3, 3, requires_grad=True)
    loss = BranchEnergies().value(branches([normal(2, 4, 3, 3).float()], [student]))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_equal_networks_have_equal_energies(cnn, job_for, photos):
    job = job_for(cnn)
    job.student.requires_grad_(True)
    loss = BranchEnergies().value(job.view(Batch(photos), needs(BranchEnergies())))
    loss.backward()
    assert loss < 1e-12
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in job.student.parameters())


# --- class activation maps --------------------------------------------------------------------------------------


def linear(maps: Tensor, weights: Tensor) -> Tensor:
    """Logits (N, K) of a linear classifier on the mean of each channel."""
    return maps.mean((2, 3)) @ weights.T


def test_a_class_activation_map_by_hand():
    # class 1 is best, (3, 1) against (0, 0); it reads channel 0 with 2 and channel 1 with -1, which is left out.
    # 2 * (0, 1, 2, 4) / 4 pixels, moved and stretched to 0 .. 1
    maps = torch.tensor([[[[0.0, 1.0], [2.0, 4.0]], [[9.0, 0.0], [-1.0, -4.0]]]], requires_grad=True)
    logits = linear(maps, torch.tensor([[0.0, 0.0], [2.0, -1.0]]))
    assert_close(grad_cam(logits, maps, (2, 2)), torch.tensor([[[0.0, 0.25], [0.5, 1.0]]]))


def test_a_map_is_read_bilinearly():
    # pixel centres of 4 columns lie at -1/4, 1/4, 3/4 and 5/4 between those of 2
    maps = torch.tensor([[[[0.0, 1.0]]]], requires_grad=True)
    assert_close(grad_cam(linear(maps, torch.ones(1, 1)), maps, (1, 4)), torch.tensor([[[0.0, 0.25, 0.75, 1.0]]]))


def test_each_image_is_asked_for_its_own_best_class():
    maps = normal(2, 2, 4, 4).abs().requires_grad_()
    weights = torch.eye(2, dtype=torch.float64)
    logits = linear(maps, weights) + torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    cams = grad_cam(logits, maps, (4, 4))
    for image in (0, 1):  # class k reads channel k alone
        channel = maps[image, image].detach()
        assert_close(cams[image], (channel - channel.min()) / (channel.max() - channel.min()), rtol=1e-6, atol=1e-6)


def test_class_activation_maps_are_the_equation():
    maps = normal(3, 5, 4, 4).requires_grad_()
    weights, size = normal(6, 5, seed=1), (8, 8)
    logits = torch.tanh(linear(maps, weights))
    found = grad_cam(logits, maps, size)
    for image in range(3):
        best = int(logits[image].argmax())
        (slope,) = torch.autograd.grad(logits[image, best], maps, retain_graph=True)
        cam = torch.zeros(4, 4, dtype=torch.float64)
        for channel in range(5):
            weight = slope[image, channel].mean().item()
            if weight > 0:
                cam += weight * maps[image, channel].detach()
        cam = F.interpolate(cam.relu()[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        assert_close(found[image], (cam - cam.min()) / (cam.max() - cam.min()), rtol=1e-6, atol=1e-6)


@given(st.integers(0, 20), st.floats(0.01, 100))
def test_maps_lie_in_0_to_1_and_do_not_know_their_scale(seed, factor):
    weights = normal(6, 5, seed=seed + 50)
    shown = []
    for scale in (1.0, factor):
        maps = (scale * normal(3, 5, 4, 4, seed=seed)).requires_grad_()
        shown.append(grad_cam(linear(maps, weights), maps, (8, 8)).detach())
        assert shown[-1].min() == 0
        assert shown[-1].amax((1, 2)).tolist() == pytest.approx([1.0] * 3)
    assert_close(*shown, rtol=1e-5, atol=1e-5)


def test_nothing_to_see_is_zero_and_not_nan():
    for maps in (torch.zeros(1, 3, 4, 4), -torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4)):  # dark, negative, flat
        maps.requires_grad_()
        cam = grad_cam(linear(maps, torch.ones(2, 3)), maps, (8, 8))
        assert torch.equal(cam, torch.zeros(1, 8, 8))
        cam.sum().backward()
        assert maps.grad.isfinite().all()


def test_cam_alignment_of_opposite_maps_is_1():
    # where the teacher looks at the left, the student looks at the right: (1 - 0)^2 everywhere
    images = torch.zeros(1, 3, 1, 2)
    teacher, student = (torch.tensor([[[row]]], requires_grad=True) for row in ([1.0, 0.0], [0.0, 1.0]))
    one = torch.ones(1, 1)
    view = View(images, linear(teacher, one), student=linear(student, one), maps=teacher, student_maps=student)
    assert CamAlignment().value(view).item() == pytest.approx(1.0)


def test_equal_networks_look_at_the_same(cnn, job_for, photos):
    job = job_for(cnn)
    job.student.requires_grad_(True)
    loss = CamAlignment().value(job.view(Batch(photos), needs(CamAlignment())))
    assert loss < 1e-10


def test_the_gradient_of_a_map_ends_at_its_convolution(job, photos):
    loss = CamAlignment().value(job.view(Batch(photos), needs(CamAlignment())))
    assert 0 < loss < 1
    loss.backward()
    reached = {name for name, p in job.student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    last = job.teacher.landmarks.convolution
    assert last == "7"
    assert f"{last}.weight" in reached
    assert "0.weight" in reached
    assert not {"8.weight", "8.bias", "12.weight", "12.bias"} & reached  # the weights of the channels are constants
    assert all(p.grad is None for p in job.teacher.module.parameters())


def test_cam_alignment_leaves_the_graph_to_other_terms(job, photos):
    view = job.view(Batch(photos), needs(CamAlignment()))
    (CamAlignment().value(view) + Distillation().value(view)).backward()
    assert job.student.get_submodule("12").weight.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", [BranchEnergies(), CamAlignment()])
def test_losses_are_float32_in_half_precision(cnn, job_for, photos, loss):
    job = job_for(cnn, Run(device="cpu", precision="bfloat16"))
    job.student.requires_grad_(True)
    assert loss.value(job.view(Batch(photos), loss.needs)).dtype == torch.float32
