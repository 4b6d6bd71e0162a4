"""Results of pairs of a target and a drafter: acceptance by position and draft length, and what it is worth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from intaglio.drafter.accept import LONGEST, Acceptance, chances, rounds
from intaglio.drafter.decode import Costs, measure_costs
from intaglio.drafter.text import end_tokens, written
from intaglio.measure.charts import rosette
from intaglio.measure.render import render_page
from intaglio.packed.store import new_path

JSON_FILE, HTML_FILE = "drafter.json", "drafter.html"
SHOWN_LENGTH = 4  # whose acceptance by position is shown


@dataclass(frozen=True)
class Pair:
    """One target with one drafter. greedy, sampled: by draft length, 1 first; costs: of single steps here."""

    target: str
    drafter: str
    greedy: tuple[Acceptance, ...]
    sampled: tuple[Acceptance, ...]
    costs: Costs

    @property
    def label(self) -> str:
        return f"{self.target} target, {self.drafter} drafter"

    @property
    def best(self) -> Acceptance:
        """The greedy draft length that is worth most at the measured costs."""
        return max(self.greedy, key=lambda a: self.speed_up(a))

    def speed_up(self, acceptance: Acceptance) -> float:
        return self.costs.speed_up(acceptance.length, acceptance.draft_length)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; speed-ups are expected from the costs, not timed."""
        rows = {
            mode: [a.to_dict() | {"expected_speed_up": self.speed_up(a)} for a in getattr(self, mode)]
            for mode in ("greedy", "sampled")
        }
        costs = {"target_step": list(self.costs.target), "drafter_step": self.costs.drafter}
        return {"target": self.target, "drafter": self.drafter, **rows, "seconds": costs}


@dataclass(frozen=True)
class DrafterReport:
    """Pairs, measured alike: `prompts` prompts, each continued by `tokens` tokens of the pair's own target."""

    pairs: tuple[Pair, ...]
    prompts: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return {"prompts": self.prompts, "tokens": self.tokens, "pairs": [pair.to_dict() for pair in self.pairs]}


def measure_pair(
    target_name: str,
    drafter_name: str,
    target: Any,
    drafter: Any,
    prompts: Tensor,
    tokens: int,
    texts: dict[bool, Tensor],
) -> Pair:
    """Measure one pair. texts: what this target wrote before, greedy and sampled, and keeps what it writes now."""
    modes = {}
    for sampled in (False, True):
        if sampled not in texts:
            texts[sampled] = written(target, prompts, tokens, sampled=sampled)
        chance = chances(target, drafter, texts[sampled], prompts.shape[1], sampled=sampled, without=end_tokens(target))
        modes[sampled] = tuple(rounds(chance, length) for length in range(1, LONGEST + 1) if length < tokens)
    return Pair(target_name, drafter_name, modes[False], modes[True], measure_costs(target, drafter))


def write_report(report: DrafterReport, out: Path, *, replace: bool = False) -> None:
    """Write drafter.json and drafter.html into `out`."""
    text = json.dumps(report.to_dict(), indent=2) + "\n"
    values = vars(report) | {"first": report.pairs[0], "last": report.pairs[-1]}
    values |= {"shown": SHOWN_LENGTH, "rosette": rosette(text)}
    with new_path(out / JSON_FILE, replace=replace, internal=True) as temporary:
        temporary.write_text(text, "utf-8")
    with new_path(out / HTML_FILE, replace=replace, internal=True) as temporary:
        temporary.write_text(render_page("drafter", values), "utf-8")
