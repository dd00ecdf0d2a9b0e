"""What shows how good a run is: comparisons, their tables, the layers, pages to look at."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from zsq.cli.options import (
    DATA_HELP,
    FORMS,
    AsJson,
    Checkpoint,
    Device,
    EffortName,
    InputShape,
    Mean,
    Std,
    Threads,
    read_names,
    read_network,
    read_numbers,
    use_threads,
)
from zsq.cli.text import aligned, print_json, progress_on_terminal

if TYPE_CHECKING:
    from zsq.layers import Layers


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
    settings = read_network(checkpoint, input_shape, mean, std)
    numbers = read_numbers("--seeds", seeds, int, "0,1,2")
    if engine == "local" and workers > 1:
        raise typer.BadParameter("--engine local has one worker: give --engine processes, or leave --workers away")
    if engine != "ray" and address is not None:
        raise typer.BadParameter(f"--address is that of a Ray cluster: give --engine ray, not {engine}")
    from zsq.compare import Grid, compare, plan
    from zsq.engines import Engine, InProcess, OnRay, Processes
    from zsq.table import facts, markdown, tables

    grid = Grid(
        models=models,
        methods=read_names(methods),
        bits=read_names(bits),
        protocols=(None,) if protocol is None else read_names(protocol),
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
            print_json(known)
        else:
            rows = aligned([[cell, status] for cell, status in known.items()])
            print("\n".join([*rows, "", f"{len(found.due)} of {len(known)} cells to do"]))
        return
    use_threads(threads)
    place: Engine = InProcess()
    if engine == "processes":
        place = Processes(workers=workers, threads=threads)
    elif engine == "ray":
        place = OnRay(workers=workers, threads=threads, address=address)
    with progress_on_terminal() as reporter:
        found = compare(grid, out, engine=place, reporter=reporter)
    made = tables(found.rows.values())
    if as_json:
        print_json(facts(made))
    else:
        print(markdown(made))
    if found.failed:
        names = ", ".join(row["cell"] for row in found.failed)
        print(
            f"zsq: {len(found.failed)} of {len(found.cells)} cells failed, the same command tries them again: {names}",
            file=sys.stderr,
        )
        raise typer.Exit(1)


def table(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Folders or .jsonl files of zsq compare.", show_default=False),
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,...", help="Rows of that protocol, method, bits ...; may be repeated."),
    ] = None,
    only_brief: Annotated[
        bool, typer.Option("--brief", help="Accuracies alone, of all protocols in one table.")
    ] = False,
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
    from zsq.table import brief, facts, markdown, select, tables, updated

    if update:
        for path, text in [(path, updated(path)) for path in paths]:
            if text != path.read_text():
                save_atomically(path, text.encode())
                print(f"updated {path}")
        return
    made = tables(select([row for path in paths for row in read_rows(path)], only or []))
    if as_json:
        print_json(facts(made))
    else:
        print(brief(made) if only_brief else markdown(made))


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

    use_threads(threads)
    found = layers_of(run, images)
    if as_json:
        print_json(asdict(found))
    else:
        print("\n".join(_layer_lines(found)))


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

    use_threads(threads)
    path = write_report(folder, out)
    size = path.stat().st_size
    if as_json:
        print_json({"out": str(path), "bytes": size})
    else:
        print(f"wrote {path} ({size:,} bytes)")


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
    return [*aligned(rows), "", f"{whole} of {found.images} {found.source} images", note]
