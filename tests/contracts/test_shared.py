"""Images that runs share: the student stays the same to the bit, and what learns beside it is never shared."""

import tiny
import torch

from zsq.api import find_method, quantize, reads_images
from zsq.core import NoData
from zsq.store import save_student
from zsq.synthesis import Noise


def test_shared_images_change_nothing(method, result_of, tmp_path):
    recipe = find_method(method)
    own = result_of(method)
    for _ in range(2):  # makes the images, then finds them
        result = quantize(tiny.fitting(method), method, "w3a4", shared=tmp_path, **tiny.settings(method))
        assert save_student(result.student, {}) == save_student(own.student, {})
        assert result.metrics["estimate"] == own.metrics["estimate"]
        if own.images is not None:
            assert torch.equal(result.images.images, own.images.images)
    kept = [path for path in tmp_path.rglob("*.pt") if "estimate" not in path.parts]
    makes = reads_images(recipe) and not isinstance(recipe.synthesizer, NoData | Noise)
    assert bool(kept) == (makes and not recipe.synthesizer.live)
