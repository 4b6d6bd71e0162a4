"""Amounts as people write them: 8GB, 15.8 MB, 24 GiB of memory; 32k tokens."""

from __future__ import annotations

import math
import re

from intaglio.errors import InputError

DECIMAL = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+) *([A-Za-z]*)")


def parse_bytes(text: str, what: str) -> int:
    """`8GB` is 8 x 10^9, `8GiB` 8 x 2^30. InputError for anything else: a number without a unit has two meanings."""
    match = AMOUNT.fullmatch(text.strip())
    if match and not match[2]:
        raise InputError(
            f"{what} {text!r}: no unit: expected for example {match[1]}GB (10^9 bytes) or {match[1]}GiB (2^30)"
        )
    unit = (DECIMAL | BINARY).get(match[2].upper()) if match else None
    value = float(match[1]) if match else math.nan
    if unit is None or not 1 <= value * unit < 2**63:
        raise InputError(f"{what} {text!r}: expected an amount of memory, for example 8GB, 15.8MB or 24GiB")
    return round(value * unit)


def parse_tokens(text: str, what: str) -> int:
    """`32k` is 32 x 1024, as context lengths are counted; `4096` is 4096. InputError for anything else."""
    match = re.fullmatch(r"([0-9]{1,9}) *([kKmM]?)", text.strip())
    tokens = int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()] if match else 0
    if tokens < 1:
        raise InputError(f"{what} {text!r}: expected a number of tokens, for example 4096, 32k or 128k")
    return tokens


def gigabytes(size_bytes: int) -> str:
    """Memory in units of 10^9 bytes."""
    return f"{size_bytes / 1e9:.3g} GB"


def tokens_text(tokens: int) -> str:
    """The shortest way to write it that `parse_tokens` reads back."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
