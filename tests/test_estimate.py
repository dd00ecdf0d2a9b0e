import json
import math

import pytest
import tiny
import torch
from torch import nn
from torch.testing import assert_close

from zsq.api import load, quantize
from zsq.core import Bits, Job, Run, Teacher, UnsupportedModel
from zsq.estimate import Estimate, ImageSource, agreement, estimate_drop, image_sources, in_words, smoke_sources, wilson
from zsq.nets.graph import capture
from zsq.synthesis import DeadLeaves, Noise

LEAVES = {"leaves": ImageSource(Noise(pixels=DeadLeaves(), samples=24), points=0.5)}


def job_on(network: nn.Module, seed: int = 0) -> Job:
    student = capture(network, torch.zeros(2, *tiny.SHAPE))
    return Job(Teacher(network), student, Bits(), Run(device="cpu", seed=seed), tiny.SHAPE)


def smoke_estimate(job: Job) -> Estimate:
    return estimate_drop(job, smoke_sources(job))


def logits_of(*shares: list[float]) -> torch.Tensor:
    return torch.tensor(shares).log()


# --- the numbers ------------------------------------------------------------------------------------------------


def test_agreement_by_hand():
    teacher = logits_of([0.6, 0.3, 0.1], [0.2, 0.8, 0.0], [0.1, 0.5, 0.4])
    student = logits_of([0.5, 0.4, 0.1], [0.7, 0.3, 0.0], [0.1, 0.4, 0.5])
    found = agreement(teacher, student)
    assert found.images == 3
    assert found.agreement == pytest.approx(100 / 3, abs=1e-3)  # the first alone
    assert found.confidence == pytest.approx(100 * (0.6 + 0.8 + 0.5) / 3, abs=1e-3)
    assert found.weighted_agreement == pytest.approx(100 * 0.6 / 1.9, abs=1e-3)
    # labels from the teacher: it is right with 0.6, 0.8, 0.5 and the student with 0.6, 0.2, 0.4
    assert found.expected_drop == pytest.approx(100 * (0.0 + 0.6 + 0.1) / 3, abs=1e-3)
    assert found.distance == pytest.approx(100 * (0.1 + 0.5 + 0.1) / 3, abs=1e-3)


def test_wilson_by_hand():
    # z^2 = 4, n = 12, share 1/4: centre (1/4 + 1/6) / (4/3) = 5/16, reach sqrt(1/3 * 3/16 + 1/36) / (4/3) = 0.2253
    low, high = wilson(0.25, 12, deviations=2.0)
    assert low == pytest.approx(0.3125 - 0.75 * math.sqrt(1 / 16 + 1 / 36))
    assert high == pytest.approx(0.3125 + 0.75 * math.sqrt(1 / 16 + 1 / 36))
    assert wilson(0.0, 20)[0] == 0.0
    assert wilson(0.0, 20)[1] > 0.1
    assert wilson(1.0, 20)[1] == 1.0


def test_estimate_by_hand():
    """A student whose first class is never the teacher's: everything is lost, at half a point a point."""
    job = job_on(tiny.cnn())
    last = job.student.get_submodule("12")
    with torch.no_grad():
        last.weight.neg_()
        last.bias.neg_()
    found = estimate_drop(job, LEAVES)
    assert found.sources["leaves"].agreement == 0
    assert found.sources["leaves"].images == 24
    assert found.drop == 50
    assert found.high == 50
    assert 40 < found.low < 50


def test_the_first_source_decides_and_the_interval_has_the_outer_ends_of_all():
    job = job_on(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval())
    with torch.no_grad():
        job.student.get_submodule("1").weight.mul_(torch.tensor([[1.0], [1.0], [1.0], [1.0], [0.0]]))
    both = {"a": LEAVES["leaves"], "b": ImageSource(Noise(samples=40), points=0.2)}
    alone = [estimate_drop(job, {name: each}) for name, each in both.items()]
    found = estimate_drop(job, both)
    assert all(0 < each.agreement < 100 for each in found.sources.values())
    assert found.drop == alone[0].drop != alone[1].drop
    assert (found.low, found.high) == (min(e.low for e in alone), max(e.high for e in alone))
    assert all(each.low <= each.drop <= each.high for each in (*alone, found))


def test_a_student_that_is_the_teacher_loses_nothing():
    found = smoke_estimate(job_on(tiny.cnn()))
    assert (found.drop, found.low) == (0, 0)
    assert found.high > 0  # so few images prove little
    assert all(each.weighted_agreement == 100 for each in found.sources.values())


# --- independence -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["cnn", "plain", "vit"])
def test_there_are_two_sources_for_any_network(network):
    found = smoke_estimate(job_on(getattr(tiny, network)()))
    assert list(found.sources) == ["class images", "dead leaves"]
    assert all(each.images == 8 for each in found.sources.values())


def test_a_network_that_passes_no_gradient_is_shown_dead_leaves_alone():
    class Bessel(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    job = job_on(nn.Sequential(nn.Conv2d(3, 4, 3), Bessel(), nn.Flatten(), nn.Linear(144, 5)).eval())
    assert list(smoke_estimate(job).sources) == ["dead leaves"]


def test_a_network_of_one_logit_has_no_estimate():
    network = tiny.with_one_logit(tiny.cnn())
    with pytest.raises(UnsupportedModel, match="1 logit"):
        smoke_estimate(job_on(network))
    assert "estimate" not in quantize(network, "nearest", **tiny.settings("nearest")).metrics


def test_the_estimate_changes_no_bit_of_the_run(tmp_path):
    results = {}
    for wanted in (True, False):
        folder = tmp_path / str(wanted)
        result = quantize(tiny.cnn(), "zeroq", "w3a3", out=folder, estimate=wanted, **tiny.settings("zeroq"))
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        results[wanted] = (folder / "student.safetensors").read_bytes(), result.images.images, files
        assert ("estimate" in result.metrics) == wanted
        assert ("estimate" in result.metrics["seconds"]) == wanted
    assert results[True][0] == results[False][0]
    assert torch.equal(results[True][1], results[False][1])
    assert results[True][2] == results[False][2]  # it leaves no piece and no stream behind
    steps = [json.loads(line)["label"] for line in (tmp_path / "True" / "log.jsonl").read_text().splitlines()]
    assert len(steps) == len((tmp_path / "False" / "log.jsonl").read_text().splitlines())


def test_the_same_seed_gives_the_same_estimate_whoever_made_the_student():
    network = tiny.cnn()
    first, again = (smoke_estimate(job_on(network, seed=3)) for _ in range(2))
    assert first == again
    made = [estimate_of(network, method).sources["dead leaves"].confidence for method in ("nearest", "squant")]
    assert made[0] == made[1]  # both are asked about the same images
    assert made[0] != smoke_estimate(job_on(network, seed=3)).sources["dead leaves"].confidence


def estimate_of(network: nn.Module, method: str):
    result = quantize(network, method, "w2a2", **tiny.settings(method))
    job = Job(Teacher(network), result.student, Bits(), Run(device="cpu"), tiny.SHAPE)
    return smoke_estimate(job)


def test_a_finished_run_gives_the_same_estimate(tmp_path):
    network = tiny.cnn()
    result = quantize(network, "nearest", "w2a2", out=tmp_path / "run", **tiny.settings("nearest"))
    student, found = load(tmp_path / "run", network)
    from zsq.api import pixel_box

    job = Job(Teacher(found.module), student, Bits(), Run(device="cpu"), tiny.SHAPE, pixel_box(found))
    again = smoke_estimate(job)
    kept = result.metrics["estimate"]
    assert (again.drop, again.low, again.high) == (kept["drop"], kept["low"], kept["high"])
    assert kept["drop"] > 0


def test_fewer_bits_are_estimated_to_cost_more():
    found = [
        quantize("zoo:digits-resnet", "nearest", bits, effort="fast").metrics["estimate"] for bits in ("w8a8", "w2a2")
    ]
    assert found[0]["drop"] < 1.5
    assert found[1]["drop"] > 10
    assert found[1]["low"] > found[0]["high"]


def test_images_of_a_source_lie_at_all_distances_from_a_decision():
    """On a trained network the images made for classes are as sure, and as unsure, as photographs are."""
    from zsq.api import pixel_box
    from zsq.core import Source
    from zsq.nets.load import load_network
    from zsq.synthesis.margins import margins

    network = load_network("zoo:digits-resnet")
    student = capture(network.module, torch.zeros(2, *network.input_shape))
    job = Job(Teacher(network.module), student, Bits(), Run(device="cpu"), network.input_shape, pixel_box(network))
    made = Source(image_sources(job)["class images"].synthesizer, job).take(None)
    with torch.no_grad():
        found = margins(job.teacher.module(made.images), made.labels)
    assert_close(found.quantile(torch.tensor([0.25, 0.5, 0.75])), torch.tensor([3.0, 6.0, 9.0]), atol=3.0, rtol=0)
    assert made.labels.unique().numel() == 10


# --- words ------------------------------------------------------------------------------------------------------


def test_words_say_no_more_than_was_found_out():
    small, large = {"drop": 3.14, "low": 1.0, "high": 5.55}, {"drop": 20.1, "low": 1.0, "high": 30.0}
    assert in_words({"estimate": small, "input_shape": [3, 8, 8]}) == "a drop of 3.1 points (1.0 to 5.5), without data"
    assert in_words({"estimate": large, "input_shape": [3, 8, 8]}) == "a drop of more than 20 points, without data"
    assert in_words({"estimate": small, "input_shape": [1, 8, 8]}).endswith(
        "a guess, tested on colour photographs alone"
    )
