"""Files for runtimes: write one, prove it, time it."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zsq.cli.options import DATA_HELP, AsJson, FileThreads, use_threads
from zsq.cli.text import aligned, print_json, progress_on_terminal, reporting

if TYPE_CHECKING:
    from zsq.runtime.benchmark import Benchmark
    from zsq.runtime.numerics import Distance
    from zsq.runtime.verify import Verification


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
        print_json({**facts, "out": str(path), "bytes": size})
    else:
        print(f"wrote {path} ({size:,} bytes)")


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

    use_threads(threads)
    with progress_on_terminal() as reporter:
        found = verify(file, run, data=data, threads=threads, **reporting(reporter))
    if as_json:
        print_json({"file": str(file), "passed": found.passed, "threads": threads, **asdict(found)})
    else:
        print("\n".join(_verification(found)))
    if not found.passed:
        raise typer.Exit(1)


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
    with tempfile.TemporaryDirectory() as folder, progress_on_terminal() as reporter:
        beside = float_file
        if run is not None:
            beside = Path(folder) / "float.onnx"
            export_float(load(run)[1], beside)
        assert beside is not None
        found = benchmark(file, beside, threads=threads, **reporting(reporter))
    if as_json:
        print_json(asdict(found))
    else:
        print("\n".join(_costs(found)))


def _verification(found: "Verification") -> list[str]:
    """The checks, one fault a line, and the numbers of each set of images."""
    about = found.about
    rows = [["file", "", f"{found.file} ({about['target']}, {about['method']} {about['bits']}, seed {about['seed']})"]]
    verdicts = {True: "pass", False: "FAIL", None: "-"}
    for check in found.checks:
        rows += [
            [check.name if index == 0 else "", verdicts[check.passed], say] for index, say in enumerate(check.says)
        ]
    lines = aligned(rows)
    for name, distances in found.numbers.items():
        header = ["", "SNR to simulation", "SNR to float", "largest difference", "agrees", "agrees with float", "top-1"]
        lines += ["", *aligned([[name, *header[1:]], *(_numbers_row(each) for each in distances)])]
    return [*lines, "", "verified" if found.passed else "FAILED"]


def _numbers_row(each: "Distance") -> list[str]:
    decibels = ["equal" if snr >= 200 else f"{snr:.1f} dB" for snr in (each.snr_simulation, each.snr_float)]
    shares = [f"{share:.2f} %" for share in (each.agrees_simulation, each.agrees_float)]
    return [each.name, *decibels, f"{each.largest:.3g}", *shares, "-" if each.top1 is None else f"{each.top1:.2f} %"]


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
    lines += [f"threads: {found.threads}; medians of interleaved runs", "", *aligned([header, *rows]), ""]
    memory = [[NAMES[m.runtime], f"{m.bytes >> 20} MB", f"{m.float_bytes >> 20} MB"] for m in found.memory]
    return [*lines, *aligned([["peak memory", "file", "float file"], *memory])]
