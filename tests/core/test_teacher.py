import copy

import pytest
import tiny
import torch
from torch import nn
from torch.testing import assert_close

from zsq.core import Batch, Landmarks, MissingView, Teacher, UnsupportedModel, View, look
from zsq.losses import BranchEnergies, CamAlignment


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in network.modules())


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_the_network_handed_in_is_not_touched(cnn, photos):
    cnn.train().requires_grad_(True)
    before = copy.deepcopy(cnn.state_dict())
    teacher = Teacher(cnn)
    teacher.view(photos, frozenset({"bn"}))
    assert all(torch.equal(before[name], tensor) for name, tensor in cnn.state_dict().items())
    assert all(module.training for module in cnn.modules())
    assert all(parameter.requires_grad for parameter in cnn.parameters())
    assert hooks(cnn) == 0
    with torch.no_grad():
        cnn[0].weight.zero_()
    assert teacher.module[0].weight.abs().max() > 0  # and the teacher is a copy


def test_the_copy_is_frozen_in_eval_mode(cnn):
    teacher = Teacher(cnn.train())
    assert not any(module.training for module in teacher.module.modules())
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())


def test_nothing_is_hooked(cnn, photos):
    teacher = Teacher(cnn)
    for _ in range(3):
        assert len(teacher.view(photos, frozenset({"bn"})).bn) == norms(cnn) > 0
    assert hooks(teacher.module) == 0


def test_bn_inputs_are_what_entered_in_order(cnn, photos):
    view = Teacher(cnn).view(photos, frozenset({"bn"}))
    assert torch.equal(view.bn[0].x, cnn[0](photos))
    assert torch.equal(view.bn[0].mean, cnn[1].running_mean)
    assert torch.equal(view.bn[0].var, cnn[1].running_var)
    after = cnn[2](cnn[1](view.bn[0].x))
    assert torch.equal(view.bn[1].x, cnn[3].body[0](after))
    assert_close(view.logits, cnn(photos))


def test_images_may_have_gradients(cnn, photos):
    photos.requires_grad_()
    view = Teacher(cnn).view(photos, frozenset({"bn"}))
    view.bn[-1].x.sum().backward()
    assert photos.grad.abs().sum() > 0


def test_what_was_not_asked_for_is_an_error_in_words(cnn, photos):
    view = Teacher(cnn).view(photos)
    for name in ("bn", "labels", "student", "features", "branches", "maps"):
        with pytest.raises(MissingView, match=f"no {name} in this view: list it in the loss's `needs`"):
            getattr(view, name)
    view = View(photos, photos[:, 0, 0], labels=torch.arange(16), student=None)
    assert view.labels[3] == 3
    with pytest.raises(MissingView, match="no student"):
        _ = view.student


def test_a_failing_forward_pass_leaves_no_recording_behind(cnn, photos):
    teacher = Teacher(cnn)
    with pytest.raises(RuntimeError):
        teacher.view(photos[:, :2], frozenset({"bn"}))
    with pytest.raises(MissingView):
        _ = teacher.view(photos).bn
    assert len(teacher.view(photos, frozenset({"bn"})).bn) == norms(cnn)


def test_a_changed_teacher_is_a_copy(cnn, photos):
    teacher = Teacher(cnn)
    before = teacher.view(photos, frozenset({"bn"}))

    def zero_stem(network):
        network[0].weight.zero_()
        return network

    with torch.no_grad():
        changed = teacher.changed(zero_stem)
    assert changed.view(photos, frozenset({"bn"})).bn[0].x.abs().max() == 0
    after = teacher.view(photos, frozenset({"bn"}))
    assert torch.equal(before.logits, after.logits)
    assert len(after.bn) == norms(cnn)  # nothing is recorded twice


def test_hooks_of_the_owner_survive_in_copies(cnn, photos):
    cnn[2].register_forward_hook(lambda *_: torch.zeros(16, 4, 8, 8))
    teacher = Teacher(cnn)
    assert torch.equal(teacher.view(photos).logits, cnn(photos))
    assert torch.equal(teacher.changed(lambda network: network).view(photos).logits, cnn(photos))


def test_a_network_offers_what_it_has(cnn, plain):
    assert Teacher(cnn).offers == {"bn"}
    assert Teacher(plain).offers == frozenset()
    forgetful = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    assert Teacher(forgetful).offers == frozenset()


def test_a_transformer_offers_its_attention_and_its_tokens(job_for):
    offers = job_for(tiny.vit()).teacher.offers
    assert offers >= {"attention", "tokens", "class_token"}
    assert "bn" not in offers
    assert not job_for(tiny.cnn()).teacher.offers & {"attention", "tokens", "class_token"}


def test_tokens_that_are_left_out_have_no_say(job_for, photos):
    job = job_for(tiny.vit())
    marks, tokens = job.teacher.landmarks, torch.tensor([[0, 3, 9]]).expand(16, -1)
    assert (marks.tokens, marks.prefix, marks.grid) == ("drop", 1, (4, 4))
    images = photos.clone().requires_grad_()
    view = job.teacher.view(images, frozenset({"attention"}), tokens=tokens)
    view.logits.square().sum().backward()
    assert [layer.probabilities.shape for layer in view.attention] == [(16, 2, 3, 3)] * 2
    seen = images.grad.abs().sum((0, 1)).unflatten(0, (4, 2)).unflatten(2, (4, 2)).sum((1, 3)) > 0
    assert seen.flatten().nonzero().flatten().tolist() == [2, 8]  # the class token comes before the patches
    assert hooks(job.teacher.module) == 0
    found, _ = look(job.student, photos, frozenset(), marks, tokens)
    assert_close(found, view.logits)
    assert_close(job.view(Batch(photos, tokens=tokens), frozenset({"student"})).student, view.logits)


def test_tokens_of_a_network_without_are_an_error_in_words(cnn, photos):
    with pytest.raises(UnsupportedModel, match="no module of this network makes tokens that can be left out"):
        Teacher(cnn).view(photos, tokens=torch.zeros(16, 1, dtype=torch.int64))


def test_the_digest_is_the_identity_of_the_weights(cnn):
    digest = Teacher(cnn).digest()
    assert digest == Teacher(copy.deepcopy(cnn)).digest()
    with torch.no_grad():
        cnn[1].running_var[0] += 1e-6
    assert Teacher(cnn).digest() != digest


# --- landmarks --------------------------------------------------------------------------------------------------

PLACES = Landmarks(classifier="12", convolution="7", branches=("3.body.4",))
"""Of the tiny network: its Linear, its last convolution, the BatchNorm before its addition."""
EVERYTHING = frozenset({"features", "branches", "maps"})


def test_a_job_tells_the_teacher_where_its_landmarks_are(cnn, job_for):
    assert Teacher(cnn).landmarks == Landmarks()
    assert job_for(cnn).teacher.landmarks == PLACES


def test_a_copy_knows_the_landmarks_too(cnn):
    assert Teacher(cnn, PLACES).changed(lambda network: network).landmarks == PLACES


def test_the_landmarks_show_what_passes_there(cnn, photos):
    logits, seen = look(cnn, photos, EVERYTHING, PLACES)
    assert seen.keys() == EVERYTHING
    before = cnn[:3](photos)
    assert torch.equal(seen["branches"][0], cnn[3].body(before))
    assert torch.equal(seen["maps"], cnn[:8](photos))
    assert torch.equal(seen["features"], cnn[:12](photos))
    assert torch.equal(logits, cnn(photos))


def test_branches_come_in_the_order_of_the_list(cnn, photos):
    places = Landmarks(branches=("0", "3.body.4", "7"))
    branches = look(cnn, photos, frozenset({"branches"}), places)[1]["branches"]
    assert [each.shape[1:] for each in branches] == [(4, 8, 8), (4, 8, 8), (6, 4, 4)]
    assert torch.equal(branches[0], cnn[0](photos))


def test_only_what_is_asked_for_is_kept(cnn, photos):
    for need in EVERYTHING:
        assert look(cnn, photos, frozenset({need, "labels"}), PLACES)[1].keys() == {need}
    assert look(cnn, photos, frozenset(), PLACES)[1] == {}


def test_features_are_flat(photos):
    head = nn.Conv2d(3, 5, 1)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), head, nn.Flatten())
    features = look(network, photos, frozenset({"features"}), Landmarks(classifier="1"))[1]["features"]
    assert_close(features, photos.mean((2, 3)))


def test_no_look_leaves_a_hook(cnn, photos):
    look(cnn, photos, EVERYTHING, PLACES)
    with pytest.raises(RuntimeError):
        look(cnn, photos[:, :2], EVERYTHING, PLACES)
    assert hooks(cnn) == 0


def test_logits_have_gradients_by_maps_that_have_none(cnn, photos):
    view = Teacher(cnn, PLACES).view(photos, frozenset({"maps"}), student_maps=photos)
    maps, _ = view.maps
    assert maps.is_leaf
    (slope,) = torch.autograd.grad(view.logits[:, 0].sum(), maps)
    # behind the map: BatchNorm, ReLU, the mean of 16 pixels, a linear layer
    bn, linear = cnn[8], cnn[12]
    passed = (cnn[8](maps) > 0) * (bn.weight / (bn.running_var + bn.eps).sqrt())[:, None, None]
    assert_close(slope, (passed * linear.weight[0][:, None, None] / 16).detach())


def test_maps_leave_the_gradient_of_the_images_whole(cnn, photos):
    slopes = []
    for needs in (frozenset(), frozenset({"maps"})):
        images = photos.clone().requires_grad_()
        Teacher(cnn, PLACES).view(images, needs).logits.square().sum().backward()
        slopes.append(images.grad)
    assert_close(*slopes)
    assert slopes[0].abs().sum() > 0


def test_a_view_has_both_networks_on_the_same_images(cnn, job_for, photos):
    job = job_for(cnn)
    with torch.no_grad():
        job.student.get_submodule("0").weight.mul_(2)
    view = job.view(Batch(photos), EVERYTHING | {"student", "bn"})
    for teacher, student in (*zip(*view.branches, strict=True), view.maps, (view.logits, view.student)):
        assert teacher.shape == student.shape
        assert not torch.equal(teacher, student)
    assert_close(view.student, job.student(photos))
    assert_close(view.logits, cnn(photos))
    assert torch.equal(view.bn[0].x, cnn[0](photos))  # the teacher's alone
    assert_close(view.features, cnn[:12](photos))
    assert hooks(job.student) == hooks(job.teacher.module) == 0


def test_a_view_with_other_labels_is_the_same_otherwise(photos):
    view = View(photos, photos[:, 0, 0], labels=torch.arange(16), student=photos[:, 1, 1])
    other = view.relabelled(torch.full((16,), -1))
    assert view.labels.tolist() == list(range(16))
    assert other.labels.tolist() == [-1] * 16
    assert other.images is view.images
    assert other.logits is view.logits
    assert other.student is view.student


def test_a_view_says_whether_the_images_were_made_for_labels(photos):
    view = View(photos, photos[:, 0, 0], labels=None)
    assert not view.labelled
    assert view.relabelled(torch.arange(16)).labelled


class InPlace(nn.Module):
    """A residual block as torchvision and timm write it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*tiny.conv_bn(4, 4))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.body(x)
        out += x
        return self.relu(out)


def test_what_a_network_writes_over_later_was_seen_before(job_for, photos):
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    network = tiny.lively(nn.Sequential(*tiny.conv_bn(3, 4), nn.ReLU(), InPlace(), *head))
    view = job_for(network).view(Batch(photos), frozenset({"branches", "student"}))
    (teacher,), (student,) = view.branches
    wanted = network[3].body(network[:3](photos))
    assert_close(student, wanted)
    assert_close(teacher, wanted)
    assert BranchEnergies().value(view) < 1e-10


def test_a_map_may_be_written_over(job_for, photos):
    body = [nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)]
    network = tiny.lively(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)))
    job = job_for(network)
    job.student.requires_grad_(True)
    view = job.view(Batch(photos), frozenset({"maps", "student"}))
    assert_close(view.maps[0], network[0](photos))
    assert CamAlignment().value(view) < 1e-10


@pytest.mark.parametrize("need", ["branches", "maps"])
def test_what_a_network_does_not_have_cannot_be_seen(job_for, photos, need):
    network = tiny.lively(nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 5)))
    with pytest.raises(UnsupportedModel):
        job_for(network).view(Batch(photos), frozenset({need, "student"}))


def test_features_of_no_classifier_cannot_be_seen(cnn, photos):
    with pytest.raises(UnsupportedModel):
        Teacher(cnn).view(photos, frozenset({"features"}))
