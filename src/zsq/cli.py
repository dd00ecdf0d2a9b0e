"""The command line: aligned text for people, ``--json`` for programs, one line and exit code 2 for every mistake.

Everything heavy is imported inside the commands, so that ``zsq --help`` answers at once.
"""

import ast
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from zsq.allocator import keep_freed_memory
from zsq.torchrun import joined
from zsq.version import __version__

if TYPE_CHECKING:
    from rich.progress import Progress

    from zsq.core import Batch, Method, Reporter
    from zsq.evaluate import Accuracy
    from zsq.layers import Layers
    from zsq.nets.load import Network
    from zsq.runtime.benchmark import Benchmark
    from zsq.runtime.numerics import Distance
    from zsq.runtime.verify import Verification

__all__ = ["app", "main"]

app = typer.Typer(
    name="zsq",
    help="Zero-shot quantization: a pretrained vision network and no data in, a low-bit network out.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

FORMS = "zoo:NAME, torchvision:NAME, timm:NAME, path/to/file.py:factory or package.module:factory"

Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"{FORMS}.", show_default=False)]
MethodName = Annotated[str, typer.Option("--method", help="A name that zsq methods lists.")]
Preset = Annotated[str, typer.Option(help="One of the method's presets; zsq show lists them.")]
EffortName = Annotated[
    Literal["smoke", "fast", "paper"],
    typer.Option(help="The method's own numbers (paper), minutes on a CPU (fast), or just a test (smoke)."),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="One value of the recipe; may be repeated.")
]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights for MODEL: .safetensors, or a torch file of tensors.")]
InputShape = Annotated[str | None, typer.Option(metavar="C,H,W", help="Of one image; for a network of your own.")]
Mean = Annotated[str | None, typer.Option(metavar="X,...", help="Per channel, of images in 0..1.")]
Std = Annotated[str | None, typer.Option(metavar="X,...", help="Per channel, of images in 0..1.")]
Seed = Annotated[int, typer.Option(help="Same seed, same bits.")]
Device = Annotated[str, typer.Option(help="auto (an accelerator if there is one), cpu, cuda:0 ...")]
PrecisionName = Annotated[
    Literal["float32", "bfloat16"],
    typer.Option(
        "--precision", help="What layers compute in while a student or a generator learns; results are float32."
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
FileThreads = Annotated[int, typer.Option(min=1, help="CPU threads of each runtime.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
DATA_HELP = "A .zip or folder in ImageFolder layout, an .npz with x and y, or digits. Only ever read to report."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0; 1 where verify found a fault or a cell failed; 2 for a mistake of the caller; 130 when interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    keep_freed_memory()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            with command.make_context("zsq", words or ["--help"]) as context, joined():
                command.invoke(context)
            sys.stdout.flush()
        except typer.Exit as stop:
            return stop.exit_code
        except typer.TyperException as error:
            return _fail(error.format_message())
        except KeyboardInterrupt:
            again = "; the same command continues where it stopped" if {"quantize", "compare"} & set(words[:1]) else ""
            print(f"zsq: interrupted{again}", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader, head for one, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            from zsq.core import ZsqError

            if not isinstance(error, ZsqError):
                raise
            return _fail(str(error))
    return 0


# --- what there is ------------------------------------------------------------------------------------------------


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the systems, the controls and the plug-ins."""
    from zsq.methods import BASELINES, METHODS, PLUGINS

    systems, controls = ([_facts(method) for method in group.values()] for group in (METHODS, BASELINES))
    hosts = {plugin: _hosts(plugin) for plugin in PLUGINS}
    if as_json:
        plugins = [{"plugin": plugin, "hosts": taken} for plugin, taken in hosts.items()]
        _print_json({"methods": systems, "controls": controls, "plugins": plugins})
        return
    header = ("method", "needs", "trains", "images", "venue", "confidence", "protocol")
    rows = [[_cell(facts[name]) for name in header] for facts in (*systems, *controls)]
    lines = _table([list(header), *rows])
    first = 1 + len(systems)
    plugged = _table([[plugin, f"on {', '.join(taken)}"] for plugin, taken in hosts.items()])
    blocks = [*lines[:first], "", "controls", *lines[first:], "", "plug-ins, written NAME+HOST", *plugged]
    print("\n".join(blocks))


@app.command()
def show(
    method: Annotated[str, typer.Argument(metavar="METHOD", show_default=False)],
    preset: Preset = "paper",
    effort: EffortName = "paper",
) -> None:
    """Print a method's recipe, one value a line.

    The names on the left are the paths that --set takes.
    """
    from zsq.api import resolve
    from zsq.core import show

    recipe = resolve(method, preset=preset, effort=effort)
    paper = recipe.paper
    source = f"{paper.venue}, arXiv {paper.arxiv}" if paper.arxiv else paper.venue
    print(f"{recipe.name}: {paper.title} ({source})")
    print(f"presets: {', '.join(('paper', *recipe.presets))}\n")
    print(show(recipe))


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", show_default=False)],
) -> None:
    """Print what distinguishes two methods."""
    from zsq.api import find_method
    from zsq.core import diff

    if lines := diff(find_method(a), find_method(b)):
        print(lines)


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the shipped networks."""
    from zsq.zoo import MODELS, parameters, top1

    facts: list[dict[str, Any]] = [
        {
            "model": f"zoo:{name}",
            "input_shape": list(entry.input_shape),
            "classes": entry.classes,
            "parameters": parameters(name),
            "top1": top1(name),
            "data": entry.data,
        }
        for name, entry in MODELS.items()
    ]
    if as_json:
        _print_json({"zoo": facts, "forms": FORMS})
        return
    rows = [["model", "input", "classes", "parameters", "top-1", "trained on"]]
    for fact in facts:
        accuracy = "-" if fact["top1"] is None else f"{fact['top1']:.2f} %"
        shape = "x".join(map(str, fact["input_shape"]))
        rows.append([fact["model"], shape, str(fact["classes"]), f"{fact['parameters']:,}", accuracy, fact["data"]])
    print("\n".join([*_table(rows), "", f"A MODEL is {FORMS}."]))


# --- work ---------------------------------------------------------------------------------------------------------


@app.command()
def quantize(
    model: Model,
    method: MethodName,
    bits: Annotated[str, typer.Option(help="Of weights and activations: w4a4; 2 to 8, or 32 for float.")],
    out: Annotated[Path, typer.Option(help="The run folder; the same command continues an interrupted run.")],
    preset: Preset = "paper",
    protocol: Annotated[str | None, typer.Option(help="Where quantizers sit; the method's own by default.")] = None,
    effort: EffortName = "paper",
    settings: Settings = None,
    checkpoint: Checkpoint = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    estimate: Annotated[
        bool, typer.Option(help="Estimate the loss from synthetic images, which needs no data.")
    ] = True,
    seed: Seed = 0,
    device: Device = "auto",
    precision: PrecisionName = "float32",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Make a low-bit copy of a network, no data.

    With --data, report what it cost. The run folder holds the recipe, the student, the log and the metrics.
    """
    overrides, network = _overrides(settings), _network_settings(checkpoint, input_shape, mean, std)
    from zsq.api import quantize

    _use_threads(threads)
    with _progress() as reporter:
        result = quantize(
            model,
            method,
            bits,
            preset=preset,
            protocol=protocol,
            effort=effort,
            overrides=overrides,
            data=data,
            estimate=estimate,
            out=out,
            seed=seed,
            device=device,
            precision=precision,
            reporter=reporter,
            **network,
        )
    if as_json:
        _print_json({**result.metrics, "folder": str(out)})
    else:
        print("\n".join(_table(_summary(result.metrics, out))))


@app.command()
def synthesize(
    model: Model,
    method: MethodName,
    samples: Annotated[int, typer.Option(min=1, help="How many images.")],
    out: Annotated[Path, typer.Option(help="An .npz with x (N, H, W, C) uint8, and y; or a new folder of PNGs.")],
    preset: Preset = "paper",
    effort: EffortName = "paper",
    settings: Settings = None,
    checkpoint: Checkpoint = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Make and keep a method's images."""
    overrides, network = _overrides(settings), _network_settings(checkpoint, input_shape, mean, std)
    if out.suffix not in ("", ".npz"):
        raise typer.BadParameter(f"--out {out}: give a name that ends in .npz, or one without suffix for a folder")
    if out.suffix == "" and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise typer.BadParameter(f"--out {out} exists: choose another folder")
    from zsq.api import synthesize

    _use_threads(threads)
    with _progress() as reporter:
        made, found = synthesize(
            model,
            method,
            samples,
            preset=preset,
            effort=effort,
            overrides=overrides,
            seed=seed,
            device=device,
            reporter=reporter,
            **network,
        )
    _write_images(made, found, out)
    facts = {"model": model, "method": method, "samples": len(made), "seed": seed, "out": str(out)}
    if as_json:
        _print_json(facts)
    else:
        print("\n".join(_table([[key, str(value)] for key, value in facts.items()])))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, or a network.", show_default=False)],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    checkpoint: Checkpoint = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure a network or a run on images.

    For a run folder, the low-bit network is measured beside its teacher.
    """
    settings = _network_settings(checkpoint, input_shape, mean, std)
    is_run = Path(model).is_dir()
    if is_run and any(value is not None for value in settings.values()):
        raise typer.BadParameter(f"{model} is a run folder, which knows its network: leave its settings away")
    from dataclasses import asdict

    from zsq.api import load
    from zsq.core.run import resolve_device
    from zsq.evaluate import check_images, evaluate, evaluate_pair, read_images
    from zsq.nets.load import load_network

    _use_threads(threads)
    student, network = load(model) if is_run else (None, load_network(model, **settings))
    images = read_images(data, network.input_shape)
    check_images(images, network.classes)

    with _progress() as reporter:
        measured: dict[str, Any] = {"mean": network.mean, "std": network.std, "device": resolve_device(device)}
        if reporter is not None:
            measured["progress"] = partial(reporter.progress, "evaluate")
        low: Accuracy | None = None
        if student is None:
            exact = evaluate(network.module, images, **measured)
        else:
            exact, low = evaluate_pair(network.module, student, images, **measured)
    facts: dict[str, Any] = {"model": model, "images": exact.images, "float": asdict(exact)}
    rows = [["model", model], ["images", str(exact.images)]]
    if low is None:
        rows += [["top-1", f"{exact.top1:.2f} %"], ["top-5", f"{exact.top5:.2f} %"]]
    else:
        facts |= {"quantized": asdict(low), "drop": round(exact.top1 - low.top1, 4)}
        rows += _accuracy_rows(facts)
    if as_json:
        _print_json(facts)
    else:
        print("\n".join(_table(rows)))


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=f"{FORMS}.", show_default=False)],
    methods: Annotated[str, typer.Option(help="Names with commas; synq+zeroq and squant:a8 (a preset) are names too.")],
    bits: Annotated[str, typer.Option(help="With commas: w4a4,w3a3.")],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    out: Annotated[Path, typer.Option(help="The folder; the same command continues an interrupted comparison.")],
    protocol: Annotated[str | None, typer.Option(help="Names with commas; each method's own by default.")] = None,
    seeds: Annotated[str, typer.Option(help="With commas: 0,1,2.")] = "0",
    calibration: Annotated[
        str | None, typer.Option(help="Real images for the control of every quantizer, not those of --data.")
    ] = None,
    effort: EffortName = "paper",
    checkpoint: Checkpoint = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    device: Device = "auto",
    engine: Annotated[
        Literal["processes", "local", "ray"],
        typer.Option(help="A process for each cell here (processes) or on Ray (ray), or all in this one (local)."),
    ] = "processes",
    workers: Annotated[int, typer.Option(min=1, help="Cells at a time; not for local.")] = 1,
    address: Annotated[str | None, typer.Option(help="Of a running Ray cluster; a local one by default.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each worker.")] = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="List the cells and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods under equal conditions, cell by cell, beside controls.

    Float, nearest under each protocol and, with --calibration, the same quantizers on real images stand in every
    table. OUT/cells.jsonl has one line a cell, and is all that is needed to go on later. Exit code 1 if a cell failed.
    """
    settings = _network_settings(checkpoint, input_shape, mean, std)
    numbers = _numbers("--seeds", seeds, int, "0,1,2")
    if engine == "local" and workers > 1:
        raise typer.BadParameter("--engine local has one worker: give --engine processes, or leave --workers away")
    if engine != "ray" and address is not None:
        raise typer.BadParameter(f"--address is that of a Ray cluster: give --engine ray, not {engine}")
    from zsq.compare import Grid, compare, plan
    from zsq.engines import Engine, InProcess, OnRay, Processes
    from zsq.table import facts, markdown, tables

    grid = Grid(
        models=models,
        methods=_list(methods),
        bits=_list(bits),
        protocols=(None,) if protocol is None else _list(protocol),
        seeds=[int(number) for number in numbers or ()],
        data=data,
        calibration=calibration,
        effort=effort,
        settings=settings,
        device=device,
    )
    if only_plan:
        found = plan(grid, out)
        known = {cell.id: found.rows.get(cell.id, {}).get("status", "due") for cell in found.cells}
        if as_json:
            _print_json(known)
        else:
            rows = _table([[cell, status] for cell, status in known.items()])
            print("\n".join([*rows, "", f"{len(found.due)} of {len(known)} cells to do"]))
        return
    _use_threads(threads)
    place: Engine = InProcess()
    if engine == "processes":
        place = Processes(workers=workers, threads=threads)
    elif engine == "ray":
        place = OnRay(workers=workers, threads=threads, address=address)
    with _progress() as reporter:
        found = compare(grid, out, engine=place, reporter=reporter)
    made = tables(found.rows.values())
    if as_json:
        _print_json(facts(made))
    else:
        print(markdown(made))
    if found.failed:
        names = ", ".join(row["cell"] for row in found.failed)
        print(
            f"zsq: {len(found.failed)} of {len(found.cells)} cells failed, the same command tries them again: {names}",
            file=sys.stderr,
        )
        raise typer.Exit(1)


@app.command()
def table(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Folders or .jsonl files of zsq compare.", show_default=False),
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,...", help="Rows of that protocol, method, bits ...; may be repeated."),
    ] = None,
    update: Annotated[
        bool,
        typer.Option(
            "--update", help="PATHs are Markdown files: make their tables anew, between <!-- zsq table ... -->"
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the tables of comparisons as Markdown."""
    from zsq.core.run import save_atomically
    from zsq.rows import read_rows
    from zsq.table import facts, markdown, select, tables, updated

    if update:
        for path, text in [(path, updated(path)) for path in paths]:
            if text != path.read_text():
                save_atomically(path, text.encode())
                print(f"updated {path}")
        return
    made = tables(select([row for path in paths for row in read_rows(path)], only or []))
    if as_json:
        _print_json(facts(made))
    else:
        print(markdown(made))


@app.command()
def layers(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.", show_default=False)],
    images: Annotated[
        Literal["own", "held-out"],
        typer.Option(help="The images that the run made, or others that no method makes."),
    ] = "held-out",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Show which layers of a run hurt, and by how much.

    Of each layer: the signal-to-noise ratio of its output, what is lost where it alone is quantized, and its ranges.
    """
    from dataclasses import asdict

    from zsq.layers import layers_of

    _use_threads(threads)
    found = layers_of(run, images)
    if as_json:
        _print_json(asdict(found))
    else:
        print("\n".join(_layer_lines(found)))


@app.command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RUN|DIR", help="A finished run folder, or one of zsq compare.", show_default=False),
    ],
    out: Annotated[Path | None, typer.Option(help="The file; report.html in the folder by default.")] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about a run or a comparison.

    It holds everything it shows and asks for nothing from anywhere.
    """
    from zsq.report import write_report

    _use_threads(threads)
    path = write_report(folder, out)
    size = path.stat().st_size
    if as_json:
        _print_json({"out": str(path), "bytes": size})
    else:
        print(f"wrote {path} ({size:,} bytes)")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.", show_default=False)],
    target: Annotated[str, typer.Option(help="ort-x86, openvino, tensorrt or pt2e-x86.")] = "ort-x86",
    out: Annotated[Path | None, typer.Option(help="The file; RUN/TARGET with its suffix by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's low-bit network for a runtime.

    Says first what will compute in integers there, what will not and why, and which speed to expect.
    """
    from zsq.api import plan_export

    plan = plan_export(run, target)
    path = out or run / f"{plan.target.name}{plan.target.suffix}"
    if not as_json:
        with contextlib.suppress(BrokenPipeError):  # a reader that has seen enough, head for one, still wants the file
            print("\n".join([f"target {plan.target.name}", *plan.lines()]), flush=True)
    plan.write(path, force)
    size = sum(each.stat().st_size for each in plan.files(path))
    if as_json:
        facts = {"target": plan.target.name, "integer": list(plan.integer), "float": dict(plan.floating)}
        _print_json({**facts, "out": str(path), "bytes": size})
    else:
        print(f"wrote {path} ({size:,} bytes)")


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An .onnx file of zsq export.", show_default=False)],
    run: Annotated[Path, typer.Option(metavar="RUN", help="The run folder that it was exported from.")],
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    threads: FileThreads = 1,
    as_json: AsJson = False,
) -> None:
    """Prove that an exported file is right.

    Looks at its integers, at the kernels that ONNX Runtime and OpenVINO take, and at what both compute beside the
    simulation and the float network. Exit code 1 if anything failed; every fault has a sentence.
    """
    from dataclasses import asdict

    from zsq.runtime.verify import verify

    _use_threads(threads)
    with _progress() as reporter:
        found = verify(file, run, data=data, threads=threads, **_reporting(reporter))
    if as_json:
        _print_json({"file": str(file), "passed": found.passed, "threads": threads, **asdict(found)})
    else:
        print("\n".join(_verification(found)))
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def benchmark(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An .onnx or .xml file.", show_default=False)],
    float_file: Annotated[
        Path | None, typer.Option("--float", metavar="FLOATFILE", help="The same network in float, as .onnx.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Instead of --float: the run folder of the file, for its teacher."),
    ] = None,
    threads: FileThreads = 1,
    as_json: AsJson = False,
) -> None:
    """Measure what an exported file costs.

    Bytes, milliseconds at batch 1 and 8, and memory, beside the float file in interleaved runs on the same runtime.
    """
    if (float_file is None) == (run is None):
        raise typer.BadParameter("give either --float FLOATFILE or --run RUN: speed is a ratio to the float file")
    import tempfile
    from dataclasses import asdict

    from zsq.api import load
    from zsq.runtime.benchmark import benchmark
    from zsq.runtime.files import runtimes_of
    from zsq.runtime.floats import export_float

    runtimes_of(file)  # before the float file is made
    with tempfile.TemporaryDirectory() as folder, _progress() as reporter:
        beside = float_file
        if run is not None:
            beside = Path(folder) / "float.onnx"
            export_float(load(run)[1], beside)
        assert beside is not None
        found = benchmark(file, beside, threads=threads, **_reporting(reporter))
    if as_json:
        _print_json(asdict(found))
    else:
        print("\n".join(_costs(found)))


def _print_version(asked: bool) -> None:
    if asked:
        print(f"zsq {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# --- what is said -------------------------------------------------------------------------------------------------


def _fail(message: str) -> int:
    print(f"zsq: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"zsq: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _print_json(facts: Any) -> None:
    print(json.dumps(facts, indent=1))


def _table(rows: list[list[str]]) -> list[str]:
    """The rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) or "-" if isinstance(value, list) else str(value or "-")


def _facts(method: "Method") -> dict[str, Any]:
    from zsq.api import protocol_of
    from zsq.core import ALWAYS, NoData, needs

    synthesizer = method.synthesizer
    return {
        "method": method.name,
        "needs": sorted(needs(method) - ALWAYS),
        "trains": method.trains,
        "images": "" if isinstance(synthesizer, NoData) else type(synthesizer).__name__,
        "title": method.paper.title,
        "venue": method.paper.venue,
        "arxiv": method.paper.arxiv,
        "confidence": method.paper.confidence,
        "protocol": protocol_of(method).name,
        "presets": ["paper", *method.presets],
    }


def _hosts(plugin: str) -> list[str]:
    """The systems that ``plugin`` takes as a host."""
    from zsq.core import RecipeError
    from zsq.methods import METHODS, PLUGINS

    taken = []
    for name, method in METHODS.items():
        with contextlib.suppress(RecipeError):
            PLUGINS[plugin](method)
            taken.append(name)
    return [name for name in taken if name != plugin]


def _summary(metrics: dict[str, Any], out: Path) -> list[list[str]]:
    """The facts of a finished run as rows of a table."""
    rows = [[name, str(metrics[name])] for name in ("model", "method", "bits", "protocol", "effort", "seed")]
    if metrics["preset"] != "paper":
        rows.append(["preset", metrics["preset"]])
    if metrics["precision"] != "float32":
        rows.append(["precision", metrics["precision"]])
    rows += [["set", f"{path}={value}"] for path, value in metrics["overrides"].items()]
    rows += _accuracy_rows(metrics["accuracy"]) if "accuracy" in metrics else [["accuracy", "not measured: no --data"]]
    rows += _estimate_rows(metrics) if "estimate" in metrics else []
    left, size, seconds = metrics["float_tensors"], metrics["bytes"], metrics["seconds"]
    names = f" ({', '.join(left)})" if 0 < len(left) <= 6 else ""
    rows.append(["left in float", f"{len(left)} tensors{names}"])
    rows += [["untraced", f"{name}: {reason}"] for name, reason in metrics["untraced"].items()]
    ratio = size["float"] / size["packed"]
    rows.append(["bytes", f"{size['float']:,} -> {size['packed']:,} ({ratio:.2f}x smaller)"])
    stages = ", ".join(f"{stage} {spent:.1f}" for stage, spent in seconds.items())
    rows.append(["seconds", f"{sum(seconds.values()):.1f} ({stages})"])
    rows.append(["peak memory", f"{metrics['peak_memory_mb']:,} MB"])
    return [*rows, ["run folder", str(out)]]


def _accuracy_rows(accuracy: dict[str, Any]) -> list[list[str]]:
    exact, low = accuracy["float"], accuracy["quantized"]
    return [
        ["float", f"top-1 {exact['top1']:.2f} %, top-5 {exact['top5']:.2f} %"],
        ["quantized", f"top-1 {low['top1']:.2f} %, top-5 {low['top5']:.2f} %"],
        ["drop", f"{accuracy['drop']:.2f} points"],
        ["agreement", f"{low['agreement']:.2f} % of {low['images']} images"],
    ]


def _estimate_rows(metrics: dict[str, Any]) -> list[list[str]]:
    from zsq.estimate import in_words

    sources = metrics["estimate"]["sources"].items()
    counted = [f"{each['agreement']:.1f} % of {each['images']} {name}" for name, each in sources]
    return [["estimate", in_words(metrics)], ["", f"agrees with the teacher on {', '.join(counted)}"]]


def _verification(found: "Verification") -> list[str]:
    """The checks, one fault a line, and the numbers of each set of images."""
    about = found.about
    rows = [["file", "", f"{found.file} ({about['target']}, {about['method']} {about['bits']}, seed {about['seed']})"]]
    verdicts = {True: "pass", False: "FAIL", None: "-"}
    for check in found.checks:
        rows += [
            [check.name if index == 0 else "", verdicts[check.passed], say] for index, say in enumerate(check.says)
        ]
    lines = _table(rows)
    for name, distances in found.numbers.items():
        header = ["", "SNR to simulation", "SNR to float", "largest difference", "agrees", "agrees with float", "top-1"]
        lines += ["", *_table([[name, *header[1:]], *(_numbers_row(each) for each in distances)])]
    return [*lines, "", "verified" if found.passed else "FAILED"]


def _numbers_row(each: "Distance") -> list[str]:
    decibels = ["equal" if snr >= 200 else f"{snr:.1f} dB" for snr in (each.snr_simulation, each.snr_float)]
    shares = [f"{share:.2f} %" for share in (each.agrees_simulation, each.agrees_float)]
    return [each.name, *decibels, f"{each.largest:.3g}", *shares, "-" if each.top1 is None else f"{each.top1:.2f} %"]


def _layer_lines(found: "Layers") -> list[str]:
    """The layers in order, and those that hurt most."""
    rows = [["layer", "kind", "weight", "input", "output SNR", "weight SNR", "alone, KL", "alone, agrees", "clipped"]]
    for layer in found.layers:
        bits = ["float" if each is None else f"{each} bits" for each in (layer.weight_bits, layer.input_bits)]
        noise = ["-" if each is None else f"{each:.1f} dB" for each in (layer.snr, layer.weight_snr)]
        alone = ["-" if layer.kl is None else f"{layer.kl:.2g}"]
        shares = ["-" if each is None else f"{each:.2f} %" for each in (layer.agreement, layer.clipped)]
        rows.append([layer.name, layer.kind, *bits, *noise, *alone, *shares])
    if found.aligned:
        note = "The method moved scales between channels: SNR is up to scale and offset, and none is quantized alone."
    else:
        total = sum(layer.kl or 0 for layer in found.layers) or 1
        shares = [f"{layer.name} ({100 * (layer.kl or 0) / total:.0f} %)" for layer in found.worst[:3]]
        note = f"Hurt most, of the divergence that layers cause alone: {', '.join(shares)}."
    whole = f"all layers: {found.snr:.1f} dB at the logits, KL {found.kl:.2g}, agrees on {found.agreement:.1f} %"
    return [*_table(rows), "", f"{whole} of {found.images} {found.source} images", note]


def _costs(found: "Benchmark") -> list[str]:
    """Sizes, times and memory, each beside the float file."""
    from zsq.runtime.sessions import NAMES

    share = found.bytes / found.float_bytes
    lines = [f"{found.file}: {found.bytes:,} bytes, the float file {found.float_bytes:,} ({share:.3f} of it)"]
    header = ["runtime", "batch", "ms", "float ms", "times faster", "images/s", "float in bfloat16, ms"]
    rows = [
        [
            NAMES[each.runtime],
            str(each.batch),
            *(f"{number:.2f}" for number in (each.milliseconds, each.float_milliseconds, each.ratio)),
            f"{each.images_per_second:.0f}",
            "-" if each.bfloat16_milliseconds is None else f"{each.bfloat16_milliseconds:.2f}",
        ]
        for each in found.timings
    ]
    lines += [f"threads: {found.threads}; medians of interleaved runs", "", *_table([header, *rows]), ""]
    memory = [[NAMES[m.runtime], f"{m.bytes >> 20} MB", f"{m.float_bytes >> 20} MB"] for m in found.memory]
    return [*lines, *_table([["peak memory", "file", "float file"], *memory])]


class _Line:
    """A Reporter: one line on the terminal that shows the loop that runs."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress
        self._task = progress.add_task("start", total=None)

    def progress(self, label: str, done: int, count: int) -> None:
        self._progress.update(self._task, description=label, completed=done, total=count)


@contextlib.contextmanager
def _progress() -> Iterator["Reporter | None"]:
    """A reporter that draws on stderr if that is a terminal, and leaves nothing behind."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Line(progress)


def _reporting(reporter: "Reporter | None") -> dict[str, Any]:
    return {} if reporter is None else {"progress": reporter.progress}


# --- what was typed -----------------------------------------------------------------------------------------------


def _overrides(settings: list[str] | None) -> dict[str, Any]:
    """``path=value`` as a mapping; a value that is no Python literal is text."""
    overrides: dict[str, Any] = {}
    for setting in settings or []:
        path, equals, value = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"--set {setting}: write path=value, such as synthesizer.steps=500")
        try:
            overrides[path] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            overrides[path] = value
    return overrides


def _network_settings(
    checkpoint: Path | None, input_shape: str | None, mean: str | None, std: str | None
) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint,
        "input_shape": _numbers("--input-shape", input_shape, int, "3,32,32"),
        "mean": _numbers("--mean", mean, float, "0.5,0.5,0.5"),
        "std": _numbers("--std", std, float, "0.5,0.5,0.5"),
    }


def _numbers(
    option: str, text: str | None, kind: Callable[[str], int | float], example: str
) -> tuple[int | float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(number) for number in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{option} {text}: write numbers with commas, such as {example}") from None


def _list(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _write_images(made: "Batch", network: "Network", out: Path) -> None:
    """An ``.npz`` with ``x``, ``mean``, ``std`` and, for labelled images, ``y``; or PNGs.

    PNGs lie in one folder a class if they have labels.
    """
    import io

    import numpy as np
    from PIL import Image

    from zsq.api import to_pixels
    from zsq.core.run import save_atomically

    pixels = to_pixels(made.images, network).numpy()  # (N, H, W, C)
    labels = None if made.labels is None else made.labels.cpu().numpy()
    if out.suffix == ".npz":
        arrays: dict[str, np.ndarray[Any, Any]] = {"x": pixels} if labels is None else {"x": pixels, "y": labels}
        arrays |= {"mean": np.array(network.mean), "std": np.array(network.std)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        save_atomically(out, buffer.getvalue())
        return
    for index, image in enumerate(pixels):
        buffer = io.BytesIO()
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
        folder = out if labels is None else out / f"{labels[index]:04d}"
        save_atomically(folder / f"{index:06d}.png", buffer.getvalue())
