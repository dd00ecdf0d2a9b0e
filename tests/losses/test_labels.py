import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from zsq.core import MissingView, RecipeError, View, needs
from zsq.losses import CrossEntropy, EasyLabels, HardCrossEntropy, StudentCrossEntropy

IMAGES = torch.zeros(2, 3, 2, 2)
QUARTERS = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)]])  # probabilities 1/4 and 3/4, twice


def confident(*probabilities: float) -> View:
    """Images of class 0 in which the teacher sees it with these probabilities, and class 1 else."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return View(IMAGES, torch.stack([p.log(), (1 - p).log()], 1), labels=torch.zeros(len(p), dtype=torch.long))


def random_view(seed: int = 0) -> View:
    rng = torch.Generator().manual_seed(seed)
    logits, student = 3 * torch.randn(2, 32, 7, generator=rng, dtype=torch.float64)
    return View(IMAGES, logits, student=student, labels=torch.randint(7, (32,), generator=rng))


# --- cross-entropies --------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand():
    # labels 1 and 0 cost -ln 3/4 and -ln 1/4
    view = View(IMAGES, QUARTERS, labels=torch.tensor([1, 0]))
    assert CrossEntropy().value(view).item() == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)


def test_it_needs_labels():
    assert needs(CrossEntropy()) == {"labels"}
    with pytest.raises(MissingView, match="no labels"):
        CrossEntropy().value(View(IMAGES, torch.zeros(2, 2)))


def test_labels_may_be_shares_of_the_classes():
    # (1/2, 1/2) costs (ln 4 + ln 4/3) / 2 and (0, 1) costs ln 4/3
    shares = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    wanted = ((math.log(4) + math.log(4 / 3)) / 2 + math.log(4 / 3)) / 2
    for loss in (CrossEntropy(), StudentCrossEntropy()):
        view = View(IMAGES, QUARTERS, student=QUARTERS, labels=shares)
        assert loss.value(view).item() == pytest.approx(wanted)


def test_shares_of_one_class_are_its_index():
    view = random_view()
    shares = view.relabelled(F.one_hot(view.labels, 7).double())
    for loss in (CrossEntropy(), StudentCrossEntropy()):
        assert_close(loss.value(shares), loss.value(view))


def test_the_students_cross_entropy_reads_the_student():
    view = random_view()
    p = view.student.softmax(1)
    assert_close(StudentCrossEntropy().value(view), -p[torch.arange(32), view.labels].log().mean())
    assert needs(StudentCrossEntropy()) == {"labels", "student"}
    with pytest.raises(MissingView, match="no student"):
        StudentCrossEntropy().value(View(IMAGES, QUARTERS, labels=torch.tensor([0, 1])))


@pytest.mark.parametrize("unbelieved", [-1, -7])
def test_a_label_below_0_adds_nothing_but_counts(unbelieved):
    # -ln 3/4 of the first image over both
    student = QUARTERS.clone().requires_grad_()
    loss = StudentCrossEntropy().value(View(IMAGES, QUARTERS, student=student, labels=torch.tensor([1, unbelieved])))
    assert loss.item() == pytest.approx(-math.log(0.75) / 2)
    loss.backward()
    # (p - y) / N
    assert_close(student.grad, torch.tensor([[0.25 / 2, -0.25 / 2], [0.0, 0.0]]))


def test_without_a_believed_label_there_is_no_loss_and_no_gradient():
    student = QUARTERS.clone().requires_grad_()
    loss = StudentCrossEntropy().value(View(IMAGES, QUARTERS, student=student, labels=torch.tensor([-1, -1])))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros(2, 2))


# --- hard images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "focus", "wanted"),
    [
        (0.5, 2.0, 0.17329),  # 1/4 * ln 2
        (0.9, 2.0, 0.0010536),  # 0.01 * 0.10536
        (0.9, 0.5, 0.033318),  # 0.31623 * 0.10536
        (0.25, 1.0, 1.03972),  # 3/4 * ln 4
    ],
)
def test_difficulty_weighs_the_cross_entropy(p, focus, wanted):
    assert HardCrossEntropy(focus=focus).value(confident(p)).item() == pytest.approx(wanted, rel=3e-5)


def test_images_are_weighted_one_by_one():
    each = [HardCrossEntropy().value(confident(p)).item() for p in (0.2, 0.5, 0.99)]
    assert HardCrossEntropy().value(confident(0.2, 0.5, 0.99)).item() == pytest.approx(sum(each) / 3)


def test_a_focus_of_0_is_the_plain_cross_entropy():
    view = random_view()
    logits = view.logits.clone().requires_grad_()
    loss = HardCrossEntropy(focus=0.0).value(View(IMAGES, logits, labels=view.labels))
    assert_close(loss, CrossEntropy().value(view))
    loss.backward()
    assert_close(logits.grad, (view.logits.softmax(1) - F.one_hot(view.labels, 7)) / 32)


@pytest.mark.parametrize("focus", [0.5, 1.0, 2.0])
def test_the_gradient_flows_through_the_weight(focus):
    view = random_view(1)
    logits = view.logits.clone().requires_grad_()
    HardCrossEntropy(focus=focus).value(View(IMAGES, logits, labels=view.labels)).backward()
    # l = -(1 - p)^f ln p: dl/dp = f (1 - p)^(f - 1) ln p - (1 - p)^f / p, and dp/dz_k = p (y_k - q_k)
    q, y = view.logits.softmax(1), F.one_hot(view.labels, 7)
    p = (q * y).sum(1, keepdim=True)
    through = focus * (1 - p) ** (focus - 1) * p.log()
    beside = -((1 - p) ** focus) / p
    assert_close(logits.grad, (through + beside) * p * (y - q) / 32)
    constant = beside * p * (y - q) / 32
    assert (logits.grad - constant).norm() > 0.05 * constant.norm()


@pytest.mark.parametrize("focus", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("gap", [1e4, -1e4, 30.0, 17.0])
def test_certain_images_have_finite_gradients(focus, gap):
    logits = torch.tensor([[gap, 0.0]], requires_grad=True)
    loss = HardCrossEntropy(focus=focus).value(View(IMAGES, logits, labels=torch.tensor([0])))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@given(st.floats(0.01, 0.99), st.floats(0.0, 3.0), st.floats(0.0, 3.0))
def test_a_larger_focus_forgives_more(p, one, other):
    low, high = sorted((one, other))
    view = confident(p)
    assert HardCrossEntropy(focus=high).value(view) <= HardCrossEntropy(focus=low).value(view) + 1e-12


@pytest.mark.parametrize("focus", [-0.5, math.nan])
def test_a_negative_focus_is_refused(focus):
    with pytest.raises(RecipeError, match=f"focus cannot be negative, got {focus}"):
        HardCrossEntropy(focus=focus)


# --- easy images ------------------------------------------------------------------------------------------------


def test_a_label_is_believed_if_the_teacher_gives_it_more_than_half():
    assert EasyLabels().believed(confident(0.51, 0.49, 0.99, 0.01)).tolist() == [0, -1, 0, -1]


@pytest.mark.parametrize(
    ("threshold", "believed"), [(0.0, []), (0.3, [0.9]), (0.7, [0.9, 0.5]), (1.0, [0.9, 0.5, 0.1])]
)
def test_the_threshold_is_a_difficulty(threshold, believed):
    probabilities = [0.9, 0.5, 0.1]
    labels = EasyLabels(threshold=threshold).believed(confident(*probabilities))
    assert [p for p, label in zip(probabilities, labels.tolist(), strict=True) if label == 0] == believed


def test_a_threshold_of_1_is_the_plain_cross_entropy():
    view = random_view()
    labels = EasyLabels(threshold=1.0).believed(view)
    assert torch.equal(labels, view.labels)
    assert_close(StudentCrossEntropy().value(view.relabelled(labels)), StudentCrossEntropy().value(view))


def test_hard_images_alone_teach_nothing():
    view = confident(0.49, 0.3, 0.01)
    student = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    view = View(IMAGES, view.logits, student=student, labels=EasyLabels().believed(view))
    StudentCrossEntropy().value(view).backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_without_labels_an_image_is_what_the_teacher_sees():
    # the best classes are 0, 1 and 2, the last with a share of only 0.4
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]).log()
    view = View(IMAGES, logits)
    assert EasyLabels().believed(view).tolist() == [0, 1, -1]
    assert EasyLabels(threshold=1.0).believed(view).tolist() == [0, 1, 2]


def test_shares_are_judged_by_their_largest():
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]]).log()
    shares = torch.tensor([[0.6, 0.4, 0.0], [0.1, 0.4, 0.5]])
    assert EasyLabels().believed(View(IMAGES, logits, labels=shares)).tolist() == [0, -1]


def test_what_is_believed_has_no_gradient():
    view = random_view()
    logits = view.logits.clone().requires_grad_()
    assert not EasyLabels().believed(View(IMAGES, logits, labels=view.labels)).requires_grad


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_higher_threshold_believes_more(one, other):
    low, high = sorted((one, other))
    view = random_view()
    fewer, more = (EasyLabels(threshold=threshold).believed(view) >= 0 for threshold in (low, high))
    assert (more | ~fewer).all()


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_a_threshold_that_is_no_probability_is_refused(threshold):
    with pytest.raises(RecipeError, match=rf"threshold must lie in \[0, 1\], got {threshold}"):
        EasyLabels(threshold=threshold)


def test_a_threshold_of_1_believes_however_unlikely():
    logits = torch.tensor([[0.0, 20.0], [0.0, 50.0]])  # p = 2e-9 and 2e-22, whose 1 - p is 1 in float32
    view = View(torch.zeros(2, 3, 2, 2), logits, labels=torch.tensor([0, 0]))
    assert EasyLabels(threshold=1.0).believed(view).tolist() == [0, 0]
