"""The reference gives each parameter that a docstring explains ("data: the text. device: where ...") its own line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import griffe


class Parameters(griffe.Extension):
    """Begins a paragraph at names of parameters, or of a class's fields, before a colon; and at errors."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """A function's parameters."""
        _set_apart(func, [parameter.name for parameter in func.parameters])

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Fields of a dataclass, or parameters of `__init__`."""
        made = cls.members.get("__init__")
        given = [parameter.name for parameter in made.parameters] if isinstance(made, griffe.Function) else []
        _set_apart(cls, [*given, *(name for name, member in cls.members.items() if member.is_attribute)])


def _set_apart(documented: griffe.Function | griffe.Class, names: Iterable[str]) -> None:
    if documented.docstring is not None and (name := "|".join(map(re.escape, names))):
        found = rf"(?:^|(?<=[.\n]))\s*((?:{name})(?:,\s(?:{name}))*):\s+"
        text = re.sub(found, r"\n\n**\1**: ", documented.docstring.value)
        documented.docstring.value = re.sub(r"(?<=\.)\s+(?=Raises \w+Error)", "\n\n", text).strip()
