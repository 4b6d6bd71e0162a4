"""Summary of what was read of a source, and what was not, for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

SHOWN = 4


@dataclass
class Reading:
    """Filled while a source is read.

    files: read, in order. split: the split of the source that they are of, if it has splits. left_out: why, and which
    files. documents: with text; chats of them are chats, and masked ones have no token that counts. empty: places of
    rows without text. unused: keys and columns that nobody read, with the number of rows that have them. unclear:
    assistant turns that could not be told from the text around them. tokens: packed; counted: tokens that count in the
    loss. complete: false if reading stopped because there were enough tokens.
    """

    source: str
    files: list[str] = field(default_factory=list)
    split: str | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)
    documents: int = 0
    chats: int = 0
    masked: int = 0
    empty: list[str] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)
    unclear: int = 0
    tokens: int = 0
    counted: int = 0
    complete: bool = True

    def lines(self) -> list[str]:
        """The record in sentences, one a line."""
        split = "" if self.split is None else f", {self.split} split"
        files = f"{count(len(self.files), 'file')}: {some(self.files)}" if self.files else "no file"
        lines = [f"{self.source}{split}: read {files}"]
        lines += [f"left out ({reason}): {some(names)}" for reason, names in self.left_out.items()]
        kinds = f" ({count(self.chats, 'chat')})" if self.chats else ""
        share = self.counted / self.tokens if self.tokens else 0.0
        counting = "" if self.counted == self.tokens else f", {share:.1%} of them count in the loss"
        enough = "" if self.complete else "; reading stopped there, since that is enough"
        lines.append(f"{count(self.documents, 'document')}{kinds}, {count(self.tokens, 'token')}{counting}{enough}")
        if self.empty:
            lines.append(f"left out {count(len(self.empty), 'row')} without text: {some(self.empty)}")
        if self.masked:
            lines.append(f"{count(self.masked, 'document')} without a token that counts in the loss")
        if self.unclear:
            lines.append(f"{count(self.unclear, 'assistant turn')} that could not be told apart: they do not count")
        if self.unused:
            named = [f"{key} ({count(rows, 'row')})" for key, rows in self.unused.most_common()]
            lines.append(f"not used: {some(named)}")
        return lines


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def some(names: list[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
