"""A grid of cells: what is checked first, done once, shared, resumed and left to be seen."""

import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import zsq.compare.work
from zsq.api import quantize
from zsq.compare import Comparison, Grid, compare, plan
from zsq.core import DataError, RecipeError, RunError, UnsupportedModel, ZsqError
from zsq.engines import InProcess, Lost, OnRay, Processes
from zsq.rows import FILE, read_rows
from zsq.synthesis import OptimizeImages
from zsq.table import Table, tables

HERE = InProcess()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``test.npz`` to measure on and ``train.npz`` for the control."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, count in (("test", 40), ("train", 60)):
        x = rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
        np.savez(folder / f"{name}.npz", x=x, y=np.arange(count) % 5)
    return folder


def grid_of(images: Path, **changes: Any) -> Grid:
    settings: dict[str, Any] = {
        "models": ("tiny:cnn",),
        "methods": ("zeroq", "squant", "gdfq"),
        "bits": ("w4a4", "w3a3"),
        "data": str(images / "test.npz"),
        "calibration": str(images / "train.npz"),
        "effort": "smoke",
        "settings": {"input_shape": tiny.SHAPE},
        "device": "cpu",
    }
    return Grid(**{**settings, **changes})


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A finished comparison: look, do not touch."""
    return compare(grid_of(images), tmp_path_factory.mktemp("whole"), engine=HERE)


def measured(found: Comparison) -> list[Table]:
    """The tables without what differs from one call to the next."""
    made = tables(found.rows.values())
    return [replace(t, lines=tuple(replace(line, seconds=None, memory=None) for line in t.lines)) for t in made]


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("this cell is finished")


# --- what a comparison has --------------------------------------------------------------------------------------


def test_every_table_has_its_controls(whole):
    ids = [row["cell"] for row in read_rows(whole.folder)]
    assert ids == [cell.id for cell in whole.cells]
    own = [f"cnn/{name}/{bits}/{place}/seed0" for name, place in OWN for bits in ("w4a4", "w3a3")]
    assert sorted(ids) == sorted(["cnn/float", *own])


OWN = (
    ("nearest", "minmax-ptq"),
    ("nearest", "minmax-ptq-inputs"),
    ("nearest", "qat-lowbit-all"),
    ("zeroq", "minmax-ptq"),
    ("zeroq@real", "minmax-ptq"),
    ("squant", "minmax-ptq-inputs"),
    ("gdfq", "qat-lowbit-all"),
)
"""Each method under its own protocol, and nearest under all of them."""


def test_a_row_says_all_that_a_result_needs(whole):
    row = whole.rows["cnn/zeroq/w4a4/minmax-ptq/seed0"]
    assert {key: row[key] for key in ("status", "model", "method", "bits", "protocol", "effort", "seed", "source")} == {
        "status": "done",
        "model": "tiny:cnn",
        "method": "zeroq",
        "bits": "W4A4",
        "protocol": "minmax-ptq",
        "effort": "smoke",
        "seed": 0,
        "source": "own",
    }
    assert row["accuracy"].keys() == {"float", "quantized", "drop"}
    assert row["machine"].keys() == {"processor", "cores", "threads"}
    assert row["peak_memory_mb"] is None  # all cells share this process
    assert row["data"] == "test.npz"
    assert row["command"] == (
        "zsq compare tiny:cnn --methods zeroq,squant,gdfq --bits w4a4,w3a3 --seeds 0 --data test.npz "
        "--calibration train.npz --effort smoke"
    )
    assert {"seconds", "bytes", "float_tensors", "versions", "teacher", "recipe"} <= row.keys()
    assert str(whole.folder.parent) not in json.dumps(list(whole.rows.values()))  # no folder of this machine
    exact = whole.rows["cnn/float"]
    assert (exact["method"], exact["bits"], exact["accuracy"].keys()) == ("float", "w32a32", {"float"})
    assert exact["accuracy"]["float"] == row["accuracy"]["float"]


def test_real_images_are_drawn_once_a_seed_and_as_many_as_the_method_makes(images):
    drawn = {cell.seed: cell.real for cell in plan(grid_of(images, seeds=(0, 1)), "nowhere").cells if cell.real}
    assert drawn[0] == drawn[1]  # the same recipe ...
    assert drawn[0].samples == len(drawn[0].images) == 8
    pixels, labels = (drawn[0].images.pixels, drawn[0].images.labels)
    assert not pixels.equal(drawn[1].images.pixels)  # ... and other images
    given = np.load(images / "train.npz")
    for pixel, label in zip(pixels.numpy(), labels.tolist(), strict=True):
        place = next(index for index, each in enumerate(given["x"]) if (each == pixel).all())
        assert given["y"][place] == label


def test_the_control_is_the_quantizer_on_real_images_and_nothing_else(whole):
    cell = next(cell for cell in whole.cells if cell.id == "cnn/zeroq@real/w4a4/minmax-ptq/seed0")
    assert "RealImages" in (whole.folder / "runs" / cell.id / "recipe").read_text()
    assert (
        cell.recipe.quantizer == next(c for c in whole.cells if c.id == cell.id.replace("@real", "")).recipe.quantizer
    )
    made = quantize("tiny:cnn", cell.recipe, "w4a4", input_shape=tiny.SHAPE, device="cpu").images
    assert made.labels.tolist() == cell.real.images.labels.tolist()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cell.real.mean, cell.real.std))
    pixels = ((made.images * std + mean) * 255).round().to(torch.uint8)
    assert pixels.equal(cell.real.images.pixels.permute(0, 3, 1, 2))


def test_why_a_control_is_left_out_stands_in_the_row(whole, images):
    reasons = {row["method"]: row.get("no_real") for row in whole.rows.values() if row["source"] == "own"}
    assert reasons == {
        "float": None,
        "nearest": None,
        "zeroq": None,
        "squant": "makes no images",
        "gdfq": "has a generator that learns beside the student",
    }
    without = plan(grid_of(images, calibration=None), "nowhere")
    assert {cell.no_real for cell in without.cells if cell.method == "zeroq"} == {"no --calibration was given"}


# --- sharing ----------------------------------------------------------------------------------------------------


def test_equal_images_are_made_once_and_the_students_stay_the_same(images, tmp_path, monkeypatch):
    made = []
    optimize = OptimizeImages._optimize

    def counted(self, size, job):
        made.append(("estimate" if job.run.folder is None else "images", job.run.seed))
        return optimize(self, size, job)

    monkeypatch.setattr(OptimizeImages, "_optimize", counted)
    grid = grid_of(images, methods=("zeroq", "synq+zeroq"), seeds=(0, 1), calibration=None)
    found = compare(grid, tmp_path / "shared", engine=HERE)
    assert len(found.cells) == 1 + 4 * 2 * 2
    assert sorted(made) == [
        (kind, seed) for kind in ("estimate", "images") for seed in (0, 0, 1, 1)
    ]  # two batches each
    for cell in found.cells[-3:]:
        alone = tmp_path / "alone" / cell.id
        protocol = None if cell.method != "nearest" else cell.protocol
        settings = {"protocol": protocol, "effort": "smoke", "input_shape": tiny.SHAPE, "device": "cpu"}
        quantize("tiny:cnn", cell.method, cell.bits, seed=cell.seed, out=alone, **settings)
        for name in ("student.safetensors", "images.safetensors"):
            assert (alone / name).read_bytes() == (tmp_path / "shared" / "runs" / cell.id / name).read_bytes()
    assert len(made) > 8


def test_a_generator_that_learns_beside_the_student_is_never_shared(whole):
    live = [cell for cell in whole.cells if cell.method == "gdfq"]
    assert [cell.images for cell in live] == ["", ""]
    kept = [path.parent.name for path in (whole.folder / "images").rglob("lock")]
    assert set(kept) <= {cell.images for cell in whole.cells if cell.recipe and not cell.recipe.synthesizer.live} | {
        each.name for each in (whole.folder / "images").iterdir() if not (each / "images").exists()
    }


def test_what_another_cell_made_counts_as_spent(whole):
    pieces = list((whole.folder / "images").glob("*/images/*.pt"))
    assert len(pieces) == 2
    made = sum(torch.load(piece, weights_only=True)["seconds"] for piece in pieces)
    for bits in ("w4a4", "w3a3"):
        assert whole.rows[f"cnn/zeroq/{bits}/minmax-ptq/seed0"]["seconds"]["synthesize"] >= round(made, 2) > 0


# --- again ------------------------------------------------------------------------------------------------------


def test_progress_says_which_cell_and_how_many_are_done(images, tmp_path):
    seen = []

    class Reporter:
        def progress(self, label, done, count):
            seen.append((label, done, count))

    compare(grid_of(images, methods=("zeroq",), bits=("w4a4",)), tmp_path, engine=HERE, reporter=Reporter())
    cell = "cnn/zeroq/w4a4/minmax-ptq/seed0"
    assert seen[0] == ("1 of 4 cells, cnn/float done", 1, 1)
    assert (f"2 of 4 cells, {cell} synthesize", 3, 3) in seen
    assert seen[-1] == ("4 of 4 cells, cnn/zeroq@real/w4a4/minmax-ptq/seed0 done", 1, 1)


def test_finished_cells_are_never_repeated_and_their_rows_alone_are_enough(whole, images, tmp_path, monkeypatch):
    (tmp_path / FILE).write_bytes((whole.folder / FILE).read_bytes())
    monkeypatch.setattr(zsq.compare.work, "quantize", refuse)
    again = compare(grid_of(images), tmp_path, engine=HERE)
    assert again.due == []
    assert (tmp_path / FILE).read_bytes() == (whole.folder / FILE).read_bytes()
    assert measured(again) == measured(whole)


def test_a_grid_can_grow(whole, images, tmp_path):
    (tmp_path / FILE).write_bytes((whole.folder / FILE).read_bytes())
    grown = compare(grid_of(images, methods=("dfq",), bits=("w8a8",)), tmp_path, engine=HERE)
    assert len(read_rows(tmp_path)) == len(whole.rows) + 2
    assert [row["cell"] for row in read_rows(tmp_path)][-3:] == [cell.id for cell in grown.cells]


def test_a_torn_last_line_is_done_again(whole, images, tmp_path):
    lines = (whole.folder / FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / FILE).write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    assert [cell.id for cell in plan(grid_of(images), tmp_path).due] == [whole.cells[-1].id]
    again = compare(grid_of(images), tmp_path, engine=HERE)
    assert (tmp_path / FILE).read_bytes().splitlines(keepends=True)[:-1] == lines[:-1]
    assert measured(again) == measured(whole)


def test_results_of_something_else_are_refused(whole, images, tmp_path):
    (tmp_path / FILE).write_bytes((whole.folder / FILE).read_bytes())
    changed = {
        "another recipe": {"effort": "paper"},
        "other weights": {"models": ("tiny:dead",)},
        "other images measured on": {"data": str(images / "train.npz")},
    }
    text = (tmp_path / FILE).read_text().replace('"cell": "cnn/', '"cell": "dead/')
    (tmp_path / FILE).write_text((tmp_path / FILE).read_text() + text)
    for words, change in changed.items():
        with pytest.raises(RunError, match=f"has .* with {words}: choose another folder"):
            plan(grid_of(images, calibration=None, **change), tmp_path)


def test_unfinished_work_of_another_recipe_is_refused(whole, images, tmp_path):
    cell = "cnn/zeroq/w4a4/minmax-ptq/seed0"
    folder = tmp_path / "runs" / cell
    folder.mkdir(parents=True)
    (folder / "identity.json").write_text(json.dumps({"recipe": "x = 1", "teacher": whole.rows[cell]["teacher"]}))
    with pytest.raises(RunError, match=f"{cell} was begun with another recipe or other weights: remove it"):
        plan(grid_of(images), tmp_path)


def test_two_at_once_in_one_folder_are_refused(images, tmp_path):
    with (
        zsq.compare.work.locked(tmp_path / "lock"),
        pytest.raises(RunError, match="another process works in"),
    ):
        compare(grid_of(images), tmp_path, engine=HERE)


# --- killed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "engine", [Processes(workers=2, threads=1), OnRay(workers=2, threads=1)], ids=["processes", "ray"]
)
def test_killed_without_warning_it_goes_on_where_it_was(whole, images, tmp_path, engine):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zsq.compare", "torch._dynamo"])
    process = context.Process(target=compare, args=(grid_of(images), tmp_path), kwargs={"engine": engine})
    process.start()
    file = tmp_path / FILE
    while process.is_alive() and (not file.exists() or len(file.read_bytes().splitlines()) < 4):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -9
    kept = file.read_bytes().splitlines()
    assert 4 <= len(kept) < len(whole.cells)
    found = compare(grid_of(images), tmp_path, engine=HERE)
    assert set(kept) <= set(file.read_bytes().splitlines())  # what was finished stays to the byte, its seconds too
    assert measured(found) == measured(whole)


# --- what fails -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ZsqError("the loss\nis not finite"), "the loss is not finite"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
    ids=["ours", "surprise"],
)
def test_a_cell_that_fails_is_a_row_and_is_tried_again(whole, images, tmp_path, monkeypatch, error, reason):
    grid, cell = grid_of(images, methods=("zeroq",), bits=("w4a4",)), "cnn/zeroq/w4a4/minmax-ptq/seed0"

    def failing(*arguments, **settings):
        if arguments[1] == "zeroq" and settings["synthesizer"] is None:
            raise error
        return quantize(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(zsq.compare.work, "quantize", failing)
        found = compare(grid, tmp_path, engine=HERE)
    assert [(row["cell"], row["reason"]) for row in found.failed] == [(cell, reason)]
    assert len(found.rows) == 4  # the others are done
    assert (tmp_path / "runs" / f"{cell}.traceback").exists() == isinstance(error, ZeroDivisionError)
    assert f"Failed: `zeroq` W4A4, seed 0: {reason}." in tables(found.rows.values())[0].missing
    again = compare(grid, tmp_path, engine=HERE)
    assert again.failed == again.due == []
    assert again.rows[cell]["accuracy"] == whole.rows[cell]["accuracy"]
    assert len(read_rows(tmp_path)) == 4


def test_a_cell_that_takes_its_process_along_is_a_row(images, tmp_path):
    class Breaking:
        apart = True

        def results(self, tasks, reporter):
            yield from ((index, Lost("its process ended")) for index in range(len(tasks)))

    found = compare(grid_of(images, methods=("squant",)), tmp_path, engine=Breaking())
    assert {row["reason"] for row in found.failed} == {"its process ended"}
    assert len(found.failed) == len(found.cells)


# --- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"methods": ()}, RecipeError, "needs methods"),
        ({"methods": ("zeroq", "zerq")}, RecipeError, "no method 'zerq'"),
        ({"methods": ("squant:b9",)}, RecipeError, "squant has no preset 'b9'"),
        ({"methods": ("synq+squant",)}, RecipeError, "squant makes none"),
        ({"methods": ("zeroq", "psaq-vit")}, UnsupportedModel, "cnn: psaq-vit reads attention maps"),
        ({"methods": ("genie", "genie:qdrop-ends")}, RecipeError, "genie:qdrop-ends changes ptq-8bit-ends"),
        ({"protocols": ("minmax",)}, RecipeError, "no protocol 'minmax'"),
        ({"bits": ("w4a4", "w9a4")}, RecipeError, "2 to 8 bits"),
        ({"bits": ("4",)}, RecipeError, "bits are written like w4a4"),
        ({"effort": "slow"}, RecipeError, "effort is smoke, fast or paper"),
        ({"data": "nowhere.npz"}, DataError, "no data at nowhere.npz"),
        ({"calibration": "nowhere.npz"}, DataError, "no data at nowhere.npz"),
        ({"models": ("tiny:cnn", "tiny:nothing")}, UnsupportedModel, "no 'nothing'"),
        ({"models": ("tiny:cnn", "again:cnn")}, ZsqError, "again"),
        ({"models": ("tiny:cnn", "tiny:dead"), "settings": {"checkpoint": "a.pt"}}, RecipeError, "cannot fit 2 models"),
        ({"settings": {}}, RecipeError, "the input shape of"),
        ({"device": "cuda:99"}, RunError, "no device"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_anything_runs(images, tmp_path, monkeypatch, change, error, says):
    monkeypatch.setattr(zsq.compare.work, "quantize", refuse)
    with pytest.raises(error, match=says):
        compare(grid_of(images, **change), tmp_path / "out", engine=HERE)
    assert not (tmp_path / "out" / FILE).exists()


def test_calibration_on_what_is_measured_or_on_too_few_is_refused(images, tmp_path):
    with pytest.raises(RecipeError, match="is what is measured on"):
        plan(grid_of(images, calibration=str(images / "test.npz")), tmp_path)
    np.savez(tmp_path / "few.npz", x=np.zeros((7, 8, 8, 3), np.uint8), y=np.zeros(7, np.int64))
    with pytest.raises(RecipeError, match="has 7 images, and zeroq makes 8"):
        plan(grid_of(images, calibration=str(tmp_path / "few.npz")), tmp_path)
