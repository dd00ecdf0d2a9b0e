"""Run: device, named randomness, progress, log, resume and ranks. Nothing else touches seeds, devices or files."""

import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor, nn

from zsq.core.errors import RecipeError, RunError, ZsqError
from zsq.core.ranks import average, gathered, position

__all__ = ["Precision", "Reporter", "Run", "locked", "resolve_device", "save_atomically"]

T = TypeVar("T")
Precision = Literal["float32", "bfloat16"]


class Reporter(Protocol):
    """Something that shows progress to a person; the library itself never prints."""

    def progress(self, label: str, done: int, count: int) -> None:
        """``done`` of ``count`` steps of ``label`` are finished."""


class _Silent:
    def progress(self, label: str, done: int, count: int) -> None:
        pass


class Run:
    """One quantization: where it computes, what it draws, and what survives an interruption.

    Work is resumable in two ways. ``steps`` is a loop whose every changed object was given to ``track``: it continues
    from the last checkpoint. ``cached`` is a piece of work that is done once and kept, or redone whole.
    Random numbers are drawn on the CPU from streams named by (seed, scope, name), so they depend on neither the
    device nor on which other ingredients draw.

    Where torch.distributed has a process group, every rank makes the same calls on a run of its own: all wait for each
    other in ``together`` and what is made of it, and rank 0 alone writes and reports.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        seed: int = 0,
        device: str = "auto",
        precision: Precision = "float32",
        save_every: float = 30.0,
        reporter: Reporter | None = None,
    ) -> None:
        """``folder`` None keeps nothing; ``save_every`` is in seconds of a ``steps`` loop.

        ``precision`` is that of the networks while they are looked at; parameters and losses stay float32.

        Raises:
            RunError: if the device is not there, the folder cannot be written, or its checkpoint is none of a run.
        """
        self.seed = seed
        self.device = resolve_device(device)
        if precision not in get_args(Precision):
            raise RunError(f"precision is {' or '.join(get_args(Precision))}, got {precision!r}")
        self.precision = precision
        self.rank, self.world = position()
        self.folder = None if folder is None else Path(folder)
        self.seconds: dict[str, float] = {}
        self._save_every = save_every
        self._reporter = reporter if reporter and self.rank == 0 else _Silent()
        self._scope: list[str] = []
        self._name = ""
        self._pieces = self.folder and self.folder / "pieces"
        self._tracked: dict[str, Any] = {}
        self._saved: dict[str, Any]
        self._done: dict[str, int]
        self._spent: dict[str, float]
        self._saved, self._done, self._spent = self.together(self._open)[0]
        self._spared = 0.0

    def _open(self) -> tuple[dict[str, Any], dict[str, int], dict[str, float]]:
        """What the checkpoint holds: what was tracked, steps done and seconds spent by label. Rank 0 alone looks."""
        if self.folder is None or self.rank > 0:
            return {}, {}, {}
        _writable(self.folder)
        return _resumed(self._checkpoint) if self._checkpoint.exists() else ({}, {}, {})

    # --- identity -----------------------------------------------------------------------------------------------

    def claim(self, identity: Mapping[str, str]) -> None:
        """Make the folder this work's own, or continue it.

        Raises:
            RunError: if the folder holds the work of another identity (recipe, teacher, bits, seed ...).
        """
        self.together(lambda: self._claim(identity))

    def _claim(self, identity: Mapping[str, str]) -> None:
        if self.folder is None or self.rank > 0:
            return
        path = self.folder / "identity.json"
        if path.exists():
            try:
                found = json.loads(path.read_text())
            except (OSError, ValueError) as error:
                raise RunError(f"{path} cannot be read ({error}): remove the folder or choose another") from error
            other = [key for key in {**found, **identity} if found.get(key) != identity.get(key)]
            if other:
                raise RunError(
                    f"{self.folder} holds another run ({', '.join(_change(k, found, identity) for k in other)}): "
                    "choose another folder or remove this one"
                )
            return
        strangers = [p.name for p in self.folder.iterdir() if p.suffix != ".partial"]  # left by a killed first write
        if strangers:
            raise RunError(f"{self.folder} is not a run folder and not empty (it holds {', '.join(strangers[:3])})")
        save_atomically(path, json.dumps(dict(identity), indent=1).encode())

    # --- randomness ---------------------------------------------------------------------------------------------

    def generator(self, name: str) -> torch.Generator:
        """The random stream ``name``; inside a cached piece it belongs to that piece, elsewhere it is tracked."""
        stream = self.fresh(name)
        return stream if self._scope else self.track(f"random/{name}", stream)

    def fresh(self, name: str) -> torch.Generator:
        """A stream that starts anew at each call: a function of (seed, scope, name) alone."""
        digest = hashlib.sha256("/".join((str(self.seed), *self._scope, self._name + name)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    @contextlib.contextmanager
    def named(self, name: str) -> Iterator[None]:
        """A context in which streams, tracked things and pieces have ``name`` before theirs; "" changes nothing."""
        outer, self._name = self._name, f"{self._name}{name}/" if name else self._name
        try:
            yield
        finally:
            self._name = outer

    @contextlib.contextmanager
    def seeded(self, name: str) -> Iterator[None]:
        """A context in which torch's own randomness (initialisation, dropout) is the stream ``name``, started anew."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.fresh(name).get_state())
            yield

    def autocast(self) -> torch.autocast:
        """A context in which layers compute in the precision of this run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    @property
    def layout(self) -> torch.memory_format:
        """How networks lie in memory while they are looked at: channels last where layers compute in bfloat16."""
        return torch.channels_last if self.precision == "bfloat16" else torch.contiguous_format

    # --- resumable work -----------------------------------------------------------------------------------------

    def track(self, name: str, thing: T) -> T:
        """``thing`` (a module, optimizer, scheduler or generator), saved in each checkpoint and restored from one.

        Raises:
            RunError: if something else is tracked under this name: only one of the two could be restored.
        """
        name = self._name + name
        if name in self._tracked:
            raise RunError(f"two things are tracked as {name!r}: give each a name of its own")
        if name in self._saved:
            _restore(thing, self._saved.pop(name))
        self._tracked[name] = thing
        return thing

    def steps(self, count: int, label: str) -> Iterator[int]:
        """A resumable loop: everything it changes must be tracked. Yields the steps that are left."""
        saved, begin = time.monotonic(), self._clock()
        self._spared += self._spent.get(label, 0.0)
        for step in range(self._done.get(label, 0), count):
            yield step
            self._done[label] = step + 1
            self._reporter.progress(label, step + 1, count)
            if self.folder and (time.monotonic() - saved >= self._save_every or step + 1 == count):
                self._spent[label] = self._clock() - begin
                self.save()
                saved = time.monotonic()

    def save(self) -> None:
        """Write a checkpoint of everything tracked."""
        if self.rank > 0:
            return
        tracked = {name: _state(thing) for name, thing in self._tracked.items()}
        _save_tensors(
            self._checkpoint, {"tracked": {**self._saved, **tracked}, "done": self._done, "spent": self._spent}
        )

    def cached(self, key: str, make: Callable[[], T]) -> T:
        """The value of ``make()``, kept under ``key``: done once, redone whole if interrupted.

        The value is made of tensors, numbers, text, lists and dicts, and holds everything that the piece drew.
        """
        return next(self.pieces({key: make}))

    def pieces(self, makes: Mapping[str, Callable[[], T]]) -> Iterator[T]:
        """The values of ``cached`` pieces that need nothing of each other, in order: each rank makes one at a time."""
        rank, world = (0, 1) if self._scope else (self.rank, self.world)  # inside a piece a rank is alone
        keys = list(makes)
        for first in range(0, len(keys), world):
            due = keys[first : first + world]
            mine = [partial(self._piece, key, makes[key]) for key in due[rank : rank + 1]]
            values = [value for part in self.together(partial(_called, mine)) for value in part]
            for key, value in zip(due, values, strict=True):
                path = self._kept(key)
                if path and self.rank == 0 and not path.exists():
                    _save_tensors(path, value)
            yield from (value["value"] for value in values)

    def _piece(self, key: str, make: Callable[[], Any]) -> dict[str, Any]:
        """The value of one piece, and the seconds that it took."""
        path = self._kept(key)
        if path and path.exists():
            kept = _read_piece(path, self.device)
            self._spared += kept["seconds"]
            return kept
        self._scope.append(key)
        begin = self._clock()
        try:
            return {"value": make(), "seconds": self._clock() - begin}
        finally:
            self._scope.pop()

    def _kept(self, key: str) -> Path | None:
        return self._pieces and self._pieces / f"{'/'.join((*self._scope, self._name + key))}.pt"

    @contextlib.contextmanager
    def sharing(self, folder: Path | None) -> Iterator[None]:
        """A context in which pieces lie in ``folder``, where other runs find them; None changes nothing.

        One run works there at a time: another waits, and then finds what the first one made.
        """
        if folder is None:
            yield
            return
        own, self._pieces = self._pieces, folder
        try:
            with locked(folder / "lock") if self.rank == 0 else contextlib.nullcontext():
                yield
        finally:
            self._pieces = own

    def progress(self, count: int, label: str) -> Iterator[int]:
        """A loop inside a cached piece: shown, not resumed."""
        for step in range(count):
            yield step
            self._reporter.progress(label, step + 1, count)

    # --- ranks --------------------------------------------------------------------------------------------------

    def together(self, make: Callable[[], T]) -> list[T]:
        """What ``make`` returns on each rank, in their order; a ``ZsqError`` of one is raised on all."""
        outcome: T | ZsqError
        try:
            outcome = make()
        except ZsqError as error:
            outcome = error
        values = []
        for each in [outcome] if self._scope else gathered(outcome, self.device):
            if isinstance(each, ZsqError):
                raise each
            values.append(each)
        return values

    def share(self, size: int) -> slice:
        """Which of ``size`` images are this rank's.

        Raises:
            RecipeError: if shares cannot be equal: then a mean over the ranks is not the mean over the images.
        """
        part, rest = divmod(size, self.world)
        if rest:
            raise RecipeError(
                f"a batch of {size} images has no equal shares for {self.world} processes: "
                f"choose a batch_size that {self.world} divides, or another number of processes"
            )
        return slice(self.rank * part, (self.rank + 1) * part)

    def average(self, module: nn.Module, *more: Tensor) -> None:
        """Replace the gradients of ``module``, and ``more``, by their means over the ranks, in place."""
        average([*more, *(each.grad for each in module.parameters() if each.grad is not None)])

    # --- what happened ------------------------------------------------------------------------------------------

    def log(self, label: str, step: int, **numbers: float) -> None:
        """Append one JSON line to ``log.jsonl``: seconds since the epoch, the label, the step and the numbers."""
        if self.folder is None or self.rank > 0:
            return
        line = json.dumps({"time": round(time.time(), 3), "label": label, "step": step, **numbers})
        with _telling(self.folder / "log.jsonl") as path, path.open("a") as file:
            file.write(line + "\n")

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall-clock seconds spent inside to ``seconds[stage]``, as if nothing had been done before.

        What a kept piece or the finished steps of a resumed loop once took counts as spent.
        """
        begin = self._clock()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + self._clock() - begin

    def _clock(self) -> float:
        return time.perf_counter() + self._spared

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the run folder atomically; nothing happens without a folder."""
        self.together(lambda: self._write(name, content))

    def _write(self, name: str, content: bytes) -> None:
        if self.folder is not None and self.rank == 0:
            save_atomically(self.folder / name, content)

    @property
    def _checkpoint(self) -> Path:
        assert self.folder is not None
        return self.folder / "checkpoint.pt"


def resolve_device(name: str) -> torch.device:
    """The device ``name``; ``auto`` is the first accelerator, or the CPU.

    Raises:
        RunError: if it does not exist here; the message lists what does.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        present = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise RunError(f"no device {name!r} here: there is {', '.join(present)}") from error
    return device


def save_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` holds either all of it or what it held before.

    Raises:
        RunError: if it cannot be written (no space, no permission); a later run resumes from what is complete.
    """
    with _telling(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """A context that one process at a time is in; the lock goes with the process, however that ends.

    Raises:
        RunError: if another is in it and ``wait`` is False, or the file cannot be written.
    """
    import fcntl  # not on Windows, where the library can be imported

    with _telling(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise RunError(f"another process works in {path.parent}: wait for it, or choose another folder") from error
        yield


def _save_tensors(path: Path, value: Any) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    save_atomically(path, buffer.getvalue())


def _resumed(path: Path) -> tuple[dict[str, Any], dict[str, int], dict[str, float]]:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        return state["tracked"], state["done"], state.get("spent", {})
    except Exception as error:  # a strange pickle can raise anything
        raise RunError(f"{path} is no checkpoint of a run: choose another folder, or remove it") from error


def _read_piece(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        kept = torch.load(path, weights_only=True, map_location=device)
        return {"value": kept["value"], "seconds": float(kept["seconds"])}
    except Exception as error:  # a strange pickle can raise anything
        raise RunError(f"{path} is no finished piece of a run: remove it, and it is made again") from error


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[Path]:
    try:
        yield path
    except OSError as error:
        raise RunError(
            f"cannot write {path} ({error.strerror}): make room or choose another folder, "
            "then run the same command again; it resumes"
        ) from error


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create {folder} ({error.strerror}): choose another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RunError(f"cannot write into {folder}: choose another folder")


def _called(makes: Sequence[Callable[[], T]]) -> list[T]:
    return [make() for make in makes]


def _change(key: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    old, new = found.get(key, "nothing"), wanted.get(key, "nothing")
    short = len(old) + len(new) < 80 and "\n" not in old + new
    return f"{key} {old}, not {new}" if short else f"another {key}"


def _state(thing: Any) -> Any:
    return thing.get_state() if isinstance(thing, torch.Generator) else thing.state_dict()


def _restore(thing: Any, state: Any) -> None:
    if isinstance(thing, torch.Generator):
        thing.set_state(state)
    else:
        thing.load_state_dict(state)
