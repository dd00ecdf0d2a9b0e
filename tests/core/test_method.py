import re

import pytest
import torch
from torch.testing import assert_close

from zsq.core import Batch, Bits, Method, NoData, Paper, RecipeError, Run, Teacher, UnsupportedModel, smoke
from zsq.losses import BNStatistics, Distillation
from zsq.methods import BASELINES, METHODS
from zsq.quant import Calibrate, Distill, InsertFakeQuant, TrackRanges
from zsq.synthesis import Noise

EVERY = {**METHODS, **BASELINES}


@pytest.mark.parametrize("text", ["w4a8", "W4A8", " w4a8 ", Bits(4, 8)])
def test_bits_are_parsed(text):
    assert Bits.parse(text) == Bits(weights=4, activations=8)


@pytest.mark.parametrize("weights", [2, 3, 4, 5, 6, 7, 8, 32])
def test_bits_are_written_as_they_are_read(weights):
    assert str(Bits.parse(f"w{weights}a32")) == f"W{weights}A32"


@pytest.mark.parametrize("text", ["4x4", "w4", "a4w4", "w-4a4", "w4a4b", "", "w4.0a4"])
def test_other_forms_are_refused(text):
    with pytest.raises(RecipeError, match="bits are written like w4a4"):
        Bits.parse(text)


@pytest.mark.parametrize(
    ("text", "name"), [("w1a4", "weights"), ("w9a9", "weights"), ("w4a0", "activations"), ("w4a16", "activations")]
)
def test_widths_that_do_not_exist_are_refused(text, name):
    with pytest.raises(RecipeError, match=f"{name} can have 2 to 8 bits, or 32 for float, got"):
        Bits.parse(text)


@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY.keys())
def test_presets_are_overrides_of_the_method(method):
    assert method.preset("paper") is method
    assert "fast" in method.presets
    for name, changes in method.presets.items():
        assert method.preset(name) == method.override(changes)
    with pytest.raises(
        RecipeError, match=rf"{method.name} has no preset 'best': there is paper, {', '.join(method.presets)}$"
    ):
        method.preset("best")


@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY.keys())
def test_smoke_shrinks_every_count_and_nothing_else(method):
    least = {"steps": 3, "batches": 1, "samples": 8, "batch_size": 4}
    before, after = dict(method.leaves()), dict(smoke(method).leaves())
    assert before.keys() == after.keys()
    for path, value in after.items():
        name = path.rpartition(".")[2]
        counted = name in least and isinstance(value, int)
        assert value == (min(before[path], least[name]) if counted else before[path])


@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY.keys())
def test_a_method_says_where_it_comes_from(method):
    assert method.paper.title
    assert method.paper.venue
    assert EVERY[method.name] is method


def test_what_a_network_cannot_show_is_refused(plain, cnn):
    METHODS["zeroq"].check(Teacher(cnn))
    with pytest.raises(UnsupportedModel, match="zeroq reads BatchNorm layers with running statistics, and this"):
        METHODS["zeroq"].check(Teacher(plain))
    BASELINES["nearest"].check(Teacher(plain))


def test_only_learning_passes_make_a_method_train():
    assert METHODS["genie"].trains
    assert not METHODS["dfq"].trains


def test_a_method_without_images_is_refused_by_a_pass_that_asks(cnn, job_for):
    from zsq.core import Source

    method = Method(name="m", paper=Paper(title="t", venue="v"), quantizer=(InsertFakeQuant(), Calibrate()))
    job = job_for(cnn)
    source = Source(method.synthesizer, job)
    assert isinstance(method.synthesizer, NoData)
    insert, calibrate = method.quantizer
    insert.apply(job, source)
    with pytest.raises(RecipeError, match="made no images"):
        calibrate.apply(job, source)


# --- batches and sets -------------------------------------------------------------------------------------------


def with_passes(*passes, samples: int = 32) -> Method:
    paper = Paper(title="t", venue="v")
    return Method(name="m", paper=paper, synthesizer=Noise(samples=samples), quantizer=(InsertFakeQuant(), *passes))


@pytest.mark.parametrize(
    "step", [TrackRanges(batch_size=33), Distill(loss=Distillation(), batch_size=33)], ids=["ranges", "distill"]
)
def test_a_batch_larger_than_the_set_is_refused_before_work_starts(plain, step):
    message = (
        f"{type(step).__name__} draws batches of 33 from a set of 32 images: "
        "lower its batch_size or raise their samples"
    )
    with pytest.raises(RecipeError, match=re.escape(message)):
        with_passes(step).check(Teacher(plain))
    with_passes(step, samples=33).check(Teacher(plain))


def test_a_pass_with_images_of_its_own_draws_from_no_other(plain):
    with_passes(TrackRanges(batch_size=64, images=Noise(samples=64))).check(Teacher(plain))


def test_a_live_synthesizer_is_never_too_small(cnn):
    method = METHODS["gdfq"].override({"quantizer.distill.batch_size": 10**6})
    method.check(Teacher(cnn))


# --- a job's view -----------------------------------------------------------------------------------------------


@pytest.fixture
def counted(cnn, job_for):
    """A job, and a list that grows at each forward pass of its teacher."""
    job, passes = job_for(cnn), []
    job.teacher.module.register_forward_hook(lambda *_: passes.append(1))
    return job, passes


def test_known_logits_spare_the_teacher(counted, photos):
    job, passes = counted
    known = Batch(photos, labels=torch.arange(16) % 5, logits=torch.arange(80.0).view(16, 5))
    view = job.view(known, frozenset({"student", "labels"}))
    assert passes == []
    assert view.logits is known.logits
    assert view.labels is known.labels
    assert_close(view.student, job.student(photos))


@pytest.mark.parametrize("need", ["bn", "features", "branches", "maps"])
def test_the_teacher_runs_where_more_than_its_logits_is_wanted(counted, photos, need):
    job, passes = counted
    wrong = Batch(photos, logits=torch.zeros(16, 5))
    view = job.view(wrong, frozenset({"student", need}))
    assert len(passes) == 1
    assert_close(view.logits, job.teacher.module(photos))
    assert getattr(view, need) is not None


def test_unknown_logits_are_the_teachers(counted, photos):
    job, passes = counted
    assert_close(job.view(Batch(photos), frozenset()).logits, job.teacher.module(photos))
    assert len(passes) == 2  # the second is this line's own


def test_the_student_runs_only_if_it_is_asked_for(cnn, job_for, photos):
    job, passes = job_for(cnn), []
    job.student.register_forward_hook(lambda *_: passes.append(1))
    job.view(Batch(photos), frozenset({"bn"}))
    assert passes == []
    job.view(Batch(photos), frozenset({"student"}))
    assert passes == [1]


def test_in_half_precision_logits_and_parameters_stay_float32(cnn, job_for, photos):
    exact = job_for(cnn)
    half = job_for(cnn, Run(device="cpu", precision="bfloat16"))
    half.student.requires_grad_(True)
    seen = frozenset({"student", "bn"})
    one, other = exact.view(Batch(photos), seen), half.view(Batch(photos), seen)
    for a, b in ((one.logits, other.logits), (one.student, other.student)):
        assert b.dtype == torch.float32
        assert not torch.equal(a, b)  # it was half
        assert_close(a, b, rtol=0.05, atol=0.05)
    (Distillation().value(other) + BNStatistics().value(other)).backward()
    for parameter in half.student.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is None or parameter.grad.dtype == torch.float32


def test_images_of_its_own_may_be_too_few_as_well(plain):
    m = Method(
        name="m",
        paper=Paper(title="t", venue="v"),
        synthesizer=Noise(samples=64),
        quantizer=(InsertFakeQuant(), TrackRanges(batch_size=33, images=Noise(samples=32))),
    )
    with pytest.raises(RecipeError):
        m.check(Teacher(plain))
