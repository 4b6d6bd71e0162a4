"""Turns a report's values into HTML and Markdown: number formats, escaping, templates.

Escaping cannot be forgotten in a template: every string that one prints passes `finalize`. In HTML
that makes control characters visible and autoescape does the rest; in Markdown it also escapes
what Markdown would read as markup. Only `Markup`, which templates and charts make themselves,
passes untouched.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Format characters (Cf) are kept, since emoji and several scripts need joiners, but for those
# that reorder the text around them (Unicode Bidirectional Algorithm, UAX #9, table 4).
REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# No "_" within a word: GitHub's Markdown reads it as itself there, and names are full of it.
# A list or a rule begins so; strings may stand first in a line or in a list item.
MARKDOWN_START = re.compile(r"^(\d{1,9}(?=[.)](\s|$))|(?=[-+=]))")
MARKDOWN_SPECIAL = re.compile(r"([\\`*\[\]<>|~#&$])|(?<![^\W_])_|_(?![^\W_])")


def render_page(name: str, values: Mapping[str, Any]) -> str:
    """The template of this name ("report", "plan", "drafter") as one self-contained page."""
    return _environment("html").get_template(f"{name}.html.j2").render(values)


def render_markdown(values: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    text = _environment("md").get_template("report.md.j2").render(values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def finite(value: Any) -> Any:
    """JSON has no NaN and no Inf: None in their place, at any depth."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def _environment(kind: str) -> Environment:
    environment = Environment(
        loader=PackageLoader("intaglio.measure"),
        autoescape=kind == "html",
        finalize=_finalize_html if kind == "html" else _finalize_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = (nats, with_ci, with_stderr, percent, size, count, duration, decimals, snippet, fence)
    environment.filters |= {function.__name__: function for function in formats}
    return environment


def visible(text: str) -> str:
    """The text with line breaks as "\\n", and control characters, stray surrogates and characters
    that reorder text replaced by a symbol."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    odd = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
    if not odd and character not in REORDERING:
        return character
    return chr(0x2400 + ord(character)) if ord(character) < 0x20 else "\ufffd"  # U+2400: pictures of control codes


def _finalize_html(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _finalize_markdown(value: Any) -> Any:
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    line = " ".join(visible(value).split())
    return MARKDOWN_START.sub(r"\g<0>\\", MARKDOWN_SPECIAL.sub(r"\\\g<0>", line))


def snippet(text: str) -> str:
    """A continuation without the blank lines around it and the one space in front of a word."""
    text = visible(text).strip("\n")
    return text[1:] if text.startswith(" ") and text[1:2].strip() else text


def fence(text: str) -> Markup:
    """A Markdown code block with a fence longer than any run of backticks inside."""
    text = visible(text).rstrip("\n")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    mark = "`" * max(3, longest + 1)
    return Markup(f"{mark}\n{text}\n{mark}")


def decimals(value: float, places: int = 2) -> str:
    """A number of fixed decimals, infinity by its sign."""
    return f"{value:.{places}f}".replace("inf", "∞")


def nats(value: float) -> str:
    """A KL: four decimals, or a power of ten where they would say little."""
    return with_ci(value, None)


def with_ci(value: float, ci: float | None, places: int = 4) -> str:
    """`value ± ci`, or the value alone if there is no interval."""
    if value == 0:
        return "0"
    exponent = int(f"{value:e}".partition("e")[2])
    scientific = exponent < 1 - places
    if scientific:
        value, ci, places = value / 10.0**exponent, ci and ci / 10.0**exponent, 1
    text = f"{value:.{places}f}" if ci is None else f"{value:.{places}f} ± {ci:.{places}f}"
    if scientific:
        text = (f"({text})" if ci is not None else text) + f" × 10{str(exponent).translate(SUPERSCRIPTS)}"
    return text


def with_stderr(value: float, stderr: float | None) -> str:
    """A score with its standard error, or alone if it has none."""
    text = f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"
    return text.replace("-", "−")


def percent(share: float, places: int | None = None) -> str:
    """A share in percent; between 99% and 100% rounded down to a decimal, so that less never reads 100%."""
    if places is None and 0.99 <= share < 1:
        return f"{math.floor(1000 * share) / 10:.1f}%"
    return f"{100 * share:.{places or 0}f}%"


def size(size_bytes: int) -> str:
    """Bytes in decimal units, three digits."""
    value, units = float(size_bytes), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while value >= 999.5 and unit != "GB":
        value, unit = value / 1000, next(units)
    return f"{size_bytes} B" if unit == "B" else f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def count(number: float) -> str:
    """A number of things: 950, 12.3 k, 1.88 B."""
    value, unit = float(number), ""
    for unit in ("", " k", " M", " B"):
        if abs(value) < 999.5 or unit == " B":
            break
        value /= 1000
    return f"{value:.3g}{unit}"


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
