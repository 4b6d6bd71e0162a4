"""Output for drafters on a terminal."""

from __future__ import annotations

from pathlib import Path

from intaglio.cli.terminal import console, new_table
from intaglio.measure.drafter_report import HTML_FILE, SHOWN_LENGTH, DrafterReport
from intaglio.measure.render import decimals, percent, with_ci


def print_drafter(report: DrafterReport, out: Path) -> None:
    """The pairs, a line each, and where the files are."""
    title = f"{SHOWN_LENGTH} drafts a round; {report.prompts} texts of {report.tokens} tokens"
    table = new_table(title, ("target, drafter", "accepted", "tokens a round", "speed-up", "sampled"))
    table.columns[0].justify = "left"
    for pair in report.pairs:
        greedy, sampled = pair.greedy[SHOWN_LENGTH - 1], pair.sampled[SHOWN_LENGTH - 1]
        table.add_row(
            f"{pair.target}, {pair.drafter}",
            percent(greedy.accepted, 1),
            with_ci(greedy.length, 2 * greedy.error, 2),
            f"{decimals(pair.speed_up(greedy))}x",
            percent(sampled.accepted, 1),
        )
    console.print(table)
    best = report.pairs[-1].best
    console.print(
        f"worth most here: {best.draft_length} drafts a round, {decimals(best.length)} tokens; speed-ups are expected "
        "from the costs of single steps in transformers",
        highlight=False,
    )
    console.print(f"report: {out / HTML_FILE}", highlight=False, soft_wrap=True)
