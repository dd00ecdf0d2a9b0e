import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from zsq.core import MissingView, Teacher, View


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
    for name in ("bn", "labels", "student"):
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


def test_the_digest_is_the_identity_of_the_weights(cnn):
    digest = Teacher(cnn).digest()
    assert digest == Teacher(copy.deepcopy(cnn)).digest()
    with torch.no_grad():
        cnn[1].running_var[0] += 1e-6
    assert Teacher(cnn).digest() != digest
