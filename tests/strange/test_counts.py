"""docs/inputs.md counts the inputs of every kind; here they are counted again."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from tests.strange import test_adapters, test_checkpoints, test_configs, test_data, test_gguf, test_speech

KINDS = {
    "config.json": {**test_configs.INPUTS, **test_configs.GEMMA3_INPUTS},
    **test_checkpoints.KINDS,
    **test_speech.KINDS,
    **test_data.KINDS,
    "adapters and models in training": test_adapters.CASES,
    "GGUF beside a config": test_gguf.CASES,
}
FOUND = ("right", "silent", "traceback", "misleading")


def rows() -> list[tuple[str, ...]]:
    """Kind, inputs tried, and how many of them were found each way."""
    counted = [
        (kind, len(inputs), *(Counter(case.found for case in inputs.values())[found] for found in FOUND))
        for kind, inputs in KINDS.items()
    ]
    total = ("together", *(sum(int(row[at]) for row in counted) for at in range(1, len(FOUND) + 2)))
    return [tuple(map(str, row)) for row in [*counted, total]]


def test_the_documented_counts_are_those_of_the_tables() -> None:
    text = (Path(__file__).parents[2] / "docs" / "inputs.md").read_text("utf-8")
    lines = [line for line in text.splitlines() if re.match(r"\|.*\d", line)]
    assert [tuple(re.split(r" *\| *", line.strip("| "))) for line in lines] == rows()
