import numpy as np
import pytest

from zsq.runtime.numerics import distance, snr


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_snr_by_hand():
    # |(3, 4)|^2 = 25, |(0, 0.5)|^2 = 0.25: a hundred times, 20 dB
    assert snr(np.float32([3, 4]), np.float32([3, 4.5])) == pytest.approx(20)
    assert snr(np.float32([3, 4]), np.float32([3, 4])) == 200
    assert snr(np.float32([3, 4]), np.float32([3, np.nan])) == -200


def test_a_distance_by_hand():
    exact = np.float32([[1, 0], [0, 1], [1, 0], [0, 1]])
    simulation = np.float32([[1, 0], [0, 1], [0.5, 0], [1, 0]])
    logits = np.float32([[1, 0], [1, 0.25], [0.5, 0], [1, 0]])
    found = distance("it", logits, simulation, exact, np.array([0, 1, 1, 0]))
    assert found.largest == 1.0  # second image, first logit
    assert found.agrees_simulation == 75
    assert found.agrees_float == 50
    assert found.top1 == 50  # images 0 and 3
    assert found.images == 4


def test_what_is_as_near_to_float_as_the_simulation_is_right_however_far_from_the_simulation():
    exact = 10 * noise(500, 10)
    simulation, file = exact + noise(500, 10, seed=1), exact + noise(500, 10, seed=2)
    found = distance("it", file, simulation, exact)
    assert found.fault is None
    assert found.snr_simulation < found.snr_float - 2  # two independent errors: 3 dB


def test_what_is_farther_from_float_is_a_fault():
    exact = 10 * noise(500, 10)
    simulation, file = exact + noise(500, 10, seed=1), exact + 1.4 * noise(500, 10, seed=2)
    assert distance("it", file, simulation, exact).fault == "is 17.0 dB from the float network, the simulation 20.0 dB"
    assert distance("it", 0 * file, simulation, exact).fault is not None
    assert distance("it", np.nan * file, simulation, exact).fault is not None


def test_sixty_decibels_down_nothing_is_a_fault():
    exact = 10 * noise(500, 10)
    assert distance("it", exact + 0.001 * noise(500, 10, seed=1), exact, exact).fault is None
    assert distance("it", exact + 0.1 * noise(500, 10, seed=1), exact, exact).fault is not None


def test_lost_accuracy_is_a_fault_where_chance_does_not_explain_it():
    labels = np.zeros(1000, int)
    right, wrong = np.float32([1, 0.9]), np.float32([0.9, 1])
    exact = np.tile(right, (1000, 1))

    def file(lost: int) -> np.ndarray:
        return np.concatenate([np.tile(wrong, (lost, 1)), np.tile(right, (1000 - lost, 1))])

    # Lost are 10 of 1000 for a point, and twice sqrt(lost) for chance: 23 > 10 + 2 * 4.8, 18 < 10 + 2 * 4.2.
    simulation = np.tile(right * 1.5, (1000, 1))  # farther from float than any of these files
    assert distance("it", file(18), simulation, exact, labels).fault is None
    says = distance("it", file(23), simulation, exact, labels).fault
    assert says == "has the right top-1 on 97.70 % of the images, the simulation on 100.00 %"
