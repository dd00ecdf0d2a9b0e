"""Named randomness, and work that survives an interruption at any moment."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

import zsq.core.run
from zsq.core import Run, RunError
from zsq.core.run import locked, save_atomically

IDENTITY = {"method": "zeroq", "bits": "W4A4", "seed": "0", "recipe": "a\nb"}


def draw(run: Run, name: str, count: int = 4) -> list[float]:
    return torch.rand(count, generator=run.generator(name)).tolist()


def here(folder: Path | None = None, **settings) -> Run:
    return Run(folder, device="cpu", **settings)


# --- randomness -------------------------------------------------------------------------------------------------


def test_streams_depend_on_seed_and_name_alone():
    run = here(seed=3)
    first = draw(run, "noise")
    assert draw(here(seed=3), "noise") == first
    assert draw(here(seed=4), "noise") != first
    assert draw(run, "labels") != first
    other = here(seed=3)
    draw(other, "labels", 1000)
    assert draw(other, "noise") == first  # what others draw makes no difference


def test_a_stream_goes_on_and_a_fresh_one_starts_anew():
    run = here()
    stream = run.generator("noise")
    a, b = torch.rand(4, generator=stream), torch.rand(4, generator=stream)
    assert not torch.equal(a, b)
    assert torch.equal(torch.rand(4, generator=run.fresh("noise")), a)
    assert torch.equal(torch.rand(4, generator=run.fresh("noise")), a)


def test_seeded_lends_torchs_own_randomness_and_puts_it_back():
    run = here()
    before = torch.get_rng_state()
    with run.seeded("layers"):
        a = nn.Linear(3, 3).weight
    with run.seeded("layers"):
        b = nn.Linear(3, 3).weight
    with run.seeded("other"):
        c = nn.Linear(3, 3).weight
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_streams_inside_a_piece_belong_to_it():
    run = here()
    a = run.cached("a", lambda: draw(run, "noise"))
    b = run.cached("b", lambda: draw(run, "noise"))
    assert len({tuple(a), tuple(b), tuple(draw(run, "noise"))}) == 3
    again = here()
    assert again.cached("b", lambda: draw(again, "noise")) == b  # whatever was done before it


# --- pieces -----------------------------------------------------------------------------------------------------


def test_a_piece_is_done_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"images": torch.ones(2), "labels": torch.tensor([3]), "n": 4, "names": ["x"]}

    first = here(tmp_path).cached("images/0", make)
    kept = here(tmp_path).cached("images/0", make)
    assert len(made) == 1
    assert torch.equal(first["images"], kept["images"])
    assert torch.equal(first["labels"], kept["labels"])
    assert (kept["n"], kept["names"]) == (4, ["x"])


def test_without_a_folder_nothing_is_kept():
    made = []
    run = here()
    for _ in range(2):
        run.cached("x", lambda: made.append(1))
    assert len(made) == 2


def test_pieces_inside_pieces_have_their_own_place(tmp_path):
    run = here(tmp_path)
    assert run.cached("outer", lambda: run.cached("x", lambda: 1) + 10) == 11
    assert run.cached("x", lambda: 2) == 2


def test_a_piece_that_fails_leaves_its_scope(tmp_path):
    run = here(tmp_path)
    with pytest.raises(ZeroDivisionError):
        run.cached("a", lambda: 1 / 0)
    assert draw(run, "noise") == draw(here(), "noise")
    assert run.cached("a", lambda: 5) == 5


# --- loops ------------------------------------------------------------------------------------------------------


def train(folder: Path | None, steps: int = 6) -> tuple[Run, list[torch.Tensor]]:
    """Two loops with momentum, a schedule, dropout noise and two streams: everything that can be forgotten."""
    run = here(folder, save_every=0.0)
    with run.seeded("layer"):
        layer = run.track("layer", nn.Linear(4, 4))
    optimizer = run.track("optimizer", torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9))
    schedule = run.track("schedule", torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5))
    noise, more = run.generator("noise"), run.generator("more")
    for label in ("first", "second"):
        for step in run.steps(steps, label):
            x = torch.randn(8, 4, generator=noise) + step * torch.rand(1, generator=more)
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
            schedule.step()
    return run, [p.detach().clone() for p in layer.parameters()]


class Killed(Exception):
    pass


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_loop_killed_at_any_write_ends_with_the_same_bits(tmp_path, monkeypatch, before):
    _, wanted = train(None)
    for death in range(1, 13):
        writes = []

        def write(path, content, writes=writes, death=death):
            writes.append(path)
            if len(writes) == death and before:
                raise Killed
            save_atomically(path, content)
            if len(writes) == death:
                raise Killed

        folder = tmp_path / str(death)
        with monkeypatch.context() as patch:
            patch.setattr(zsq.core.run, "save_atomically", write)
            with pytest.raises(Killed):
                train(folder)
        _, found = train(folder)
        assert all(map(torch.equal, found, wanted)), death


def test_a_finished_loop_is_not_repeated(tmp_path):
    run = here(tmp_path)
    assert list(run.steps(3, "loop")) == [0, 1, 2]
    assert list(here(tmp_path).steps(3, "loop")) == []
    assert list(here(tmp_path).steps(5, "loop")) == [3, 4]
    assert list(here(tmp_path).steps(2, "other")) == [0, 1]


def test_what_is_not_tracked_again_yet_stays_in_the_checkpoint(tmp_path):
    _, wanted = train(tmp_path)
    run = here(tmp_path)
    list(run.steps(1, "another"))  # saves, though nothing of the old was tracked
    _, found = train(tmp_path)
    assert all(map(torch.equal, found, wanted))


def test_two_things_of_one_name_are_refused():
    run = here()
    run.generator("noise")
    with pytest.raises(RunError, match="random/noise"):
        run.generator("noise")


def test_progress_is_reported():
    seen = []

    class Reporter:
        def progress(self, label, done, count):
            seen.append((label, done, count))

    run = here(reporter=Reporter())
    list(run.steps(2, "distill"))
    list(run.progress(1, "synthesize"))
    assert seen == [("distill", 1, 2), ("distill", 2, 2), ("synthesize", 1, 1)]


# --- the folder -------------------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_identity(tmp_path):
    here(tmp_path / "run").claim(IDENTITY)
    here(tmp_path / "run").claim(IDENTITY)
    with pytest.raises(RunError, match=r"holds another run \(bits W4A4, not W2A2\): choose another folder or remove"):
        here(tmp_path / "run").claim({**IDENTITY, "bits": "W2A2"})
    with pytest.raises(RunError, match=r"\(seed 0, not 1, another recipe\)"):
        here(tmp_path / "run").claim({**IDENTITY, "seed": "1", "recipe": "c\nd"})
    with pytest.raises(RunError, match=r"\(teacher nothing, not abc\)"):
        here(tmp_path / "run").claim({**IDENTITY, "teacher": "abc"})


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"is not a run folder and not empty \(it holds thesis.tex\)"):
        here(tmp_path).claim(IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_with_a_damaged_identity_is_refused(tmp_path):
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        here(tmp_path).claim(IDENTITY)


def test_a_process_killed_in_its_first_write_does_not_block_the_folder(tmp_path):
    (tmp_path / ".identity.json.4711.partial").write_bytes(b"{")
    here(tmp_path).claim(IDENTITY)
    here(tmp_path).claim(IDENTITY)


def test_a_file_in_the_way_is_an_error_in_words(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"cannot create .*: choose another folder"):
        here(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(RunError, match="cannot write into"):
        here(tmp_path)


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    save_atomically(path, b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(RunError, match=r"No space left .* it resumes"):
                save_atomically(path, b"new")
        assert path.read_bytes() == b"old"
        assert [each.name for each in path.parent.iterdir()] == ["file"]
    save_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_full_disk_is_an_error_in_words_and_the_run_resumes(tmp_path, monkeypatch):
    _, wanted = train(None)
    kept, opened = [], Path.open

    def full(path, mode="r", *rest, **more):
        if "w" in mode and len(kept) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        kept.append(path)
        return opened(path, mode, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(RunError, match=r"cannot write .*checkpoint\.pt .*make room"):
            train(tmp_path)
    _, found = train(tmp_path)
    assert all(map(torch.equal, found, wanted))


def test_a_full_disk_says_so_in_the_log_too(tmp_path, monkeypatch):
    run = here(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(RunError, match=r"cannot write .*log\.jsonl"):
            run.log("distill", 0, loss=1.0)


def test_the_log_is_one_json_object_a_line(tmp_path):
    run = here(tmp_path)
    run.log("synthesize", 0, loss=2.0)
    run.log("synthesize", 100, loss=1.0)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["label"], line["step"], line["loss"]) for line in lines] == [
        ("synthesize", 0, 2.0),
        ("synthesize", 100, 1.0),
    ]
    here().log("nowhere", 0)


def test_seconds_add_up_by_stage():
    run = here()
    for _ in range(2):
        with run.timed("a"):
            pass
    with pytest.raises(ZeroDivisionError), run.timed("b"):
        _ = 1 / 0
    assert run.seconds.keys() == {"a", "b"}


def test_what_was_done_before_counts_as_spent(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def work(run: Run, steps: int) -> float:
        """One second a step, five for the piece, two in between."""

        def make() -> int:
            now[0] += 5
            return 1

        with run.timed("work"):
            run.cached("piece", make)
            now[0] += 2
            for _ in run.steps(steps, "loop"):
                now[0] += 1
        return run.seconds["work"]

    assert work(here(tmp_path), 3) == 10
    assert work(here(tmp_path), 3) == 10  # nothing is done again
    assert work(here(tmp_path), 7) == 14  # four steps more


# --- shared pieces ----------------------------------------------------------------------------------------------


def test_runs_that_share_a_folder_make_a_piece_once(tmp_path):
    made = []
    for name in ("a", "b"):
        run = here(tmp_path / name)
        with run.sharing(tmp_path / "shared"):
            assert run.cached("images/0", lambda: made.append(1) or 7) == 7
        run.cached("mine", lambda: 1)
        assert [path.name for path in (tmp_path / name / "pieces").iterdir()] == ["mine.pt"]
    assert made == [1]
    with here().sharing(None):
        pass


def test_one_run_at_a_time_works_in_a_shared_folder(tmp_path):
    with (
        here().sharing(tmp_path),
        pytest.raises(RunError, match="another process works in"),
        locked(tmp_path / "lock", wait=False),
    ):
        pass
    with locked(tmp_path / "lock", wait=False):
        pass


@pytest.mark.parametrize("name", ["cuda:99", "tpu-of-mine"])
def test_a_device_that_is_not_there_lists_what_is(name):
    with pytest.raises(RunError, match=f"no device '{name}' here: there is cpu"):
        Run(device=name)


# --- precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_layers_compute_in_the_precision_of_the_run(precision, dtype):
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    with here(precision=precision).autocast():
        assert layer(x).dtype == dtype
    assert layer(x).dtype == layer.weight.dtype == torch.float32


def test_full_precision_is_the_default():
    assert here().precision == "float32"


def test_a_precision_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(RunError, match="precision is float32 or bfloat16, got 'float16'"):
        here(tmp_path / "run", precision="float16")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and no more"])
def test_a_damaged_piece_is_told_in_a_sentence(tmp_path, content):
    Run(tmp_path, device="cpu").cached("images/0", lambda: torch.ones(2))
    piece = tmp_path / "pieces" / "images" / "0.pt"
    piece.write_bytes(content)
    with pytest.raises(RunError, match=r"0\.pt is no finished piece of a run: remove it, and it is made again"):
        Run(tmp_path, device="cpu").cached("images/0", lambda: torch.ones(2))
    piece.unlink()
    assert torch.equal(Run(tmp_path, device="cpu").cached("images/0", lambda: torch.ones(2)), torch.ones(2))


def test_a_piece_that_was_kept_another_way_is_no_piece(tmp_path):
    piece = tmp_path / "pieces" / "images" / "0.pt"
    piece.parent.mkdir(parents=True)
    torch.save({"images": torch.ones(2)}, piece)
    with pytest.raises(RunError, match="is no finished piece"):
        Run(tmp_path, device="cpu").cached("images/0", lambda: torch.ones(2))
