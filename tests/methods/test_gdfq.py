import pytest

from zsq.methods import METHODS

GDFQ = METHODS["gdfq"]
EPOCH = 200
"""Steps."""


def spans(method):
    """The steps in which ranges are found, the student waits, and the student learns."""
    _, ranges, wait, distill = method.quantizer
    return ranges.steps, wait.steps, distill.steps


# the card's table: images a step, epochs in which only the generator learns, learning rate of the student
@pytest.mark.parametrize(("preset", "batch_size", "warm_up", "lr"), [("paper", 16, 50, 1e-6), ("cifar", 200, 4, 1e-4)])
def test_the_settings_are_those_of_the_card(preset, batch_size, warm_up, lr):
    method = GDFQ.preset(preset)
    makes, distill = method.synthesizer, method.quantizer[-1]
    assert makes.batch_size == batch_size
    assert (makes.lr, makes.betas, makes.latents.latent) == (1e-3, (0.5, 0.999), 100)
    assert str(makes.loss) == "CrossEntropy + 0.1 * BNStatistics"
    assert distill.lr == lr
    assert (distill.optimizer.momentum, distill.optimizer.weight_decay) == (0.9, 1e-4)
    kl = distill.loss.parts()["distillation"]
    assert (kl.weight, kl.temperature, kl.reduction) == (1, 20, "mean")
    assert distill.loss.parts()["student_cross_entropy"].weight == 1
    assert (distill.straight_through, distill.student_bn) == ("all", "eval")
    assert spans(method)[0] == 4 * EPOCH
    assert sum(spans(method)[:2]) == warm_up * EPOCH
    assert sum(spans(method)) == 400 * EPOCH


@pytest.mark.parametrize("preset", ["paper", "cifar"])
def test_both_learning_rates_fall_at_the_epochs_100_200_and_300(preset):
    method = GDFQ.preset(preset)
    before = sum(spans(method)[:2])
    for schedule, start in ((method.synthesizer.schedule, 0), (method.quantizer[-1].schedule, before)):
        assert [start + step for step in schedule.at] == [100 * EPOCH, 200 * EPOCH, 300 * EPOCH]
        assert schedule.factor == 0.1


def test_variances_are_matched_in_the_mean_over_channels_and_layers():
    statistics = GDFQ.synthesizer.loss.parts()["bn_statistics"]
    assert (statistics.over, statistics.spread, statistics.unbiased) == ("batch", "var", False)
    assert (statistics.channels, statistics.layers, statistics.margin) == ("mean", "mean", 0)


def test_large_images_have_conditional_normalization_and_small_ones_multiplied_labels():
    kinds = {
        preset: (type(makes.latents).__name__, type(makes.trunk).__name__)
        for preset in ("paper", "cifar", "fast")
        if (makes := GDFQ.preset(preset).synthesizer)
    }
    small = ("LabelTimesNoise", "ConvTrunk")
    assert kinds == {"paper": ("PlainNoise", "ConditionalTrunk"), "cifar": small, "fast": small}


def test_every_layer_has_the_same_bits():
    insert = GDFQ.quantizer[0]
    assert insert.protocol.name == "qat-lowbit-all"
    assert set(insert.protocol.ends.parts().values()) == {None}
    assert insert.follow


def test_only_the_released_average_is_fed_its_own_correction():
    corrections = {name: GDFQ.preset(name).quantizer[1].average.correction for name in ("paper", "cifar", "released")}
    assert corrections == {"paper": "on reading", "cifar": "on reading", "released": "fed back"}
