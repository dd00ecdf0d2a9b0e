import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from zsq.core.errors import DataError, MissingExtra
from zsq.evaluate import Images, evaluate, evaluate_pair, read_images, training_digits


def encoded(array: np.ndarray, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def flat(value: int, height: int = 4, width: int = 4) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


class Constant(nn.Module):
    """Returns the same logits (K,) for every image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


class Brightest(nn.Module):
    """Logits (N, K) that are largest at class ``round(mean)``."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.classes = classes

    def forward(self, x):
        if self.training:
            self.bn(x)
        return -(x.mean((1, 2, 3))[:, None] - torch.arange(self.classes)).abs()


def numbered(labels: list[int], values: list[int]) -> Images:
    pixels = torch.stack([torch.full((2, 2, 3), value, dtype=torch.uint8) for value in values])
    return Images(pixels, torch.tensor(labels))


# -- reading ------------------------------------------------------------------------------------------------------


def test_a_zip_numbers_its_class_folders_in_sorted_order(tmp_path):
    files = {"dog/1.png": encoded(flat(10)), "cat/2.png": encoded(flat(20)), "cat/1.PNG": encoded(flat(30))}
    images = read_images(make_zip(tmp_path / "a.zip", files))
    assert images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 1]
    assert images.pixels.shape == (3, 4, 4, 3)
    assert images.pixels.dtype == torch.uint8
    assert images.pixels[:, 0, 0, 0].tolist() == [30, 20, 10]


def test_a_root_folder_and_files_of_the_system_change_nothing(tmp_path):
    plain = {"cat/1.png": encoded(flat(1)), "dog/1.png": encoded(flat(2))}
    rooted = {f"some/root/{name}": content for name, content in plain.items()}
    rooted |= {"some/readme.txt": b"", "__MACOSX/some/root/cat/1.png": b"x", "some/root/cat/._1.png": b"x"}
    one, two = (read_images(make_zip(tmp_path / f"{name}.zip", files)) for name, files in (("a", plain), ("b", rooted)))
    assert one.classes == two.classes
    assert torch.equal(one.pixels, two.pixels)


def test_a_folder_reads_like_a_zip(tmp_path):
    files = {"cat/1.png": encoded(flat(1)), "dog/deep/1.png": encoded(flat(2))}
    for name, content in files.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        (tmp_path / "images" / name).write_bytes(content)
    folder, archive = read_images(tmp_path / "images"), read_images(make_zip(tmp_path / "a.zip", files))
    assert folder.classes == archive.classes == ("cat", "dog")
    assert torch.equal(folder.pixels, archive.pixels)


def test_images_of_the_asked_size_are_unchanged(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    images = read_images(make_zip(tmp_path / "a.zip", {"a/1.png": encoded(array)}), (3, 4, 6))
    assert np.array_equal(images.pixels[0].numpy(), array)


def test_larger_images_are_resized_to_eight_sevenths_and_cropped_at_the_centre(tmp_path):
    # 16 x 32 for 7 x 7: the shorter side becomes 8, the longer 16; of 8 x 16 the crop keeps columns 4..10 of 16
    array = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
    images = read_images(make_zip(tmp_path / "a.zip", {"a/1.png": encoded(array)}), (3, 7, 7))
    resized = np.asarray(Image.fromarray(array).resize((16, 8), Image.Resampling.BILINEAR))
    assert np.array_equal(images.pixels[0].numpy(), resized[0:7, 4:11])


def test_grey_images_become_rgb_and_stay_grey_for_one_channel(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a/1.png": encoded(np.full((4, 4), 9, np.uint8))})
    assert read_images(path).pixels.shape == (1, 4, 4, 3)
    assert read_images(path, (1, 4, 4)).pixels.shape == (1, 4, 4, 1)


def test_an_npz_reads_as_it_is(tmp_path):
    x = np.arange(2 * 3 * 3 * 1, dtype=np.uint8).reshape(2, 3, 3, 1)
    images = read_images(make_npz(tmp_path / "a.npz", x=x, y=np.array([4, 0], np.int32)))
    assert np.array_equal(images.pixels.numpy(), x)
    assert images.labels.tolist() == [4, 0]
    assert images.labels.dtype == torch.int64
    assert images.classes == ()


def test_an_npz_of_another_size_is_resized(tmp_path):
    x = np.full((2, 16, 16, 1), 7, np.uint8)
    images = read_images(make_npz(tmp_path / "a.npz", x=x, y=np.array([0, 1])), (1, 7, 7))
    assert images.pixels.shape == (2, 7, 7, 1)
    assert images.pixels.unique().tolist() == [7]


def test_the_digits_are_split_once_and_for_all():
    pytest.importorskip("sklearn")
    held_out, rest = read_images("digits", (1, 8, 8)), training_digits()
    assert (len(held_out), len(rest)) == (540, 1257)
    assert held_out.pixels.shape == (540, 8, 8, 1)
    assert held_out.pixels.max() == 255
    # 1797 digits have 1797 different images, so no held-out image is among the others
    seen = {x.numpy().tobytes() for x in rest.pixels}
    assert not any(x.numpy().tobytes() in seen for x in held_out.pixels)


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'zsq\[digits\]'"):
        read_images("digits")


# -- what cannot be read ------------------------------------------------------------------------------------------


def noisy_jpeg() -> bytes:
    return encoded(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8), "jpeg")


@pytest.mark.parametrize(
    ("files", "size", "message"),
    [
        ({}, None, "no images in"),
        ({"notes.txt": b"x"}, None, "no images in"),
        ({"1.png": encoded(flat(1))}, None, "1.png in .* is in no class folder"),
        ({"a/1.jpg": noisy_jpeg()[:300]}, None, "a/1.jpg in .* cannot be read"),
        ({"a/1.jpg": b""}, None, "a/1.jpg in .* cannot be read"),
        ({"a/1.png": encoded(flat(1))[:50]}, None, "a/1.png in .* cannot be read"),
        ({"a/1.png": encoded(flat(1)), "a/2.png": encoded(flat(1, 4, 5))}, None, "a/2.png in .* is 4x5, .* 4x4"),
        ({"a/1.png": encoded(flat(1))}, (1, 4, 4), "a/1.png in .* has colour"),
    ],
)
def test_a_bad_zip_says_what_is_wrong(tmp_path, files, size, message):
    with pytest.raises(DataError, match=message):
        read_images(make_zip(tmp_path / "a.zip", files), size)


def test_a_truncated_zip_is_reported(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a/1.png": encoded(flat(1))})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"a\.zip cannot be read .*is it complete"):
        read_images(path)


def test_a_damaged_entry_of_a_zip_is_reported(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a/1.png": encoded(flat(1))})
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a/1\.png in .* cannot be read \(Bad CRC"):
        read_images(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros(3)}, "has images: an .npz of images has x"),
        ({"x": np.zeros((2, 3, 3, 1), np.uint8)}, "has x: an .npz"),
        ({"x": np.zeros((2, 3, 3, 1)), "y": np.zeros(2, int)}, r"x in .* is float64 \(2, 3, 3, 1\)"),
        ({"x": np.zeros((2, 3, 3), np.uint8), "y": np.zeros(2, int)}, r"x in .* is uint8 \(2, 3, 3\)"),
        ({"x": np.zeros((2, 3, 3, 1), np.uint8), "y": np.zeros(2)}, "y in .* is float64"),
        ({"x": np.zeros((2, 3, 3, 1), np.uint8), "y": np.zeros(3, int)}, "must be 2 integers"),
        ({"x": np.zeros((0, 3, 3, 1), np.uint8), "y": np.zeros(0, int)}, "no images in"),
        ({"x": np.zeros((1, 3, 3, 1), np.uint8), "y": np.array([-1])}, "a label in .* is -1"),
        ({"x": np.zeros((1, 3, 3, 1), np.uint8), "y": np.array([{}], object)}, "cannot be read"),
    ],
)
def test_a_bad_npz_says_what_is_wrong(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        read_images(make_npz(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and no more"])
def test_a_truncated_npz_is_reported(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz cannot be read"):
        read_images(tmp_path / "a.npz")


def test_an_npz_of_other_channels_is_reported(tmp_path):
    path = make_npz(tmp_path / "a.npz", x=np.zeros((1, 3, 3, 1), np.uint8), y=np.zeros(1, int))
    with pytest.raises(DataError, match="images of 1 channels, the network takes 3"):
        read_images(path, (3, 3, 3))


def test_what_is_not_there_or_of_another_kind_is_reported(tmp_path):
    with pytest.raises(DataError, match=r"no data at .*nowhere: give a \.zip"):
        read_images(tmp_path / "nowhere")
    (tmp_path / "a.tar").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.tar is not a \.zip"):
        read_images(tmp_path / "a.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in"):
        read_images(tmp_path / "empty")


# -- evaluating ---------------------------------------------------------------------------------------------------


def test_accuracy_by_hand():
    # logits rank the classes 2, 0, 1, 5, 4, 3, so top-1 is class 2 and top-5 misses class 3 only
    network = Constant(5.0, 4.0, 6.0, 1.0, 2.0, 3.0)
    accuracy = evaluate(network, numbered([2, 2, 3, 0], [0, 0, 0, 0]), mean=(0,) * 3, std=(1,) * 3)
    assert (accuracy.top1, accuracy.top5, accuracy.images, accuracy.agreement) == (50.0, 75.0, 4, None)


def test_top5_of_fewer_classes_is_all():
    accuracy = evaluate(Constant(0.0, 1.0), numbered([0, 1], [0, 0]), mean=(0,) * 3, std=(1,) * 3)
    assert (accuracy.top1, accuracy.top5) == (50.0, 100.0)


def test_agreement_by_hand():
    # pixels 0, 255, 255 normalised with std 1/2 are 0, 2, 2: the network says 0, 2, 2, its teacher always 2
    images, teacher = numbered([0, 0, 2], [0, 255, 255]), Constant(0.0, 0.0, 1.0)
    accuracy = evaluate(Brightest(3), images, mean=(0.0,) * 3, std=(0.5,) * 3, teacher=teacher)
    assert_close(torch.tensor([accuracy.top1, accuracy.agreement]), torch.tensor([200 / 3, 200 / 3]))


def test_a_pair_is_measured_as_each_alone():
    images = numbered([2, 2, 3, 0], [0, 1, 2, 3])
    settings = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "batch_size": 3}
    teacher, student = Constant(0.0, 1.0, 2.0, 3.0), Brightest(4)
    exact, low = evaluate_pair(teacher, student, images, **settings)
    assert exact == evaluate(teacher, images, **settings)
    assert low == evaluate(student, images, teacher=teacher, **settings)
    assert exact != low


def test_the_batch_size_does_not_matter_and_progress_counts_images():
    images, seen = numbered([0, 1, 2, 1, 1], [0, 127, 255, 255, 128]), []
    settings = {"mean": (0.0,) * 3, "std": (0.5,) * 3}
    whole = evaluate(Brightest(3), images, **settings)
    parts = evaluate(Brightest(3), images, **settings, batch_size=2, progress=lambda *at: seen.append(at))
    assert whole == parts
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_evaluating_changes_neither_network():
    network, teacher = Brightest(3).train(), Brightest(3).train()
    network.bn.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    evaluate(network, numbered([0, 1], [3, 4]), mean=(0,) * 3, std=(1,) * 3, teacher=teacher)
    assert network.training
    assert teacher.training
    assert not network.bn.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("network", "images", "mean", "message"),
    [
        (Constant(0.0, 1.0), numbered([0, 2], [0, 0]), (0,) * 3, "a label is 2, the network has 2 classes"),
        (Constant(0.0, 1.0), numbered([0], [0]), (0,), "images of 3 channels, with mean"),
        (nn.Identity(), numbered([0], [0]), (0,) * 3, r"returns \(1, 3, 2, 2\), accuracy needs logits"),
        (
            Constant(0.0, 1.0),
            Images(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), torch.tensor([0]), ("a", "b", "c")),
            (0,) * 3,
            r"3 classes \(a, b, c, ...\), the network has 2",
        ),
    ],
)
def test_images_that_do_not_match_the_network_are_reported(network, images, mean, message):
    with pytest.raises(DataError, match=message):
        evaluate(network, images, mean=mean, std=(1,) * len(mean))
