import pytest

from zsq.api import find_method
from zsq.core import RecipeError
from zsq.methods import METHODS
from zsq.quant.inundation import Inundation

AIT = METHODS["ait"]
HOSTS = ["gdfq", "qimera", "intraq", "hast", "synq", "synq+genie"]


# the card's table: target at 32 pixels and at ImageNet, probes, learning rate, weight decay
def test_the_settings_are_those_of_the_card():
    distill = AIT.quantizer[-1]
    once = 200  # capped in the student's first epoch
    assert distill.optimizer == Inundation(share=1e-3, probes=5, capped_steps=once, momentum=0.9, weight_decay=0.0)
    assert AIT.preset("imagenet").quantizer[-1].optimizer.share == 1e-4
    assert {distill.lr, AIT.preset("imagenet").quantizer[-1].lr, AIT.preset("cifar").quantizer[-1].lr} == {1e-4}
    (kl,) = distill.loss.terms
    assert (str(kl), kl.temperature, kl.reduction) == ("Distillation", 20, "mean")


def test_everything_else_is_gdfqs():
    gdfq = METHODS["gdfq"]
    assert AIT.synthesizer == gdfq.synthesizer  # the generator keeps its labels
    own = ("loss", "optimizer", "lr")
    back = AIT.override({f"quantizer.distill.{name}": getattr(gdfq.quantizer[-1], name) for name in own})
    assert back.quantizer == gdfq.quantizer


@pytest.mark.parametrize("host", HOSTS)
def test_on_a_host_it_distills_without_labels_and_with_inundation(host):
    method, plain = find_method(f"ait+{host}"), find_method(host)
    assert method.name == ("ait" if host == "gdfq" else f"ait+{host}")
    assert method.synthesizer == plain.synthesizer
    assert method.quantizer[:-1] == plain.quantizer[:-1]
    assert method.quantizer[-1].optimizer == Inundation()
    assert method.quantizer[-1].lr == 1e-4
    (kl,) = method.quantizer[-1].loss.terms
    assert kl == plain.quantizer[-1].loss.parts()["distillation"]  # with the host's reduction and weight


def test_its_own_host_goes_unnamed():
    assert find_method("ait+gdfq") == AIT


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ait+zeroq", "ait changes how a student is distilled, and zeroq does not distill"),
        ("ait+genie", "ait changes how a student is distilled, and genie does not distill"),
        ("ait+dfq", "ait changes how a student is distilled, and dfq does not distill"),
        ("ait+nothing", "no method 'nothing': there is dfq"),
        ("gdfq+ait", "'gdfq' takes no host: plug-ins are synq, ait"),
    ],
)
def test_what_does_not_distill_is_no_host(name, says):
    with pytest.raises(RecipeError, match=says):
        find_method(name)


@pytest.mark.parametrize("host", HOSTS)
def test_every_preset_of_the_host_is_there_and_brings_no_labels_back(host, cnn, job_for):
    method, teacher = find_method(f"ait+{host}"), job_for(cnn).teacher
    assert method.presets.keys() == find_method(host).presets.keys() | {"imagenet"}
    for preset in method.presets:
        changed = method.preset(preset)
        changed.check(teacher)
        assert [type(term).__name__ for term in changed.quantizer[-1].loss.terms] == ["Distillation"]
        assert isinstance(changed.quantizer[-1].optimizer, Inundation)
