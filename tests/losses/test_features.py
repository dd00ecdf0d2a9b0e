import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from zsq.core import Batch, MissingView, RecipeError, View, needs, start
from zsq.losses import CentreDistance
from zsq.losses.features import class_centres

FEATURES = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
CENTRES = torch.tensor([[1.0, 0.0]] * 3)
KNOWN = torch.tensor([True, True, True])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- centres ----------------------------------------------------------------------------------------------------


def test_centres_by_hand():
    # class 0: the mean of (1, 2) and (3, 6), lengths and all; class 2: (5, 5); class 1 has none
    features = torch.tensor([[1.0, 2.0], [5.0, 5.0], [3.0, 6.0]])
    centres, known = class_centres(features, torch.tensor([0, 2, 0]), 4)
    assert centres.tolist() == [[2.0, 4.0], [0.0, 0.0], [5.0, 5.0], [0.0, 0.0]]
    assert known.tolist() == [True, False, True, False]


@given(st.integers(0, 50))
def test_a_centre_is_the_mean_of_its_class(seed):
    features = normal(30, 4, seed=seed)
    labels = torch.randint(6, (30,), generator=torch.Generator().manual_seed(seed))
    centres, known = class_centres(features, labels, 6)
    for label in range(6):
        mine = features[labels == label]
        assert known[label] == (len(mine) > 0)
        if len(mine):
            assert_close(centres[label], mine.mean(0))


# --- distances --------------------------------------------------------------------------------------------------


def test_a_ring_around_the_centre_by_hand():
    # d = 0, 1 - 1/sqrt 2 = 0.293 and 1; the margins 0.05 and 0.8 are missed by 0.05, 0 and 0.2
    loss = CentreDistance(lower=0.05, upper=0.8)
    each = [loss.distance(FEATURES[i : i + 1], CENTRES[:1], KNOWN[:1]).item() for i in range(3)]
    assert each == pytest.approx([0.05, 0.0, 0.2], abs=1e-6)
    assert loss.distance(FEATURES, CENTRES, KNOWN).item() == pytest.approx(0.25 / 3)


def test_the_mean_is_over_images_that_have_a_centre():
    loss = CentreDistance(lower=0.05, upper=0.8)
    some = torch.tensor([True, False, True])
    assert loss.distance(FEATURES, CENTRES, some).item() == pytest.approx(0.25 / 2)


def test_without_a_centre_there_is_no_loss_and_no_gradient():
    features = FEATURES.clone().requires_grad_()
    loss = CentreDistance().distance(features, torch.zeros(3, 2), ~KNOWN)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(features.grad, torch.zeros(3, 2))


@given(st.integers(0, 50))
def test_margins_of_0_and_2_are_never_missed(seed):
    features, centres = normal(8, 3, seed=seed).requires_grad_(), normal(8, 3, seed=seed + 100)
    loss = CentreDistance(lower=0.0, upper=2.0).distance(features, centres, torch.ones(8, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(features.grad, torch.zeros(8, 3))


@given(st.integers(0, 50), st.floats(0.1, 10), st.floats(0.1, 10))
def test_only_directions_count(seed, one, other):
    features, centres = normal(8, 3, seed=seed), normal(8, 3, seed=seed + 100)
    known = torch.ones(8, dtype=torch.bool)
    loss = CentreDistance(lower=0.5, upper=0.7)
    wanted = loss.distance(features, centres, known)
    assert_close(loss.distance(one * features, other * centres, known), wanted, rtol=1e-4, atol=1e-5)


def test_descent_leads_into_the_ring():
    def gap(feature: Tensor) -> float:
        return 1 - torch.cosine_similarity(feature, CENTRES[:1]).item()

    loss = CentreDistance(lower=0.2, upper=0.4)
    for angle, direction in ((0.3, 1), (1.5, -1)):  # d = 0.045 is too close, d = 0.929 too far
        feature = torch.tensor([[math.cos(angle), math.sin(angle)]], requires_grad=True)
        loss.distance(feature, CENTRES[:1], KNOWN[:1]).backward()
        moved = feature.detach() - 0.1 * feature.grad
        assert direction * (gap(moved) - gap(feature.detach())) > 0


# --- beside the images made so far ------------------------------------------------------------------------------


def test_the_first_batch_keeps_to_nothing(cnn, job_for, photos):
    job = job_for(cnn)
    loss = CentreDistance(lower=0.5, upper=0.6)
    view = job.teacher.view(photos, needs(loss), labels=torch.zeros(16, dtype=torch.long))
    assert start(loss, job)(view).item() == 0
    assert loss.value(view).item() == 0


def test_centres_come_from_all_earlier_images(cnn, job_for, photos):
    job = job_for(cnn)
    loss = CentreDistance(lower=0.3, upper=0.4)
    labels = torch.tensor([0, 0, 1, 1, 1, 3, 0, 3, 4, 2])
    job.made += [Batch(photos[:4], labels[:4]), Batch(photos[4:10], labels[4:10])]
    wanted = torch.tensor([0, 1, 3, 0, 4, 2])
    images = photos[10:].clone().requires_grad_()
    view = job.teacher.view(images, needs(loss), labels=wanted)
    features = job.teacher.module[:-1](photos).double()  # what the last layer reads
    total = 0.0
    for feature, label in zip(features[10:], wanted, strict=True):
        centre = features[:10][labels == label].mean(0)
        d = 1 - (feature @ centre / feature.norm() / centre.norm()).item()
        total += max(0.3 - d, 0) + max(d - 0.4, 0)
    found = start(loss, job)(view)
    assert total > 0
    assert found.item() == pytest.approx(total / 6, rel=1e-4)
    found.backward()
    assert images.grad.abs().sum() > 0


def test_centres_stay_for_one_optimisation(cnn, job_for, photos):
    job = job_for(cnn)
    loss = CentreDistance(lower=0.3, upper=0.4)
    labels = torch.zeros(8, dtype=torch.long)
    job.made.append(Batch(photos[:8], labels))
    view = job.teacher.view(photos[8:], needs(loss), labels=labels)
    term = start(loss, job)
    before = term(view)
    job.made.append(Batch(-photos[:8], labels))
    assert torch.equal(term(view), before)
    assert not torch.equal(start(loss, job)(view), before)


def test_a_class_without_earlier_images_is_free(cnn, job_for, photos):
    job = job_for(cnn)
    job.made.append(Batch(photos[:8], torch.zeros(8, dtype=torch.long)))
    loss = CentreDistance(lower=0.5, upper=0.6)
    view = job.teacher.view(photos[8:], needs(loss), labels=torch.full((8,), 4))
    assert start(loss, job)(view).item() == 0


def test_the_value_alone_is_nothing():
    assert CentreDistance().value(View(torch.zeros(1, 3, 2, 2), torch.ones(1, 2))).item() == 0


@pytest.mark.parametrize(("lower", "upper"), [(0.8, 0.05), (-0.1, 0.8), (math.nan, 0.8)])
def test_margins_out_of_order_are_refused(lower, upper):
    with pytest.raises(RecipeError, match=f"must be ordered and not negative, got {lower} and {upper}"):
        CentreDistance(lower=lower, upper=upper)


def test_earlier_images_without_labels_are_an_error_in_words(cnn, job_for, photos):
    job = job_for(cnn)
    job.made.append(Batch(photos))
    with pytest.raises((MissingView, RecipeError)):
        CentreDistance().begin(job)
