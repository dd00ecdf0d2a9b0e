import pytest

from zsq.core import Bits, Method, NoData, Paper, RecipeError, Teacher, UnsupportedModel, smoke
from zsq.methods import BASELINES, METHODS
from zsq.quant import Calibrate, InsertFakeQuant

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
