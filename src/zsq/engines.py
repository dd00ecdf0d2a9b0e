"""Engines: where independent pieces of work run. What is lost with a process is tried again elsewhere."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess, parent_process
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from zsq.allocator import keep_freed_memory
from zsq.core import MissingExtra, RecipeError, Reporter, RunError

__all__ = ["ATTEMPTS", "Engine", "InProcess", "Lost", "OnRay", "Processes", "Task"]

T = TypeVar("T")
Made = TypeVar("Made", covariant=True)
_SLOW_IMPORTS = ("torch._dynamo",)
"""What the first optimizer of a process imports, for seconds that are not the method's."""
_LOCAL = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""Of a local cluster: nothing is told to Ray's makers, and workers are as important as any other process."""
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

    apart: ClassVar[bool]
    """Whether each task has a process of its own."""

    def results(self, tasks: Sequence[Task[T]], reporter: Reporter | None) -> Iterator[tuple[int, T | Lost]]:
        """The result of each task with its index, as they come."""


@dataclass(frozen=True, kw_only=True)
class InProcess:
    """One task after another in this process."""

    apart: ClassVar[bool] = False

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

    apart: ClassVar[bool] = True

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
                worker.terminate()
            for worker, _ in running.values():
                worker.join(5)
                worker.kill()
                worker.join()


@dataclass(frozen=True, kw_only=True)
class OnRay:
    """Each task in a fresh process of a Ray cluster, ``workers`` at a time.

    The cluster is the one that this program is connected to already, the one at ``address``, or a local one that ends
    with the tasks. Files that tasks share must be where its machines see them.
    """

    workers: int = 2
    threads: int | None = None
    """CPU threads of each, for which the cluster is asked; by default local cores are shared among the workers."""
    address: str | None = None
    """Of a running cluster, as ``ray.init`` takes it."""

    apart: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_workers(self.workers)
        _import_ray()

    def results(self, tasks: Sequence[Task[T]], reporter: Reporter | None) -> Iterator[tuple[int, T | Lost]]:
        """The results as they come; of what happens within a task the reporter hears nothing."""
        ray = _import_ray()
        threads = self.threads or max(1, (os.cpu_count() or 1) // self.workers)
        work = ray.remote(num_cpus=threads, max_calls=1, max_retries=0)(_work_on_ray)
        queue = Queue(tasks)
        running: dict[Any, int] = {}
        with self._connected(ray, threads):
            cores = int(ray.cluster_resources().get("CPU", 0))
            if cores < threads:
                raise RunError(
                    f"the Ray cluster has {cores} cores, and a worker asks for {threads}: give fewer threads"
                )
            try:
                while queue:
                    while (index := queue.next(self.workers)) is not None:
                        running[work.remote(tasks[index], threads)] = index
                    for answer in ray.wait(list(running))[0]:
                        index = running.pop(answer)
                        try:
                            value = ray.get(answer)
                        except ray.exceptions.RayTaskError:
                            raise
                        except ray.exceptions.RayError as error:
                            if lost := queue.lost(index, type(error).__name__):
                                yield index, lost
                            continue
                        queue.finished(index)
                        yield index, value
            finally:
                for answer in running:
                    ray.cancel(answer, force=True)

    @contextlib.contextmanager
    def _connected(self, ray: Any, threads: int) -> Iterator[None]:
        if ray.is_initialized():
            yield
            return
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        if self.address is not None:
            try:
                ray.init(address=self.address, **{**quiet, "include_dashboard": None})
            except (ConnectionError, ValueError) as error:
                raise RunError(f"no Ray cluster at {self.address} ({error}): start one, or leave it to zsq") from error
        else:
            with _environment(_LOCAL | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):
                ray.init(address="local", num_cpus=self.workers * threads, _node_ip_address="127.0.0.1", **quiet)
        try:
            yield
        finally:
            ray.shutdown()


def _work_on_ray(task: Task[T], threads: int) -> T:
    prepare(threads)
    return task.run(None)


def _import_ray() -> Any:
    try:
        return import_module("ray")
    except ImportError as error:
        raise MissingExtra("cells are handed out by Ray: pip install 'zsq[ray]'") from error


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """A context in which processes that are started see ``changes``."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is the parent's, who ends this process ...
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ... in good order
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
