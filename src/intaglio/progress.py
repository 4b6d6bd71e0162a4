"""How a run tells what it is doing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from intaglio.train.loop import StepInfo


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Called as the work goes on; the command line draws bars with it.

    stage: name of the stage that begins. step: after each optimizer step. part: done and total of
    the stage's own unit, with a line of figures. note: a line that stays, such as what was read.
    """

    stage: Callable[[str], None] = lambda name: None
    step: Callable[[StepInfo], None] = lambda info: None
    note: Callable[[str], None] = lambda line: None
    part: Callable[[int, int, str], None] = lambda done, total, figures: None
