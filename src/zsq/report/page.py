"""A page from what is in a folder."""

from pathlib import Path

from torch import nn

from zsq.core import MissingExtra, RunError
from zsq.core.run import save_atomically
from zsq.nets.load import Network
from zsq.report.comparison import comparison
from zsq.report.run import run_facts
from zsq.rows import FILE
from zsq.version import __version__

__all__ = ["write_report"]


def write_report(
    folder: str | Path, out: str | Path | None = None, model: str | nn.Module | Network | None = None
) -> Path:
    """Write one HTML file about the run, or the comparison, in ``folder``, and return where: ``report.html`` in there.

    The file asks for nothing from anywhere. ``model`` is needed if a run was made from a module in memory.

    Raises:
        MissingExtra: if jinja2 is not installed.
        RunError: if the folder holds neither, or the file cannot be written.
        ZsqError: as ``zsq.load`` says.
    """
    folder = Path(folder)
    path = folder / "report.html" if out is None else Path(out)
    if path.is_dir():
        raise RunError(f"{path} is a folder: name the file to write, such as {path / 'report.html'}")
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra("a report needs jinja2: pip install 'zsq[report]'") from error
    template, facts = (
        ("comparison.html", comparison(folder)) if (folder / FILE).exists() else ("run.html", run_facts(folder, model))
    )
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("zsq.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text: str = pages.get_template(template).render(version=__version__, **facts)
    save_atomically(path, text.encode())
    return path
