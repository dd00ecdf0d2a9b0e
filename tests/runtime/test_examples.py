"""The example of deployment, run as it stands."""

import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exported import Exported
from PIL import Image

from zsq.api import load

CLASSIFY = Path(__file__).parents[2] / "examples" / "deploy" / "classify.py"


def classify(file: Path, image: Path) -> list[str]:
    done = subprocess.run([sys.executable, CLASSIFY, file, image], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_deployment_is_short_and_needs_onnxruntime_and_numpy_alone():
    text = CLASSIFY.read_text()
    assert len(text.splitlines()) < 40
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    assert imported - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


def test_deployment_says_the_labels_of_the_file(exported: Exported, tmp_path: Path):
    def change(model: onnx.ModelProto) -> None:
        model.metadata_props.add(key="zsq.labels", value='["ant", "bee", "cat", "dog", "emu"]')

    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "image.png")
    numbers = [line.split()[-1] for line in classify(exported.file, tmp_path / "image.png")]
    labels = [line.split()[-1] for line in classify(exported.changed(change, tmp_path), tmp_path / "image.png")]
    assert labels == [["ant", "bee", "cat", "dog", "emu"][int(number)] for number in numbers]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_deployment_classifies_as_the_simulation_does(mode: str, exported: Exported, tmp_path: Path):
    student, network = load(exported.run)
    rng = np.random.default_rng(0)
    for _ in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
        image = coarse.resize((8, 8), Image.Resampling.BICUBIC)  # smooth, so that a PNG filters its rows
        image.convert(mode).save(tmp_path / "image.png")
        x = torch.tensor(np.asarray(image)).permute(2, 0, 1).float() / 255
        x = (x - torch.tensor(network.mean).view(-1, 1, 1)) / torch.tensor(network.std).view(-1, 1, 1)
        shares = student(x[None])[0].softmax(0)
        best = classify(exported.file, tmp_path / "image.png")[0].split()
        assert float(best[0]) / 100 == pytest.approx(float(shares[int(best[-1])]), abs=0.1)


def png(pixels: np.ndarray) -> bytes:
    """A PNG (H, W, 3) whose row y uses the filter y % 5: none, left, above, their mean, Paeth's."""
    height, width, _ = pixels.shape
    rows = b""
    for y in range(height):
        row = [y % 5]
        for x in range(width):
            for c in range(3):
                left, above, both = (
                    int(pixels[y - up, x - back, c]) if y >= up and x >= back else 0
                    for up, back in ((0, 1), (1, 0), (1, 1))
                )
                paeth = min(
                    (left, above, both), key=lambda each: abs(left + above - both - each)
                )  # the first of equals
                row.append((int(pixels[y, x, c]) - (0, left, above, (left + above) // 2, paeth)[y % 5]) % 256)
        rows += bytes(row)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_deployment_reads_every_filter_of_a_png(tmp_path: Path):
    pixels = np.random.default_rng(1).integers(0, 256, (10, 7, 3), np.uint8)
    (tmp_path / "image.png").write_bytes(png(pixels))
    with Image.open(tmp_path / "image.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)  # it is a right PNG
    functions: dict[str, Any] = {}
    exec(CLASSIFY.read_text().partition("\nsession = ")[0], functions)
    np.testing.assert_array_equal(functions["read_png"](str(tmp_path / "image.png")), pixels)
