"""Recipe: a frozen dataclass that is its own configuration; it prints, compares, and takes dotted overrides."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from difflib import SequenceMatcher, get_close_matches
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from zsq.core.errors import RecipeError

__all__ = ["Recipe", "check_counts", "check_positive", "diff", "needs", "show", "snake", "walk"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An ingredient whose fields are its hyperparameters. It never changes and holds no tensors."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """What must be visible for this ingredient to work: ``"bn"``, ``"labels"``, ``"student"`` ..."""

    def parts(self) -> dict[str, Any]:
        """The values below this one by name: ingredients, tuples of ingredients and plain leaves."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def with_part(self, name: str, value: Any) -> Self:
        """A copy in which the part ``name`` is ``value``."""
        return replace(self, **{name: value})

    def part_type(self, name: str) -> Any:
        """The declared type of the part ``name``, against which an override is checked."""
        return get_type_hints(type(self))[name]

    def override(self, changes: Mapping[str, Any]) -> Self:
        """A copy with the values at dotted paths replaced, e.g. ``{"synthesizer.steps": 500}``.

        Raises:
            RecipeError: if a path does not exist or a value does not fit; the message lists what exists.
        """
        recipe = self
        for path, value in changes.items():
            recipe = _set(recipe, path.split("."), value, path)
        return recipe

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """Every plain value with its dotted path, in order: ``("synthesizer.lr", 0.5)``."""
        for path, value in _lines(self, ""):
            if not _children(value):
                yield path, value


def show(recipe: Recipe) -> str:
    """One line a value; a line that names a class says which ingredient the lines below it belong to."""
    return "\n".join(_shown(recipe))


def diff(old: Recipe, new: Recipe) -> str:
    """The lines of ``show`` in which two recipes differ, marked ``-`` and ``+``; empty if they are equal."""
    a, b = _shown(old), _shown(new)
    lines: list[str] = []
    for _, a_start, a_stop, b_start, b_stop in (
        block for block in SequenceMatcher(None, a, b, autojunk=False).get_opcodes() if block[0] != "equal"
    ):
        lines += [f"- {line}" for line in a[a_start:a_stop]]
        lines += [f"+ {line}" for line in b[b_start:b_stop]]
    return "\n".join(lines)


def walk(recipe: Recipe) -> Iterator[Recipe]:
    """``recipe`` and every ingredient below it."""
    yield recipe
    for value in _children(recipe).values():
        for child in (value,) if isinstance(value, Recipe) else _children(value).values():
            yield from walk(child)


def needs(recipe: Recipe) -> frozenset[str]:
    """Everything that ``recipe`` or an ingredient below it needs."""
    return frozenset[str]().union(*(ingredient.needs for ingredient in walk(recipe)))


def check_counts(recipe: Recipe, *names: str) -> None:
    """Raise RecipeError unless every named field is at least 1."""
    for name in names:
        if getattr(recipe, name) < 1:
            raise RecipeError(f"{type(recipe).__name__}.{name} must be at least 1, got {getattr(recipe, name)}")


def check_positive(recipe: Recipe, *names: str) -> None:
    """Raise RecipeError unless every named field is above 0 (not a number is not)."""
    for name in names:
        if not getattr(recipe, name) > 0:
            raise RecipeError(f"{type(recipe).__name__}.{name} must be positive, got {getattr(recipe, name)}")


def snake(name: str) -> str:
    """A class name as a path part.

    >>> snake("InsertFakeQuant"), snake("BNStatistics")
    ('insert_fake_quant', 'bn_statistics')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _children(node: Any) -> dict[str, Any]:
    """What a path can enter below ``node``: the parts of a recipe, or the recipes of a tuple by class name."""
    if isinstance(node, Recipe):
        return node.parts()
    if isinstance(node, tuple) and any(isinstance(child, Recipe) for child in node):
        named = {snake(type(child).__name__): child for child in node}
        if len(named) < len(node):
            raise RecipeError(f"two of one class in a tuple cannot be told apart: {', '.join(named)}")
        return named
    return {}


def _lines(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if path:
        yield path, node
    for name, child in _children(node).items():
        yield from _lines(child, f"{path}.{name}" if path else name)


def _shown(recipe: Recipe) -> list[str]:
    lines = []
    for path, value in _lines(recipe, ""):
        if isinstance(value, Recipe):
            lines.append(f"{path} = {type(value).__name__}")
        elif not _children(value):
            lines.append(f"{path} = {value!r}")
    return lines


def _set(node: Any, keys: list[str], value: Any, path: str) -> Any:
    key, *rest = keys
    children = _children(node)
    if key not in children:
        near = get_close_matches(key, children, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise RecipeError(f"no {key!r} in {path!r}: {_kind(node)} has {', '.join(children) or 'no parts'}{hint}")
    old = children[key]
    if rest:
        new = _set(old, rest, value, path)
    else:
        new = _checked(value, node.part_type(key) if isinstance(node, Recipe) else type(old), path)
    if isinstance(node, Recipe):
        return node.with_part(key, new)
    return tuple(new if child is old else child for child in node)


def _kind(node: Any) -> str:
    return "the list" if isinstance(node, tuple) else type(node).__name__


def _checked(value: Any, hint: Any, path: str) -> Any:
    """``value`` as the declared type ``hint``, or a RecipeError that says what fits."""
    if not _fits(value, hint):
        raise RecipeError(f"{path} must be {_words(hint)}, got {value!r}")
    return float(value) if hint is float else value


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in arguments
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    try:
        return isinstance(value, origin or hint)
    except TypeError:  # a protocol that cannot be checked at run time: any ingredient is a candidate
        return isinstance(value, Recipe)


def _words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (Union, UnionType):
        return " or ".join(map(_words, arguments))
    if origin is tuple:
        return f"a tuple ({', '.join('...' if a is Ellipsis else _words(a) for a in arguments)})"
    named = {float: "a number", int: "a whole number", bool: "True or False", str: "text", NoneType: "None"}
    return named.get(hint, getattr(hint, "__name__", str(hint)))
