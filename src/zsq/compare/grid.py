"""What is compared: the grid that is asked for, its cells, and what is known of them."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from zsq.api import Effort, check, find_protocol, images_key, pixel_box, protocol_of, reads_images, resolve
from zsq.compare.controls import Calibration, RealImages, images_digest
from zsq.core import Bits, Job, Method, RecipeError, Run, RunError, Teacher, UnsupportedModel, show
from zsq.evaluate import check_images, read_images
from zsq.nets.graph import capture
from zsq.nets.load import Network, load_network
from zsq.quant import QuantizationProtocol
from zsq.rows import CONTROL, FILE, read_rows

__all__ = ["Cell", "Comparison", "Grid", "plan", "without_folders"]

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
        words = ["zsq compare", *map(without_folders, self.models), "--methods", ",".join(self.methods)]
        words += ["--bits", ",".join(self.bits)]
        if protocols := [name for name in self.protocols if name is not None]:
            words += ["--protocol", ",".join(protocols)]
        words += ["--seeds", ",".join(map(str, self.seeds)), "--data", Path(self.data).name]
        if self.calibration is not None:
            words += ["--calibration", Path(self.calibration).name]
        return " ".join([*words, "--effort", self.effort])


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
    real = Calibration(grid.calibration)
    for model in grid.models:
        network = load_network(model, **grid.settings)
        if any(cell.network == network.name and cell.model != model for cell in cells.values()):
            raise RecipeError(f"two models are called {network.name}: compare {model} in another folder")
        images = read_images(grid.data, network.input_shape)
        check_images(images, network.classes)
        for cell in _cells(grid, model, network, images_digest(images), real):
            cells.setdefault(cell.id, cell)
    folder = Path(out)
    rows = {row["cell"]: row for row in read_rows(folder)} if (folder / FILE).exists() else {}
    found = Comparison(grid, folder, tuple(cells.values()), rows)
    for cell in found.cells:
        _check_known(found, cell)
    return found


def _cells(grid: Grid, model: str, network: Network, data: str, real: Calibration) -> Iterator[Cell]:
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


def without_folders(model: str) -> str:
    """A model without the folders of its file."""
    place, colon, factory = model.rpartition(":")
    return f"{Path(place).name}:{factory}" if place.endswith(".py") and colon else model
