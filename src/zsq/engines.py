"""Engines: where independent pieces of work run. What is lost with a process is tried again elsewhere."""

import multiprocessing
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess, parent_process
from typing import Any, Generic, Protocol, TypeVar

from zsq.allocator import keep_freed_memory
from zsq.core import RecipeError, Reporter

__all__ = ["ATTEMPTS", "Engine", "InProcess", "Lost", "Processes", "Task"]

T = TypeVar("T")
Made = TypeVar("Made", covariant=True)
_SLOW_IMPORTS = ("torch._dynamo",)
"""What the first optimizer of a process imports, for seconds that are not the method's."""
ATTEMPTS = 3
"""How often a task is tried whose process ends without an answer."""


class Task(Protocol[Made]):
    """A piece of work that can be pickled; what it raises ends everything."""

    @property
    def kin(self) -> str:
        """Tasks of one name gain by not running at the same time; "" is kin to none."""

    def run(self, reporter: Reporter | None) -> Made:
        """The result."""


@dataclass(frozen=True)
class Lost:
    """In place of a result: the process ended without one, each time."""

    reason: str


class Engine(Protocol):
    """A way to run tasks."""

    def results(self, tasks: Sequence[Task[T]], reporter: Reporter | None) -> Iterator[tuple[int, T | Lost]]:
        """The result of each task with its index, as they come."""


@dataclass(frozen=True, kw_only=True)
class InProcess:
    """One task after another in this process."""

    def results(self, tasks: Sequence[Task[T]], reporter: Reporter | None) -> Iterator[tuple[int, T | Lost]]:
        """The results in order."""
        for index, task in enumerate(tasks):
            yield index, task.run(reporter)


class Queue(Generic[T]):
    """Tasks that wait, and how often each was tried."""

    def __init__(self, tasks: Sequence[Task[T]]) -> None:
        self.tasks = tasks
        self._waiting = deque(range(len(tasks)))
        self._running: list[int] = []
        self._tries = Counter[int]()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._running)

    def next(self, workers: int) -> int | None:
        """The task that is to start now, if possible none whose kin runs; None if there is none or nobody to do it."""
        if not self._waiting or len(self._running) >= workers:
            return None
        busy = {self.tasks[index].kin for index in self._running} - {""}
        index = next((each for each in self._waiting if self.tasks[each].kin not in busy), self._waiting[0])
        self._waiting.remove(index)
        self._running.append(index)
        return index

    def finished(self, index: int) -> None:
        """A task has its result."""
        self._running.remove(index)

    def lost(self, index: int, how: str) -> Lost | None:
        """A task's process ended: it waits again, or is lost."""
        self._running.remove(index)
        self._tries[index] += 1
        if self._tries[index] < ATTEMPTS:
            self._waiting.appendleft(index)
            return None
        return Lost(f"its process ended {ATTEMPTS} times without a result ({how})")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Each task in a fresh process of its own, ``workers`` at a time.

    What one task needs of memory is measured apart from others, and one that is killed takes none along.
    """

    workers: int = 1
    threads: int | None = None
    """CPU threads of each; by default the cores are shared among the workers."""

    def __post_init__(self) -> None:
        check_workers(self.workers)

    def results(self, tasks: Sequence[Task[T]], reporter: Reporter | None) -> Iterator[tuple[int, T | Lost]]:
        """The results as they come."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*_SLOW_IMPORTS, "zsq.compare"])
        threads = self.threads or max(1, (os.cpu_count() or 1) // self.workers)
        queue = Queue(tasks)
        running: dict[Connection, tuple[BaseProcess, int]] = {}
        try:
            while queue:
                while (index := queue.next(self.workers)) is not None:
                    here, there = context.Pipe(duplex=False)
                    process = context.Process(target=_work, args=(tasks[index], there, threads), daemon=True)
                    process.start()
                    there.close()
                    running[here] = process, index
                for pipe in wait(list(running)):
                    assert isinstance(pipe, Connection)
                    worker, index = running[pipe]
                    try:
                        kind, value = pipe.recv()
                    except (EOFError, OSError):
                        kind, value = "lost", None
                    if kind == "progress":
                        if reporter is not None:
                            reporter.progress(*value)
                        continue
                    worker.join()
                    del running[pipe]
                    if kind == "result":
                        queue.finished(index)
                        yield index, value
                    elif lost := queue.lost(index, f"exit code {worker.exitcode}"):
                        yield index, lost
        finally:
            for worker, _ in running.values():
                worker.kill()
                worker.join()


class _Telling:
    """A Reporter that tells another process, a few times a second."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._told = pipe, 0.0

    def progress(self, label: str, done: int, count: int) -> None:
        if time.monotonic() - self._told >= 0.2:
            self._told = time.monotonic()
            self._pipe.send(("progress", (label, done, count)))


def _work(task: Task[Any], pipe: Connection, threads: int) -> None:
    """What a process of its own does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(threads)
    pipe.send(("result", task.run(_Telling(pipe))))


def _end_with_parent() -> None:
    """An orphan would go on in a folder where the same command continues."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def prepare(threads: int) -> None:
    """Set up this process as a worker."""
    import torch

    for name in _SLOW_IMPORTS:
        import_module(name)
    keep_freed_memory()
    torch.set_num_threads(threads)


def check_workers(workers: int) -> None:
    """Raise RecipeError unless there is a worker."""
    if workers < 1:
        raise RecipeError(f"workers must be at least 1, got {workers}")
