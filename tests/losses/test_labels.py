import math

import pytest
import torch

from zsq.core import MissingView, View, needs
from zsq.losses import CrossEntropy

IMAGES = torch.zeros(2, 3, 2, 2)


def test_cross_entropy_by_hand():
    # logits (0, ln 3): probabilities 1/4 and 3/4; labels 1 and 0 cost -ln 3/4 and -ln 1/4
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)]])
    view = View(IMAGES, logits, labels=torch.tensor([1, 0]))
    assert CrossEntropy().value(view).item() == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)


def test_it_needs_labels():
    assert needs(CrossEntropy()) == {"labels"}
    with pytest.raises(MissingView, match="no labels"):
        CrossEntropy().value(View(IMAGES, torch.zeros(2, 2)))
