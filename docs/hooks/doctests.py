"""Doctests in docstrings become code blocks; Markdown would read ``>>>`` as three quotations."""

import re

import griffe

DOCTEST = re.compile(r"(?:^>>> .*\n?)(?:^(?!\s*$).+\n?)*", re.MULTILINE)


def fenced(text: str) -> str:
    """``text`` with each doctest between fences.

    >>> print(fenced("Twice.\\n\\n>>> 1 + 1\\n2"))
    Twice.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    return DOCTEST.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```", text)


class Doctests(griffe.Extension):
    """Applied to every docstring that is collected."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Change the docstring of one object in place."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
