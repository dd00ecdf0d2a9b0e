"""What there is: methods, models, recipes, and what distinguishes two of them."""

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsq.cli.options import FORMS, AsJson, EffortName, Preset
from zsq.cli.text import aligned, print_json

if TYPE_CHECKING:
    from zsq.core import Method


def methods(as_json: AsJson = False) -> None:
    """List the systems, the controls and the plug-ins."""
    from zsq.methods import BASELINES, METHODS, PLUGINS

    systems, controls = ([_facts(method) for method in group.values()] for group in (METHODS, BASELINES))
    hosts = {plugin: _hosts(plugin) for plugin in PLUGINS}
    if as_json:
        plugins = [{"plugin": plugin, "hosts": taken} for plugin, taken in hosts.items()]
        print_json({"methods": systems, "controls": controls, "plugins": plugins})
        return
    header = ("method", "needs", "trains", "images", "venue", "confidence", "protocol")
    rows = [[_cell(facts[name]) for name in header] for facts in (*systems, *controls)]
    lines = aligned([list(header), *rows])
    first = 1 + len(systems)
    plugged = aligned([[plugin, f"on {', '.join(taken)}"] for plugin, taken in hosts.items()])
    blocks = [*lines[:first], "", "controls", *lines[first:], "", "plug-ins, written NAME+HOST", *plugged]
    print("\n".join(blocks))


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


def diff(
    a: Annotated[str, typer.Argument(metavar="A", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", show_default=False)],
) -> None:
    """Print what distinguishes two methods."""
    from zsq.api import find_method
    from zsq.core import diff

    if lines := diff(find_method(a), find_method(b)):
        print(lines)


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
        print_json({"zoo": facts, "forms": FORMS})
        return
    rows = [["model", "input", "classes", "parameters", "top-1", "trained on"]]
    for fact in facts:
        accuracy = "-" if fact["top1"] is None else f"{fact['top1']:.2f} %"
        shape = "x".join(map(str, fact["input_shape"]))
        rows.append([fact["model"], shape, str(fact["classes"]), f"{fact['parameters']:,}", accuracy, fact["data"]])
    print("\n".join([*aligned(rows), "", f"A MODEL is {FORMS}."]))


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
