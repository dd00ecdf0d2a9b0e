import pytest
import torch
from torch import nn

from zsq.core import Bits, Job, NoData, Run, Source, Teacher
from zsq.methods import METHODS
from zsq.nets.clip import ChannelClip
from zsq.nets.graph import capture


@pytest.mark.parametrize(("preset", "clip"), [("paper", ChannelClip), ("relu", nn.ReLU)])
def test_presets_decide_what_becomes_of_relu6(preset, clip):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 5)
    ).eval()
    student = capture(network, torch.zeros(2, 3, 6, 6))
    job = Job(Teacher(network), student, Bits.parse("w8a8"), Run(device="cpu"), (3, 6, 6))
    method = METHODS["dfq"].preset(preset)
    for each in method.quantizer:
        each.apply(job, Source(NoData(), job))
    assert type(student.get_submodule("2")) is clip
    x = torch.randn(8, 3, 6, 6)
    assert (student(x) - network(x)).abs().max() < 0.1
