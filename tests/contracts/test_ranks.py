"""Two processes give what one gives: pieces to the bit, training to float rounding. One of them writes and prints."""

import contextlib
import json
import multiprocessing
import os
import socket
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from torch import distributed, nn
from torch.testing import assert_close

import zsq.core.run
from zsq.api import quantize
from zsq.core import RecipeError, Run, RunError, ZsqError
from zsq.core.run import save_atomically

FAST = {"quantizer.distill.lr": 1e-4}
"""A hundred times the papers' rate, so that four steps move something."""


@pytest.fixture
def in_two(tmp_path):
    """Runs ``task(rank, *args)`` in two processes of a group of their own; their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zsq.api", "zsq.methods", "torch._dynamo", "safetensors.torch", "PIL.Image"])
    groups = iter(range(9))

    def run(task, *args) -> list[int | None]:
        group = f"file://{tmp_path}/group{next(groups)}"
        processes = [context.Process(target=member, args=(group, rank, task, *args)) for rank in (0, 1)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return [process.exitcode for process in processes]

    return run


def member(group, rank, task, *args):
    warnings.simplefilter("error")
    os.fsync = lambda _: None
    distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=2)
    task(rank, *args)
    distributed.destroy_process_group()


def work(method: str, out: Path, changes: dict, **counts: int):
    settings = tiny.settings(method, **counts)
    settings["overrides"] |= changes
    return quantize(tiny.fitting(method), method, "w3a4", out=out, **settings)


def work_on(rank, method, out, changes, counts):
    student = work(method, out, changes, **counts).student
    torch.save(student.state_dict(), out.with_name(f"{out.name}.{rank}"))


def tracked(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["tracked"]


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["label"] == "distill"]


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- the same results -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["zeroq", "genie", "smi"])
def test_divided_pieces_are_those_of_one_process(method, in_two, tmp_path):
    counts = {"samples": 12, "batch_size": 4}  # three batches, so that one rank has nothing to do at last
    assert in_two(work_on, method, tmp_path / "two", {}, counts) == [0, 0]
    work(method, tmp_path / "one", {}, **counts)
    assert written(tmp_path / "two") == written(tmp_path / "one")
    for name in ("images.safetensors", "student.safetensors", "identity.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize("method", ["hast", "intraq", "synq", "gdfq", "ait"])
def test_training_is_that_of_one_process_with_the_same_batch(method, in_two, tmp_path):
    counts = {"samples": 8, "batch_size": 4, "steps": 4}
    assert in_two(work_on, method, tmp_path / "two", FAST, counts) == [0, 0]
    work(method, tmp_path / "one", FAST, **counts)
    assert written(tmp_path / "two") == written(tmp_path / "one")
    if method in ("hast", "intraq", "synq"):  # a generator that learns beside the student sees its rounding
        images = [(tmp_path / name / "images.safetensors").read_bytes() for name in ("two", "one")]
        assert images[0] == images[1]
    assert_close(tracked(tmp_path / "two"), tracked(tmp_path / "one"), rtol=1e-4, atol=1e-5)
    ranks = [torch.load(tmp_path / f"two.{rank}", weights_only=True) for rank in (0, 1)]
    assert_close(*ranks, rtol=0, atol=0)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


# --- the folder -------------------------------------------------------------------------------------------------


def dying(rank, death, *args):
    """Work in which rank 0 ends without a word when ``death`` files are written, and takes the other with it."""
    paths = []

    def write(path, content):
        save_atomically(path, content)
        paths.append(path)
        if len(paths) == death:
            os._exit(9)

    zsq.core.run.save_atomically = write
    zsq.api.Run = lambda *a, **k: Run(*a, save_every=0, **k)
    with contextlib.suppress(RuntimeError):  # the other end of the line is gone
        work_on(rank, *args)


def test_a_killed_run_resumes_to_the_same_bits(in_two, tmp_path):
    args = ({**FAST, "quantizer.distill.transforms": ()}, {"samples": 8, "batch_size": 4, "steps": 3})
    assert in_two(work_on, "hast", tmp_path / "whole", *args) == [0, 0]
    for death in (4, 6):  # the identity and the recipe, two pieces; then steps
        assert in_two(dying, death, "hast", tmp_path / "killed", *args)[0] == 9
    assert in_two(work_on, "hast", tmp_path / "killed", *args) == [0, 0]
    for name in ("images.safetensors", "student.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert_close(tracked(tmp_path / "killed"), tracked(tmp_path / "whole"), rtol=0, atol=0)


def failing(rank, kind, words, *args):
    with pytest.raises(kind, match=words):
        work_on(rank, *args)


def test_what_rank_0_refuses_ends_all(in_two, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    args = ("zeroq", tmp_path / "run", {}, {})
    assert in_two(failing, RunError, "not a run folder", *args) == [0, 0]
    assert written(tmp_path / "run") == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantizer.distill.batch_size": 3}, "a batch of 3 images has no equal shares for 2 processes"),
        ({"quantizer.distill.student_bn": "train"}, "student_bn='train' takes the statistics of a whole batch"),
    ],
)
def test_batches_that_cannot_be_shared_are_refused_before_work_starts(changes, words, in_two, tmp_path):
    assert in_two(failing, RecipeError, words, "hast", tmp_path / "run", changes, {}) == [0, 0]
    assert written(tmp_path / "run") == []


# --- the parts --------------------------------------------------------------------------------------------------


def parts(rank, folder):
    run = Run(folder, device="cpu", save_every=0)
    assert (run.rank, run.world, run.share(6)) == (rank, 2, slice(3 * rank, 3 * rank + 3))
    made = list(run.pieces({f"{index}": lambda: torch.tensor([rank]) for index in range(3)}))
    assert [value.item() for value in made] == [0, 1, 0]
    assert list(run.pieces({f"{index}": lambda: 7 for index in range(3)})) == made  # kept
    assert run.cached("nested", lambda: run.cached("x", lambda: rank) + 10) == 10
    assert run.together(lambda: rank) == [0, 1]

    def fails():
        if rank == 1:
            raise ZsqError("one is enough")

    with pytest.raises(ZsqError, match="one is enough"):
        run.together(fails)
    with pytest.raises(ZsqError, match="one is enough"):
        list(run.pieces({"a": fails, "b": fails}))
    layer = nn.Linear(2, 1)
    layer.weight.grad = torch.tensor([[1.0, 3.0]]) * (1 + rank)
    run.average(layer, value := torch.tensor(4.0 * rank))
    assert layer.weight.grad.tolist() == [[1.5, 4.5]]
    assert layer.bias.grad is None
    assert value == 2
    run.log("x", rank)
    assert list(run.steps(1, "loop")) == [0]
    run.write(f"of {rank}", b"")


def test_one_process_is_all_ranks_there_are():
    run = Run(device="cpu")
    assert (run.rank, run.world, run.share(5), run.together(lambda: 3)) == (0, 1, slice(0, 5), [3])


def test_the_parts_of_a_run_by_hand(in_two, tmp_path):
    folder = tmp_path / "run"
    assert in_two(parts, folder) == [0, 0]
    pieces = ["pieces/0.pt", "pieces/1.pt", "pieces/2.pt", "pieces/nested.pt", "pieces/nested/x.pt"]
    assert written(folder) == sorted(["checkpoint.pt", "log.jsonl", "of 0", "pieces", "pieces/nested", *pieces])
    assert json.loads((folder / "log.jsonl").read_text())["step"] == 0


# --- the command line -------------------------------------------------------------------------------------------


def typed(rank, port, out):
    from zsq.cli import main

    distributed.destroy_process_group()  # this one is the command's own business
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, TORCHELASTIC_RUN_ID="test")
    words = ["quantize", f"{tiny.__file__}:cnn", "--method", "zeroq", "--bits", "w3a4", "--effort", "smoke"]
    with out.with_name(f"said.{rank}").open("w") as file, contextlib.redirect_stdout(file):
        assert main([*words, "--input-shape", "3,8,8", "--device", "cpu", "--out", str(out)]) == 0
    assert not distributed.is_initialized()
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())


def test_torchrun_starts_one_command_that_prints_once(in_two, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert in_two(typed, port, tmp_path / "run") == [0, 0]
    assert "run folder" in (tmp_path / "said.0").read_text()
    assert (tmp_path / "said.1").read_text() == ""
    assert (tmp_path / "run" / "metrics.json").exists()
