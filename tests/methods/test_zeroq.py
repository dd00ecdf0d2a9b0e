import torch
from torch import nn

from zsq.core import Bits, Job, Run, Source, Teacher, smoke
from zsq.methods import METHODS
from zsq.nets.graph import capture
from zsq.quant.quantizers import activation_quantizers


def test_pixels_start_as_almost_flat_grey():
    pixels = METHODS["zeroq"].synthesizer.pixels
    # uniform over 255 / 5418.75: a deviation of 255 / 5418.75 / sqrt(12)
    assert abs((pixels.high - pixels.low) / 12**0.5 - 0.0136) < 1e-4
    assert pixels.low == -pixels.high


def test_ranges_are_those_of_the_synthesized_images():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
    method = smoke(METHODS["zeroq"])
    student = capture(network, torch.zeros(2, 3, 6, 6))
    job = Job(Teacher(network), student, Bits(weights=32, activations=8), Run(device="cpu"), (3, 6, 6))
    source = Source(method.synthesizer, job)
    for each in method.quantizer:
        each.apply(job, source)
    (quantizer,) = activation_quantizers(student).values()
    largest = network[:3](source.take(None).images).max()
    torch.testing.assert_close(quantizer.scale.detach() * 255, largest.detach())
    assert quantizer.zero_point.item() == 0
