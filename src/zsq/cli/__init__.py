"""The command line: aligned text for people, ``--json`` for programs, one line and exit code 2 for every mistake.

Everything heavy is imported inside the commands, so that ``zsq --help`` answers at once.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from zsq.allocator import keep_freed_memory
from zsq.cli.catalogue import diff, methods, models, show
from zsq.cli.evidence import compare, layers, report, table
from zsq.cli.files import benchmark, export, verify
from zsq.cli.runs import evaluate, quantize, synthesize
from zsq.torchrun import joined
from zsq.version import __version__

__all__ = ["app", "main"]

COMMANDS = (
    methods,
    show,
    diff,
    models,
    quantize,
    synthesize,
    evaluate,
    compare,
    table,
    layers,
    report,
    export,
    verify,
    benchmark,
)

app = typer.Typer(
    name="zsq",
    help="Zero-shot quantization: a pretrained vision network and no data in, a low-bit network out.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for function in COMMANDS:
    app.command()(function)


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


def _fail(message: str) -> int:
    print(f"zsq: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"zsq: warning: {' '.join(str(message).split())}", file=sys.stderr)
