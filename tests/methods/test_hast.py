import pytest

from zsq.methods import METHODS
from zsq.synthesis import CropAndFlip

HAST = METHODS["hast"]
FALLS = (3_200, 7_200, 11_200)
"""Epochs 20, 40 and 60 of 200 steps, of which the student misses four."""


# the card's table: beta, gamma, lambda, epsilon, learning rate, images a step, steps at which the rate falls
@pytest.mark.parametrize(
    ("preset", "beta", "gamma", "energies", "epsilon", "lr", "batch_size", "at"),
    [
        ("cifar", 10, 2, 1_000, 0.01, 1e-5, 256, FALLS),
        ("cifar100", 10, 2, 2_000, 0.02, 1e-5, 256, FALLS),
        ("paper", 0.1, 0.5, 4_000, 0.01, 1e-6, 16, (19_200,)),
        ("released", 0.1, 0.5, 1_000, 0.01, 1e-6, 16, (19_200,)),
    ],
)
def test_the_settings_are_those_of_the_card(preset, beta, gamma, energies, epsilon, lr, batch_size, at):
    method = HAST.preset(preset)
    makes, distill = method.synthesizer, method.quantizer[-1]
    assert list(makes.loss.parts()) == ["bn_statistics", "hard_cross_entropy"]
    hard = makes.loss.parts()["hard_cross_entropy"]
    assert (hard.weight, hard.focus) == (beta, gamma)
    assert (makes.samples, makes.batch_size, makes.steps, makes.lr) == (5120, 256, 1000, 0.5)
    assert (makes.schedule.factor, makes.schedule.patience, makes.schedule.min_lr) == (0.1, 50, 1e-4)
    terms = distill.loss.parts()
    assert list(terms) == ["distillation", "branch_energies"]  # no labels
    assert terms["distillation"].weight * terms["distillation"].temperature ** 2 == 8000
    assert terms["branch_energies"].weight == energies
    assert (distill.gradient.epsilon, distill.gradient.weight, distill.gradient.moved) == (epsilon, 1, None)
    assert (distill.lr, distill.batch_size, distill.schedule.at) == (lr, batch_size, at)
    assert (distill.optimizer.momentum, distill.optimizer.weight_decay) == (0.9, 1e-4)
    assert distill.steps == (151 - 4) * 200


@pytest.mark.parametrize("preset", ["cifar", "cifar100", "fast"])
def test_small_images_are_not_cropped_while_they_are_made(preset):
    assert HAST.preset(preset).synthesizer.jitter is None
    assert HAST.synthesizer.jitter == CropAndFlip(scale=0.4, probability=0.5)
    assert HAST.preset(preset).quantizer[-1].transforms == (CropAndFlip(scale=0.5),)


def test_the_released_code_finds_ranges_on_the_images_of_a_generator():
    assert HAST.preset("released").quantizer[1] == METHODS["intraq"].preset("released").quantizer[1]
    assert HAST.quantizer[1].images is None
