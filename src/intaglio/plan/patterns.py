"""Regular expressions of recipes and of files from others, matched within a time limit.

Python's `re` needs exponential time for some patterns, such as (a+)+b, and cannot be stopped. The `regex`
package, on which transformers depends too, reads the same patterns and takes a time limit. It expands counted
repeats when it compiles a pattern, so these are bounded first.
"""

from __future__ import annotations

import functools
import math
import re
import time
from typing import Any

import regex

from intaglio.errors import InputError, RecipeError

LONGEST = 1 << 16  # characters of a pattern; `convert` writes one with the names of a role's tensors
MOST_REPEATS = 1000  # product of all counts in braces
# Both in time of the processor, which is what regex's timeout counts: a busy machine makes no pattern slow.
SECONDS = 1.0  # for all searches of a pattern that take longer than SLOW
SLOW = 0.005  # a search of a tensor's name takes microseconds
COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")


class Pattern:
    """A compiled regular expression. ValueError for one that is malformed, too long, or repeats too much."""

    def __init__(self, text: str):
        if not isinstance(text, str) or len(text) > LONGEST:
            raise ValueError(f"expected a text of at most {LONGEST} characters")
        try:
            re.compile(text)  # what `re` refuses is refused, although regex has more syntax
            counts = [max([1, *(int(n) for n in match.groups() if n)]) for match in COUNT.finditer(text)]
            if "{" in COUNT.sub("", text).replace(r"\{", "") or math.prod(counts) > MOST_REPEATS:
                raise ValueError(f"expected braces with counts only, whose product is at most {MOST_REPEATS}")
            self.compiled: Any = regex.compile(text)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise ValueError(str(error)) from None
        self.text, self.left = text, SECONDS

    def search(self, text: str, *, error: type[InputError] = RecipeError) -> Any:
        """The first match anywhere in the text, or None. Raises `error` when the pattern's time is used up."""
        return self._timed(self.compiled.search, text, error)

    def match(self, text: str, *, error: type[InputError] = RecipeError) -> Any:
        """The match at the beginning of the text, or None. Raises as `search` does."""
        return self._timed(self.compiled.match, text, error)

    def _timed(self, function: Any, text: str, error: type[InputError]) -> Any:
        began = time.process_time()
        try:
            found = function(text, timeout=max(self.left, SLOW))
        except TimeoutError:
            self.left = 0.0
            raise error(
                f"regular expression {self.text[:80]!r} takes too long on {text[:80]!r}: expected one without repeats "
                "inside repeats, such as (a+)+ or many .*"
            ) from None
        took = time.process_time() - began
        if took > SLOW:
            self.left -= took
        return found


@functools.lru_cache(maxsize=1024)
def pattern(text: str) -> Pattern:
    """The compiled pattern, made once. ValueError as from `Pattern`."""
    return Pattern(text)
