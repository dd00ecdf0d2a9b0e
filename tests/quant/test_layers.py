from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from zsq.core import Batch
from zsq.quant import MINMAX_PTQ, SIMULATE_ALL, Calibrate, FoldBatchNorm, InsertFakeQuant, Percentile
from zsq.quant.layers import complete, fold, layers_in_order
from zsq.quant.placement import float_tensors
from zsq.quant.quantizers import activation_quantizers, weight_quantizer
from zsq.synthesis import Noise, UniformPixels


def test_quantized_behind_quantized_layers_in_one_pass(job_of, apply):
    # the range of the second quantizer is that of values which the first, of 2 bits, has already rounded
    network = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)).eval()
    network[2].weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    job = job_of(network, "w32a2", (3, 1, 1))
    apply(job, InsertFakeQuant(protocol=MINMAX_PTQ))
    first, second = activation_quantizers(job.student).values()
    for quantizer in (first, second):
        quantizer.observe(Calibrate().range)
    job.student(torch.tensor([0.1, 1.4, 3.0]).view(1, 3, 1, 1))
    assert first.scale.item() == 1
    assert second.scale.item() == pytest.approx(1 / 3)  # 0 and 1, not 0.1 and 1.4


def test_ranges_of_the_float_network(resnet, images, job_of, apply):
    """The extremes of what the teacher computes, whatever the order of the images."""
    scales = []
    for order in (images, images.flip(0)):
        job = job_of(resnet, "w2a2")
        apply(job, InsertFakeQuant(protocol=SIMULATE_ALL))
        source = SimpleNamespace(batches=lambda size, samples, order=order: (Batch(x) for x in order.split(4)))
        Calibrate(inputs="float").apply(job, source)
        scales.append({name: (q.scale.item(), q.ready) for name, q in activation_quantizers(job.student).items()})
    assert scales[0] == scales[1]
    logged = []
    resnet.pool.register_forward_pre_hook(lambda _, inputs: logged.append(inputs[0].max().item()))
    resnet(images)
    assert scales[0]["activation_quantizers.stages_1_0_relu2"] == (pytest.approx(logged[0] / 3, rel=1e-4), True)


def test_a_bias_is_given_once_and_noted(resnet, job_of):
    graph = job_of(resnet).student
    complete(graph, "stem.0")
    complete(graph, "stem.0")
    complete(graph, "head")  # has one
    assert graph.get_submodule("stem.0").bias.tolist() == [0, 0, 0, 0]
    assert graph.meta["edits"] == [["complete", "stem.0"]]


def test_calibration_looks_at_so_many_images(resnet, job_of, apply):
    seen = []
    for samples, batch_size in ((8, 4), (5, 64)):
        job = job_of(resnet)
        job.student.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        apply(job, InsertFakeQuant(), Calibrate(samples=samples, batch_size=batch_size), synthesizer=Noise(samples=16))
        assert all(quantizer.ready for quantizer in activation_quantizers(job.student).values())
    assert seen == [4, 4, 5]


def test_calibration_uses_its_range(resnet, job_of, apply):
    scales = []
    for calibrate in (Calibrate(), Calibrate(range=Percentile(share=0.9))):
        job = job_of(resnet)
        apply(job, InsertFakeQuant(), calibrate, synthesizer=Noise(samples=8))
        scales.append(next(iter(activation_quantizers(job.student).values())).scale.item())
    assert scales[1] < scales[0]


@pytest.mark.parametrize(("pixels", "high"), [("seen", 0.5), ("possible", 2.5)])
def test_the_range_of_images_is_known_without_seeing_them(pixels, high, resnet, job_of, apply):
    job = job_of(resnet, "w8a8")
    dull = Noise(pixels=UniformPixels(low=0.0, high=0.5), samples=64)
    protocol = replace(SIMULATE_ALL, pixels=pixels)
    apply(job, InsertFakeQuant(protocol=protocol), Calibrate(), synthesizer=dull)
    found = activation_quantizers(job.student)["activation_quantizers.images"]
    low = 0.0 if pixels == "seen" else -2.5  # of the job's pixel box
    shown = found.rounded(torch.tensor([-9.0, 9.0]))  # as far as the grid reaches
    assert_close(shown, torch.tensor([low, high]), atol=5 / 255, rtol=0)


def test_images_beyond_what_pixels_can_be_widen_the_range_too(resnet, job_of, apply):
    job = job_of(resnet, "w8a8")
    loud = Noise(pixels=UniformPixels(low=-1.0, high=4.0), samples=64)
    protocol = replace(SIMULATE_ALL, pixels="possible")
    apply(job, InsertFakeQuant(protocol=protocol), Calibrate(), synthesizer=loud)
    found = activation_quantizers(job.student)["activation_quantizers.images"]
    shown = found.rounded(torch.tensor([-9.0, 9.0]))
    assert_close(shown, torch.tensor([-2.5, 4.0]), atol=6.5 / 255, rtol=0)


def test_calibration_of_nothing_asks_for_no_images(resnet, job_of, apply):
    apply(job_of(resnet, "w4a32"), InsertFakeQuant(), Calibrate())  # there are none


def test_a_quantizer_that_nothing_reaches_is_reported(job_of, apply):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return (self.a(x) if x.sum() < 1e9 else self.b(x)).flatten(1)

    job = job_of(Branch().eval())
    apply(job, InsertFakeQuant())
    apply(job, Calibrate(), synthesizer=Noise(samples=4))
    assert float_tensors(job.student) == ["root.b <- input"]
    assert weight_quantizer(job.student.get_submodule("root.b")) is not None


def test_folding_keeps_the_function_and_happens_once(resnet, mobilenet, images, job_of, apply):
    for network in (resnet, mobilenet):
        job = job_of(network)
        before = network.state_dict()["stem.1.running_mean"].clone()
        apply(job, FoldBatchNorm(), FoldBatchNorm(), InsertFakeQuant(protocol=SIMULATE_ALL))
        assert job.student.meta["edits"] == [["fold"]]
        job = job_of(network)
        fold(job.student)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in job.student.modules())
        assert_close(job.student(images), network(images), atol=1e-5, rtol=1e-5)
        assert torch.equal(network.state_dict()["stem.1.running_mean"], before)


def test_layers_come_in_the_order_in_which_they_run(resnet, job_of):
    names = list(layers_in_order(job_of(resnet).student))
    assert names[0] == "stem.0"
    assert names[-1] == "head"
    assert len(names) == 7
