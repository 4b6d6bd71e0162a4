"""The grid that some rows of a tensor lie on, judged from a sample; `recover` then says it of every block.

Blocks of 32 with few bits leave the quantizer's fingerprint: which code the extremum has, and whether scales may
be negative. A scale that clips its block cannot be told from absmax / 8 for certain: it leaves more codes
of -8, and by their number the two are named. Names are for people; what is recovered does not depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from intaglio.numerics.grid import INT2, INT4, INT8
from intaglio.numerics.recover import Rule, blocks_of, guesses_that_hold

BLOCK = 32
LATENT = "latent"
NAMES = {
    "extremum-8": "block 32, extremum / -8",
    "absmax-8": "block 32, absmax / 8",
    "absmax-7.5": "block 32, absmax / 7.5",
    "absmax-7": "block 32, absmax / 7",
    "free": "block 32, free scale",
    "int2": "int2 per row",
    "int4": "int4 per row",
    "int8": "int8 per row",
    LATENT: "latent",
}
BLOCK_RULE = Rule(code_min=-8, code_max=7, signed=True, peaks=(8, 7, 6, 5, 4, 3, 2, 1))
# Any smaller peak of eight bits is also twice or more of itself, with a finer step.
ROW_RULES = {
    "int2": Rule(code_min=INT2.code_min, code_max=INT2.code_max, peaks=(2, 1)),
    "int4": Rule(code_min=INT4.code_min, code_max=INT4.code_max, peaks=(8, 7, 6, 5, 4, 3, 2, 1)),
    "int8": Rule(code_min=INT8.code_min, code_max=INT8.code_max, peaks=tuple(range(127, 63, -1))),
}
ROW_GRIDS = {"int2": INT2, "int4": INT4, "int8": INT8}
SHORTEST_ROW = 64  # a row of one block is a block
ROWS_TRIED, FEW_ROWS, COLUMNS_TRIED = 16, 2, 1024
BLOCKS_TRIED = 1024  # if none of so many lies on a grid, the tensor is latent
# With so many values other than zero, one by one within a few hundredths of a step, chance is out of the question.
TELLING = 8
EXCEPTIONS = 1e-3  # of a rule: blocks that rounding pushed over an edge
SEVERAL_LOWEST = 0.01  # of the blocks with a code -8, those with two: by absmax / 7.5 only where values tie
MANY_LOWEST = (
    0.16  # the same: 0.10 to 0.14 by absmax / 8, 0.17 and more where scales clip, of normal and Laplace weights
)


@dataclass(frozen=True)
class Hypothesis:
    """name: key of NAMES. rule: with the likeliest guesses first. width: columns that share a scale."""

    name: str
    rule: Rule
    width: int

    @property
    def by_row(self) -> bool:
        return self.name in ROW_RULES


def identify(sample_RC: Tensor, slice_columns: int | None = None) -> Hypothesis | None:
    """The grid of a tensor that these are some rows of; None if none of their blocks lies on one.

    slice_columns: width of the slices with a scale each that rows may consist of.
    """
    columns = sample_RC.shape[1]
    by_row = [
        found
        for width in dict.fromkeys((columns, slice_columns or columns))
        if width >= SHORTEST_ROW and columns % width == 0
        for found in [_row_grid(sample_RC.reshape(-1, width))]
        if found is not None
    ]
    share, rows = max(by_row, key=lambda found: found[0], default=(0.0, None))
    if share == 1 or columns % BLOCK:
        return rows
    blocks = _block_grid(sample_RC)
    # short rows of few blocks may lie on an int8 grid by chance, and rows of a mixed tensor on none
    return rows if blocks is None or share > blocks[0] else blocks[1]


def _row_grid(rows_RK: Tensor) -> tuple[float, Hypothesis] | None:
    """The grid that explains most rows of a few, and the share of these; the one with fewer bits where they tie."""
    width = rows_RK.shape[1]
    rows = rows_RK[:: max(1, len(rows_RK) // ROWS_TRIED)][:ROWS_TRIED]
    rows = rows[_telling(rows)][:, :COLUMNS_TRIED]
    best: tuple[float, Hypothesis] | None = None
    for name, rule in ROW_RULES.items():
        few = [row for row in rows[:FEW_ROWS] if len(row.abs().unique()) <= 1 - rule.code_min]  # a magnitude a code
        if not few or not bool(guesses_that_hold(torch.stack(few), rule).any()):
            continue
        share = float(guesses_that_hold(rows, rule).any(0).float().mean())
        if best is None or share > best[0]:
            best = share, Hypothesis(name, rule, width)
    return best


def _telling(values_NK: Tensor) -> Tensor:
    """Mask of informative blocks. One number repeated, or a few among zeros, fits every grid."""
    return ((values_NK != 0).sum(1) >= TELLING) & (values_NK.amin(1) != values_NK.amax(1))


def _block_grid(sample_RC: Tensor) -> tuple[float, Hypothesis] | None:
    """Share of the blocks that lie on a grid, and the grid."""
    blocks = blocks_of(sample_RC, BLOCK)
    blocks = blocks[_telling(blocks)]
    first = torch.arange(len(blocks)) % max(1, len(blocks) // BLOCKS_TRIED) == 0  # from all over
    held = guesses_that_hold(blocks[first], BLOCK_RULE)
    if not bool(held.any()):
        return None
    blocks, likely = torch.cat([blocks[first], blocks[~first]]), held.any(1)
    peaks = tuple(peak for peak, it_is in zip(BLOCK_RULE.peaks, likely.tolist(), strict=True) if it_is)
    held = torch.cat([held, torch.zeros(len(likely), len(blocks) - held.shape[1], dtype=torch.bool)], 1)
    held[likely, int(first.sum()) :] = guesses_that_hold(blocks[int(first.sum()) :], replace(BLOCK_RULE, peaks=peaks))
    clear = held.sum(0) == 1  # where one guess alone holds, it tells of the rule
    if not bool(clear.any()):
        clear = held.any(0)
    found, blocks = held[:, clear].int().argmax(0), blocks[clear].float()
    peak = torch.tensor(BLOCK_RULE.peaks)[found]
    name, signed = _name(peak, blocks)
    counts = torch.bincount(peak, minlength=9)
    by_share = sorted(BLOCK_RULE.peaks, key=lambda magnitude: -int(counts[magnitude]))
    preferred = {"extremum-8": [8], "absmax-7": [7], "absmax-8": [8, 7], "absmax-7.5": [8, 7], "free": by_share}[name]
    peaks = tuple(dict.fromkeys([*preferred, *BLOCK_RULE.peaks]))
    share = float(held.any(0).float().mean())
    return share, Hypothesis(name, replace(BLOCK_RULE, signed=signed, peaks=peaks), BLOCK)


def _name(peak: Tensor, blocks_NK: Tensor) -> tuple[str, bool]:
    """Name of the rule that gave the extrema of these blocks these codes; whether its scales may be negative."""
    top = blocks_NK.abs().amax(1)
    positive = blocks_NK.amax(1) == top  # the extremum, or one that ties with it
    at_eight = peak == 8

    def share(which: Tensor) -> float:
        return float(which.float().mean())

    signed = share(at_eight & positive) > EXCEPTIONS
    if share(~at_eight) <= EXCEPTIONS:
        return "extremum-8", True
    if signed:
        return "free", True
    if share(peak != 7) <= EXCEPTIONS:
        return "absmax-7", False
    lowest = (blocks_NK / (top / peak).unsqueeze(1)).round() == -8
    several = share((lowest.sum(1) > 1)[at_eight])
    if share(peak < 7) > EXCEPTIONS:
        return "free", False
    if several < SEVERAL_LOWEST:
        return "absmax-7.5", False
    below = share((peak == 7) & ~positive) > EXCEPTIONS
    return ("free" if below or several > MANY_LOWEST else "absmax-8"), False
