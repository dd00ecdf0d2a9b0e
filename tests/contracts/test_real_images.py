"""The control on real images: every quantizer that is fed with a finite set of images can be fed with these."""

import numpy as np
import tiny
import torch

from zsq.api import find_method, quantize
from zsq.compare import Grid, plan
from zsq.core import NoData, needs
from zsq.synthesis import Noise


def test_the_quantizer_takes_real_images(method, tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("test", 5), ("train", 40)):
        x = rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", x=x, y=np.arange(count) % 5)
    recipe = find_method(method)
    model = "tiny:vit" if "attention" in needs(recipe) else "tiny:cnn"
    data, calibration = (str(tmp_path / f"{name}.npz") for name in ("test", "train"))
    shape = {"input_shape": tiny.SHAPE}
    grid = Grid(
        models=(model,),
        methods=(method,),
        bits=("w3a4",),
        data=data,
        calibration=calibration,
        effort="smoke",
        settings=shape,
        device="cpu",
    )
    cells = plan(grid, tmp_path / "out").cells
    fed = [cell for cell in cells if cell.real is not None]
    assert len(fed) == (not isinstance(recipe.synthesizer, NoData | Noise) and not recipe.synthesizer.live)
    for cell in fed:
        result = quantize(model, method, "w3a4", effort="smoke", device="cpu", synthesizer=cell.real, **shape)
        assert len(result.images) == cell.recipe.synthesizer.samples == 8
        assert torch.equal(result.images.labels, cell.real.images.labels)
        assert result.metrics["effort"] == "smoke"
        logits = result.student(result.images.images)
        assert logits.isfinite().all()
