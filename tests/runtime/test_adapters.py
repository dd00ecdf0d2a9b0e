import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import Exported
from onnxruntime.quantization import CalibrationDataReader

from zsq.cli import main
from zsq.core import DataError, MissingExtra, RecipeError
from zsq.runtime.adapters import CalibrationReader, batches, images_of, nncf_dataset


def test_a_result_and_its_folder_hold_the_same_images(exported: Exported):
    kept = images_of(exported.run)
    assert kept.shape == (8, 3, 8, 8)
    assert kept.dtype == np.float32
    assert exported.result.images is not None
    np.testing.assert_array_equal(kept, exported.result.images.images.numpy())
    np.testing.assert_array_equal(kept, images_of(exported.result))


def test_an_npz_of_synthesize_is_normalised_again(tmp_path: Path):
    words = ["synthesize", "zoo:digits-resnet", "--method", "zeroq", "--samples", "5", "--effort", "smoke"]
    assert main([*words, "--out", str(tmp_path / "images.npz")]) == 0
    found = images_of(tmp_path / "images.npz")
    assert found.shape == (5, 1, 8, 8)
    with np.load(tmp_path / "images.npz") as file:
        # 0 and 255 are 0 and 1 before the mean is taken away and the spread divided out
        pixel = float(file["x"][2, 3, 4, 0])
        assert found[2, 0, 3, 4] == pytest.approx((pixel / 255 - 0.3048) / 0.3755, abs=1e-6)


def test_batches_are_the_images_in_order():
    images = np.arange(7, dtype=np.float32).reshape(7, 1, 1, 1)
    assert [batch.ravel().tolist() for batch in batches(images, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    with pytest.raises(RecipeError, match="batch_size must be at least 1, got 0"):
        batches(images, 0)


def test_the_reader_is_one_of_onnxruntime_and_can_be_read_again():
    images = torch.randn(5, 1, 2, 2).numpy()
    reader = CalibrationReader(images, "x", batch_size=2)
    assert isinstance(reader, CalibrationDataReader)
    assert len(reader) == 3
    read = [batch["x"] for batch in reader]
    np.testing.assert_array_equal(np.concatenate(read), images)
    assert reader.get_next() is None
    reader.rewind()
    first = reader.get_next()
    assert first is not None
    np.testing.assert_array_equal(first["x"], images[:2])


def test_a_source_without_images_is_refused(exported: Exported, tmp_path: Path):
    with pytest.raises(DataError, match="holds no images"):
        images_of(tmp_path)
    np.savez(tmp_path / "bare.npz", x=np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(DataError, match="make it with zsq synthesize"):
        images_of(tmp_path / "bare.npz")
    np.savez(tmp_path / "odd.npz", x=np.zeros((2, 8), np.uint8), mean=np.zeros(1), std=np.ones(1))
    with pytest.raises(DataError, match="no images of zsq synthesize"):
        images_of(tmp_path / "odd.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match="cannot be read"):
        images_of(tmp_path / "text.npz")


def test_a_missing_nncf_is_told_with_its_pip_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingExtra, match="pip install nncf"):
        nncf_dataset(np.zeros((2, 1, 2, 2), np.float32))


def test_nncf_reads_every_image():
    pytest.importorskip("nncf", reason="nncf is not installed, and nothing in zsq needs it")
    images = torch.randn(3, 1, 2, 2).numpy()
    dataset = nncf_dataset(images)
    assert dataset.get_length() == 3
    np.testing.assert_array_equal(np.concatenate(list(dataset.get_inference_data())), images)
