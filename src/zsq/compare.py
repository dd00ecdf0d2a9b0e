"""Compare: a grid of methods, bits, protocols and seeds under equal conditions, beside controls, cell by cell.

The reporting side: what real images there are stay here, in what is measured and in the control that is fed with
them (``RealImages``); methods never see one.
"""

import hashlib
import json
import os
import platform
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from zsq.api import (
    Effort,
    check,
    find_protocol,
    images_key,
    pixel_box,
    protocol_of,
    quantize,
    reads_images,
    resolve,
)
from zsq.core import (
    Batch,
    Bits,
    Job,
    Method,
    NoData,
    Recipe,
    RecipeError,
    Reporter,
    Run,
    RunError,
    Teacher,
    UnsupportedModel,
    ZsqError,
    show,
)
from zsq.core.run import locked
from zsq.engines import Engine, Lost, Processes
from zsq.evaluate import Images, check_images, evaluate, read_images
from zsq.nets.graph import capture
from zsq.nets.load import Network, load_network
from zsq.quant import QuantizationProtocol
from zsq.rows import FILE, read_rows, write_rows
from zsq.synthesis import Noise

__all__ = ["Cell", "Comparison", "Grid", "RealImages", "compare", "plan"]

CONTROL = "nearest"
"""The method that stands in every table."""
FLOAT_BITS = "w32a32"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is compared; every combination is a cell."""

    models: Sequence[str]
    methods: Sequence[str]
    """Names; ``plugin+host`` and ``name:preset`` are names too."""
    bits: Sequence[str]
    data: str
    """Images that accuracies are measured on."""
    protocols: Sequence[str | None] = (None,)
    """Where quantizers sit; None is each method's own."""
    seeds: Sequence[int] = (0,)
    calibration: str | None = None
    """Images that the control on real images is fed with; not those of ``data``."""
    effort: Effort = "paper"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the network, for those that do not know: ``input_shape``, ``mean``, ``std``, ``checkpoint``."""
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("models", "methods", "bits", "protocols", "seeds"):
            if not getattr(self, name):
                raise RecipeError(f"a comparison needs {name}, and none are given")
        if len(self.models) > 1 and self.settings.get("checkpoint") is not None:
            raise RecipeError(f"one checkpoint cannot fit {len(self.models)} models: compare them one by one")

    @property
    def command(self) -> str:
        """The call that makes this comparison, without folders."""
        words = ["zsq compare", *map(_named, self.models), "--methods", ",".join(self.methods)]
        words += ["--bits", ",".join(self.bits)]
        if protocols := [name for name in self.protocols if name is not None]:
            words += ["--protocol", ",".join(protocols)]
        words += ["--seeds", ",".join(map(str, self.seeds)), "--data", Path(self.data).name]
        if self.calibration is not None:
            words += ["--calibration", Path(self.calibration).name]
        return " ".join([*words, "--effort", self.effort])


@dataclass(frozen=True, kw_only=True)
class RealImages(Recipe):
    """Real images with their true labels where a synthesizer's would be: a control, part of no method."""

    data: str
    """What they are called."""
    digest: str
    """A SHA-256 of all from which they were drawn."""
    samples: int
    images: Images = field(compare=False, repr=False)
    mean: tuple[float, ...] = field(compare=False)
    std: tuple[float, ...] = field(compare=False)

    live: ClassVar[bool] = False

    def parts(self) -> dict[str, Any]:
        """What names the images; a recipe is compared by it."""
        return {name: getattr(self, name) for name in ("data", "digest", "samples")}

    def stream(self, job: Job) -> Iterator[Batch]:
        """One batch of all."""
        for images, labels in self.images.batches(self.mean, self.std, self.samples):
            yield Batch(images.to(job.run.device), labels.to(job.run.device))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One quantization to do, or one float network to measure; with all that its result may depend on."""

    id: str
    """What it is called, and its folder below ``runs``."""
    model: str
    network: str
    """The name of the network."""
    teacher: str
    """A digest of its weights."""
    data: str
    """A digest of the images that are measured on."""
    bits: str
    method: str = "float"
    preset: str = "paper"
    protocol: QuantizationProtocol | None = None
    seed: int = 0
    recipe: Method | None = None
    """What will run; None for float."""
    images: str = ""
    """What decides which images a finite synthesizer makes, as a digest; "" where none does."""
    real: RealImages | None = None
    no_real: str = ""
    """Why there is no control on real images beside this one."""

    @property
    def digest(self) -> str:
        """A SHA-256 of the recipe."""
        return hashlib.sha256(show(self.recipe).encode() if self.recipe else b"float").hexdigest()

    @property
    def source(self) -> Literal["own", "real"]:
        """Whose images feed the quantizer."""
        return "own" if self.real is None else "real"


@dataclass(frozen=True)
class Comparison:
    """A grid of which everything is checked, and what is known of it."""

    grid: Grid
    folder: Path
    cells: tuple[Cell, ...]
    rows: dict[str, dict[str, Any]]
    """By cell, from this and earlier calls; also of cells that the grid does not have."""

    @property
    def due(self) -> list[Cell]:
        """The cells that are left to do, those that failed among them."""
        return [cell for cell in self.cells if self.rows.get(cell.id, {}).get("status") != "done"]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The rows of the cells that failed."""
        rows = [self.rows[cell.id] for cell in self.cells if cell.id in self.rows]
        return [row for row in rows if row["status"] == "failed"]


def plan(grid: Grid, out: str | Path) -> Comparison:
    """The cells of ``grid``, and what ``out`` knows of them. Nothing runs, nothing is written.

    Raises:
        ZsqError: if a cell could not run, or ``out`` has other results or unfinished work under its name.
    """
    cells: dict[str, Cell] = {}
    real = _Calibration(grid)
    for model in grid.models:
        network = load_network(model, **grid.settings)
        if any(cell.network == network.name and cell.model != model for cell in cells.values()):
            raise RecipeError(f"two models are called {network.name}: compare {model} in another folder")
        images = read_images(grid.data, network.input_shape)
        check_images(images, network.classes)
        for cell in _cells(grid, model, network, _digest(images), real):
            cells.setdefault(cell.id, cell)
    folder = Path(out)
    rows = {row["cell"]: row for row in read_rows(folder)} if (folder / FILE).exists() else {}
    found = Comparison(grid, folder, tuple(cells.values()), rows)
    for cell in found.cells:
        _check_known(found, cell)
    return found


def compare(
    grid: Grid, out: str | Path, *, engine: Engine | None = None, reporter: Reporter | None = None
) -> Comparison:
    """Do what is left of ``grid`` and return it with its rows; ``out`` holds them in ``cells.jsonl``.

    Cells are done once: the same call after an interruption goes on, with the file alone or with the unfinished runs
    beside it. A cell that fails becomes a row that says why, and is tried again by the next call.

    Raises:
        ZsqError: before work starts, as ``plan`` says; if another process works in ``out``.
    """
    folder, place = Path(out), engine or Processes()
    with locked(folder / "lock", wait=False):
        found = plan(grid, out)
        due = found.due
        works = [Work(cell=cell, grid=grid, folder=str(folder.resolve())) for cell in due]
        order = [cell.id for cell in found.cells]
        done = len(order) - len(due)
        telling = _Counting(reporter, done, len(order)) if reporter else None
        for index, result in place.results(works, telling):
            row = works[index].failed(result.reason) if isinstance(result, Lost) else result
            if "peak_memory_mb" in row and not place.apart:
                row["peak_memory_mb"] = None  # it is that of all cells until now
            found.rows[row["cell"]] = row
            write_rows(folder / FILE, found.rows.values(), order)
            if telling:
                telling.done += 1
                telling.progress(f"{row['cell']} {row['status']}", 1, 1)
    return found


@dataclass(frozen=True, kw_only=True)
class Work:
    """The task of one cell: everything that a worker must know."""

    cell: Cell
    grid: Grid
    folder: str

    @property
    def kin(self) -> str:
        """Cells that need the same images."""
        return self.cell.images

    def run(self, reporter: Reporter | None) -> dict[str, Any]:
        """The row of the cell. What goes wrong is its reason; a traceback, if it is a surprise, lies in the folder."""
        cell, folder = self.cell, Path(self.folder)
        named = _Named(reporter, cell.id) if reporter else None
        try:
            with warnings.catch_warnings(record=True) as said:
                metrics = self._float() if cell.recipe is None else self._quantize(named)
        except ZsqError as error:
            return self.failed(str(error))
        except Exception as error:
            place = folder / "runs" / f"{cell.id}.traceback"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(traceback.format_exc())
            return self.failed(f"{type(error).__name__}: {error}")
        metrics["model"] = _named(cell.model)
        if metrics.get("checkpoint") is not None:
            metrics["checkpoint"] = Path(metrics["checkpoint"]).name
        row = {"cell": cell.id, "status": "done", **metrics, **self._facts(), "machine": _machine()}
        if said:
            row["warnings"] = list(dict.fromkeys(" ".join(str(each.message).split()) for each in said))
        return row

    def failed(self, reason: str) -> dict[str, Any]:
        """The row of the cell where it could not be done."""
        cell, grid = self.cell, self.grid
        facts: dict[str, Any] = {
            "cell": cell.id,
            "status": "failed",
            "reason": " ".join(reason.split()),
            "model": _named(cell.model),
        }
        facts |= {"method": cell.method, "bits": cell.bits}
        if cell.recipe is not None:
            facts |= {"method": cell.recipe.name, "protocol": protocol_of(cell.recipe).name, "preset": cell.preset}
            facts |= {"effort": grid.effort, "seed": cell.seed}
        return {**facts, **self._facts(), "machine": _machine()}

    def _facts(self) -> dict[str, Any]:
        cell = self.cell
        facts: dict[str, Any] = {"source": cell.source, "recipe": cell.digest, "teacher": cell.teacher}
        facts |= {"data": Path(self.grid.data).name, "data_digest": cell.data, "command": self.grid.command}
        return facts | ({"no_real": cell.no_real} if cell.no_real else {})

    def _float(self) -> dict[str, Any]:
        network = load_network(self.cell.model, **self.grid.settings)
        images = read_images(self.grid.data, network.input_shape)
        device = Run(device=self.grid.device).device
        exact = evaluate(network.module, images, mean=network.mean, std=network.std, device=device)
        return {"method": self.cell.method, "bits": self.cell.bits, "accuracy": {"float": asdict(exact)}}

    def _quantize(self, reporter: Reporter | None) -> dict[str, Any]:
        cell, folder = self.cell, Path(self.folder)
        return quantize(
            cell.model,
            cell.method,
            cell.bits,
            preset=cell.preset,
            effort=self.grid.effort,
            protocol=cell.protocol,
            data=self.grid.data,
            out=folder / "runs" / cell.id,
            seed=cell.seed,
            device=self.grid.device,
            reporter=reporter,
            synthesizer=cell.real,
            shared=folder / "images",
            **self.grid.settings,
        ).metrics


class _Calibration:
    """The images from which the control on real images is drawn, at each size asked for."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._read: dict[tuple[int, int, int], tuple[Images, str]] = {}
        self._drawn: dict[tuple[str, int, int], RealImages] = {}

    def draw(self, network: Network, recipe: Method, seed: int, data: str) -> RealImages | str:
        """As many real images as ``recipe`` makes, or why there is no such control; ``data`` is what is measured on."""
        name, synthesizer, shape = self._grid.calibration, recipe.synthesizer, network.input_shape
        if isinstance(synthesizer, NoData | Noise) or not reads_images(recipe):
            return "makes no images"
        if synthesizer.live:
            return "has a generator that learns beside the student"
        if name is None:
            return "no --calibration was given"
        if shape not in self._read:
            images = read_images(name, shape)
            self._read[shape] = images, _digest(images)
        images, digest = self._read[shape]
        check_images(images, network.classes)
        if digest == data:
            raise RecipeError(f"{name} is what is measured on: calibrate on other images, such as those of training")
        samples = int(getattr(synthesizer, "samples", 0))
        if len(images) < samples:
            raise RecipeError(f"{name} has {len(images)} images, and {recipe.name} makes {samples}: give more")
        key = network.name, samples, seed
        if key not in self._drawn:
            drawn = torch.randperm(len(images), generator=Run(seed=seed, device="cpu").fresh("real"))[:samples]
            self._drawn[key] = RealImages(
                data=Path(name).name,
                digest=digest,
                samples=samples,
                images=Images(images.pixels[drawn], images.labels[drawn], images.classes),
                mean=network.mean,
                std=network.std,
            )
        return self._drawn[key]


def _cells(grid: Grid, model: str, network: Network, data: str, real: _Calibration) -> Iterator[Cell]:
    """The cells of one network, controls first, each checked; ``data`` is the digest of what is measured on."""
    run = Run(device=grid.device)
    teacher = Teacher(network.module)
    student = capture(teacher.module.to(run.device), torch.zeros(2, *network.input_shape, device=run.device))
    job = Job(teacher, student, Bits(), run, network.input_shape, pixel_box(network))
    digest = teacher.digest()
    shared: dict[str, Any] = {"model": model, "network": network.name, "teacher": digest, "data": data}
    yield Cell(id=f"{network.name}/float", bits=FLOAT_BITS, **shared)
    asked: list[_Asked] = []
    places: dict[str, QuantizationProtocol] = {}
    for name, protocol in product(grid.methods, grid.protocols):
        method, _, preset = name.partition(":")
        each = _Asked.of(method, preset or "paper", None if protocol is None else find_protocol(protocol), grid.effort)
        try:
            check(each.recipe, job)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{network.name}: {error}") from None
        place = protocol_of(each.recipe)
        if places.setdefault(place.name, place) != place:
            raise RecipeError(f"{name} changes {place.name}, which others keep: give a --protocol, or compare it alone")
        asked.append(each)
    controls = [_Asked.of(CONTROL, "paper", place, grid.effort) for place in places.values()]
    for each, bits, seed in product([*controls, *asked], map(Bits.parse, grid.bits), grid.seeds):
        recipe = each.recipe
        drawn = real.draw(network, recipe, seed, data)
        key = images_key(recipe.synthesizer, digest, network, Run(seed=seed, device=grid.device))
        cell = Cell(
            id=each.id(network, "", bits, seed),
            method=each.method,
            preset=each.preset,
            bits=str(bits),
            protocol=each.protocol,
            seed=seed,
            recipe=recipe,
            images=key if reads_images(recipe) and not recipe.synthesizer.live else "",
            no_real=drawn if isinstance(drawn, str) and each not in controls else "",
            **shared,
        )
        yield cell
        if isinstance(drawn, RealImages):
            fed = replace(recipe, synthesizer=drawn)
            check(fed, job)
            yield replace(cell, id=each.id(network, "@real", bits, seed), recipe=fed, images="", real=drawn)


@dataclass(frozen=True)
class _Asked:
    """A method as it is called, and what that makes of it."""

    method: str
    preset: str
    protocol: QuantizationProtocol | None
    recipe: Method

    @classmethod
    def of(cls, method: str, preset: str, protocol: QuantizationProtocol | None, effort: Effort) -> "_Asked":
        return cls(method, preset, protocol, resolve(method, preset=preset, effort=effort, protocol=protocol))

    def id(self, network: Network, mark: str, bits: Bits, seed: int) -> str:
        name = self.recipe.name if self.preset == "paper" else f"{self.recipe.name}:{self.preset}"
        return f"{network.name}/{name}{mark}/{str(bits).lower()}/{protocol_of(self.recipe).name}/seed{seed}"


def _check_known(found: Comparison, cell: Cell) -> None:
    """Return if what is known of ``cell`` is of its recipe, its network and its images."""
    row = found.rows.get(cell.id, {})
    if row.get("status") == "done":
        wanted = {"recipe": cell.digest, "teacher": cell.teacher, "data_digest": cell.data}
        words = {"recipe": "another recipe", "teacher": "other weights", "data_digest": "other images measured on"}
        if other := [words[key] for key, value in wanted.items() if row.get(key) != value]:
            raise RunError(
                f"{found.folder / FILE} has {cell.id} with {' and '.join(other)}: "
                "choose another folder, or take the line out"
            )
        return
    identity = found.folder / "runs" / cell.id / "identity.json"
    if cell.recipe is None or not identity.exists():
        return
    try:
        begun = json.loads(identity.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{identity} cannot be read ({error}): remove its folder") from error
    if begun.get("recipe") != show(cell.recipe) or begun.get("teacher") != cell.teacher:
        raise RunError(f"{identity.parent} was begun with another recipe or other weights: remove it")


@dataclass
class _Named:
    """A Reporter that says of which cell a loop is."""

    reporter: Reporter
    cell: str

    def progress(self, label: str, done: int, count: int) -> None:
        self.reporter.progress(f"{self.cell} {label}", done, count)


@dataclass
class _Counting:
    """A Reporter that says how many cells are done."""

    reporter: Reporter
    done: int
    count: int

    def progress(self, label: str, done: int, count: int) -> None:
        self.reporter.progress(f"{self.done} of {self.count} cells, {label}", done, count)


def _named(model: str) -> str:
    """A model without the folders of its file."""
    place, colon, factory = model.rpartition(":")
    return f"{Path(place).name}:{factory}" if place.endswith(".py") and colon else model


def _digest(images: Images) -> str:
    """A SHA-256 of pixels and labels."""
    sha = hashlib.sha256(f"{tuple(images.pixels.shape)}".encode())
    for tensor in (images.pixels, images.labels):
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _machine() -> dict[str, Any]:
    """The processor, its cores, and how many threads were used."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(names, None) or platform.processor() or platform.machine()
    return {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
