"""Tasks in processes of their own, which may die."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from zsq.core import MissingExtra, RecipeError, RunError
from zsq.engines import ATTEMPTS, InProcess, Lost, OnRay, Processes, Queue


@dataclass(frozen=True)
class Square:
    """Writes down that it was tried, kills its process as often as asked, and counts to ten."""

    number: int
    notes: Path
    deaths: int = 0
    kin: str = ""

    def run(self, reporter):
        note = self.notes / str(self.number)
        tries = len(note.read_text()) if note.exists() else 0
        note.write_text("x" * (tries + 1))
        if tries < self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        if reporter is not None:
            reporter.progress("square", 10, 10)
        return self.number**2, torch.get_num_threads(), os.getpid()


class Seen(list):
    def progress(self, label, done, count):
        self.append((label, done, count))


def test_in_this_process_one_after_another(tmp_path):
    seen = Seen()
    results = list(InProcess().results([Square(n, tmp_path) for n in range(3)], seen))
    assert [(index, value[0], value[2]) for index, value in results] == [(n, n * n, os.getpid()) for n in range(3)]
    assert seen == [("square", 10, 10)] * 3


def test_each_in_a_process_of_its_own_and_what_dies_is_tried_again(tmp_path):
    deaths = {1: 1, 2: ATTEMPTS}
    tasks = [Square(n, tmp_path, deaths.get(n, 0)) for n in range(4)]
    seen = Seen()
    results = dict(Processes(workers=2, threads=1).results(tasks, seen))
    assert {n: result[:2] for n, result in results.items() if n != 2} == {0: (0, 1), 1: (1, 1), 3: (9, 1)}
    assert len({os.getpid(), *(result[2] for n, result in results.items() if n != 2)}) == 4
    assert results[2] == Lost("its process ended 3 times without a result (exit code -9)")
    assert {n: len((tmp_path / str(n)).read_text()) for n in range(4)} == {0: 1, 1: 2, 2: 3, 3: 1}
    assert set(seen) == {("square", 10, 10)}


def test_on_ray_too(tmp_path, monkeypatch):
    monkeypatch.setattr("zsq.engines.ATTEMPTS", 2)
    results = dict(OnRay(workers=2, threads=1).results([Square(2, tmp_path, 1), Square(3, tmp_path, 2)], None))
    assert results[0][:2] == (4, 1)
    assert results[1] == Lost("its process ended 2 times without a result (WorkerCrashedError)")
    assert {n: len((tmp_path / str(n)).read_text()) for n in (2, 3)} == {2: 2, 3: 2}


def test_without_ray_its_engine_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'zsq\[ray\]'"):
        OnRay()


def test_kin_wait_for_each_other_if_there_is_other_work(tmp_path):
    queue = Queue([Square(n, tmp_path, kin=kin) for n, kin in enumerate(["a", "a", "b", "", ""])])
    assert [queue.next(3) for _ in range(4)] == [0, 2, 3, None]
    queue.finished(2)
    assert queue.next(3) == 4
    queue.finished(3)
    assert queue.next(3) == 1  # nothing else is left
    assert queue


def test_no_workers_are_refused():
    with pytest.raises(RecipeError, match="workers must be at least 1, got 0"):
        Processes(workers=0)


def test_a_cluster_that_is_not_there_or_too_small_is_told(monkeypatch):
    import ray

    def unreachable(**_):
        raise ConnectionError("nobody answers")

    with monkeypatch.context() as patch:
        patch.setattr(ray, "init", unreachable)
        with pytest.raises(RunError, match=r"no Ray cluster at here:1 \(nobody answers\)"):
            list(OnRay(address="here:1").results([], None))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(RunError, match="has 2 cores, and a worker asks for 4: give fewer threads"):
        list(OnRay(threads=4).results([], None))


ORPHAN = """
import sys, time, os
from zsq.engines import Processes

class Endless:
    kin = ""
    def run(self, reporter):
        print(os.getpid(), flush=True)
        time.sleep(600)

if __name__ == "__main__":
    list(Processes(threads=1).results([Endless()], None))
"""


def test_a_worker_ends_with_the_program_that_started_it(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    words = [sys.executable, str(tmp_path / "orphan.py")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        worker = int(program.stdout.readline())
        os.kill(worker, 0)  # it lives
        program.kill()
        for _ in range(200):
            try:
                os.kill(worker, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
    pytest.fail("the worker is still there")
