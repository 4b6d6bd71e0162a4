"""Output on a terminal: progress bars and tables."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text as RichText

from intaglio.cli.streams import Printer
from intaglio.measure.metrics import Comparison
from intaglio.measure.render import percent, size, with_ci, with_stderr
from intaglio.measure.report import Report
from intaglio.measure.tasks import TaskScore
from intaglio.numerics.identify import NAMES
from intaglio.progress import Lines, Progress, StepInfo
from intaglio.sources.convert import Conversion
from intaglio.sources.inspect import Inspection, Verdict

console = Printer()


class Bars:
    """Shows progress while a command works: bars on a terminal, and without one a line now and then.

    progress: takes the events. part: takes those of a command without stages.
    """

    def __init__(self) -> None:
        printer = Printer(stderr=True)
        # not the console's is_terminal: FORCE_COLOR makes it true in a log, where bars show nothing until the end
        self.bars = TerminalBars(printer) if sys.stderr.isatty() else None
        self.lines = None if self.bars else Lines(lambda line: print(line, file=sys.stderr, flush=True))
        self.progress = Progress(self.bars or self.lines)  # type: ignore[arg-type]
        self.part = self.progress.part

    def __enter__(self) -> Bars:
        if self.bars is not None:
            self.bars.bars.start()
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if self.lines is not None:
            self.lines.close()
        if self.bars is not None:
            if kind is None:
                self.bars.finish()
            self.bars.bars.stop()


class TerminalBars:
    """One bar a stage, with its figures and the time left."""

    def __init__(self, printer: Console) -> None:
        self.bars = RichProgress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=printer,
        )
        self.task: TaskID | None = None
        self.first: StepInfo | None = None

    def stage(self, name: str) -> None:
        self.finish()
        self.task = self.bars.add_task(name, total=None, figures="")

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self.bars.console.print(RichText(text, style="yellow"), soft_wrap=True)

    def finish(self) -> None:
        """Fill the present bar: a stage without parts is done when the next begins."""
        if self.task is not None:
            total = self.bars.tasks[self.task].total or 1
            self.bars.update(self.task, total=total, completed=total)

    def step(self, info: StepInfo) -> None:
        """Show an optimizer step: loss and tokens a second since the first one seen."""
        self.first = self.first or info  # after a resume, speed counts from here
        done_tokens, seconds = info.tokens - self.first.tokens, info.seconds - self.first.seconds
        rate = f"{done_tokens / seconds:,.0f} tokens/s" if seconds > 0 else ""
        self.part(info.step, info.total_steps, f"loss {info.loss:.4f}  {rate}")

    def part(self, done: int, total: int, figures: str) -> None:
        """Show how much of the present stage is done."""
        if self.task is None:
            self.stage("Working")
        assert self.task is not None
        self.bars.update(self.task, completed=done, total=total, figures=figures)


def print_report(report: Report, out: Path) -> None:
    """The comparison table, the headline, and where the files are."""
    table = new_table(report.headline(), ("model", *_headers(), "size"))
    for row in report.comparisons:
        bytes_ = "" if row.size_bytes is None else size(row.size_bytes)
        if row.failure:
            table.add_row(row.label, "not measured", *[""] * (len(_headers()) - 1), bytes_)
        elif row.comparison is None:
            measured = next((r.comparison for r in report.comparisons if r.comparison), None)
            perplexity = f"{measured.perplexity_reference:.3f}" if measured else ""
            table.add_row(row.label, "0", *[""] * (len(_headers()) - 2), perplexity, bytes_)
        else:
            table.add_row(row.label, *_figures(row.comparison), bytes_)
    console.print(table)
    if report.tasks:
        print_scores("Tasks", report.tasks)
    for row in report.comparisons:
        if row.failure:
            console.print(RichText(f"{row.label}: not measured: {row.failure}", style="bold yellow"), soft_wrap=True)
    for artifact in report.artifacts:
        console.print(artifact.verification, highlight=False)
    console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)


def print_comparison(name: str, comparison: Comparison) -> None:
    """Print the measurement of one artifact as a table."""
    table = new_table(f"{name} in {comparison.runtime}, {comparison.tokens:,} tokens", _headers())
    table.add_row(*_figures(comparison))
    console.print(table)


def print_scores(name: str, scores: list[TaskScore]) -> None:
    """Print scores in tasks as a table, with standard errors."""
    table = new_table(f"{name} in {scores[0].runtime}", ("model", "score", "original", "difference", "recovered"))
    table.columns[0].header = "task (questions), metric"
    for row in (score for score in scores if not score.group):
        table.add_row(
            f"{row.task} ({row.samples:,}), {row.metric}",
            with_stderr(row.score, row.stderr),
            with_stderr(row.original_score, row.original_stderr),
            with_stderr(row.score - row.original_score, row.difference_stderr),
            "" if row.recovered is None else percent(row.recovered, 1),
        )
    console.print(table)
    console.print("± is the standard error; that of the difference is over pairs of answers.", style="dim")


WIDE = 100  # columns of a terminal that has room for the whole distribution


def _headers() -> tuple[str, ...]:
    spread = ("median", "99%") if console.width >= WIDE else ()
    return ("KL, nats", *spread, "same top", "perplexity")


def _figures(c: Comparison) -> tuple[str, ...]:
    spread = (f"{c.kl_median_nats:.4f}", f"{c.kl_99_nats:.3f}") if console.width >= WIDE else ()
    mean = with_ci(c.kl_mean_nats, c.kl_mean_ci_nats)
    return (mean, *spread, percent(c.same_top_share, 1), f"{c.perplexity_candidate:.3f}")


def new_table(title: str, headers: tuple[str, ...]) -> Table:
    """A table with its title at the left, figures at the right."""
    table = Table(title=title, title_justify="left")
    for header in headers:
        words = header == "model"
        table.add_column(header, justify="left" if words else "right", no_wrap=not words)
    return table


LEGEND = """recovered: blocks (rows, of grids per row) that code x scale gives back bit for bit
stock: blocks whose codes and scale llama-quantize would find again; the others it moves
Q4_0: blocks whose trained codes and scale can be shipped as they are
portable: one set of codes is exact in GGUF and in bfloat16, and stock tools keep it"""


def print_inspection(found: Inspection, *, every: bool = False) -> None:
    """A table of tensors with what was found, those of one kind in a line."""
    table = new_table(
        f"{found.path.name}: {found.kind}", ("tensors", "stored", "grid", "recovered", "scale", "stock", "Q4_0")
    )
    for column in (0, 2):
        table.columns[column].justify, table.columns[column].no_wrap = "left", False
        table.columns[column].overflow = "fold"
    groups: dict[tuple[str, ...], list[Verdict]] = {}
    for verdict in found.verdicts:
        kind = verdict.name if every else re.sub(r"\.\d+\.", ".*.", verdict.name)
        groups.setdefault((kind, verdict.stored, verdict.grid, verdict.scale_dtype or ""), []).append(verdict)
    for (kind, stored, grid, scale), verdicts in groups.items():
        label = kind if len(verdicts) == 1 else f"{kind} ({len(verdicts)})"
        name = NAMES.get(grid, grid) + (", portable" if all(v.portable and v.in_blocks for v in verdicts) else "")
        table.add_row(label, stored, name, *_shares(verdicts, scale))
    console.print(table)
    console.print(LEGEND, highlight=False, style="dim")


def _shares(verdicts: list[Verdict], scale: str) -> tuple[str, ...]:
    total = sum(v.tally.all for v in verdicts)
    if not all(v.on_grid for v in verdicts) or not total:
        return ("", "", "", "")
    recovered, stock, ships = (
        _share(sum(getattr(v.tally, name) for v in verdicts), total) for name in ("recovered", "stock", "ships")
    )
    blocks = all(v.in_blocks for v in verdicts)
    return recovered, scale, stock if blocks else "", ships if blocks else ""


def _share(count: int, total: int) -> str:
    """A share in percent; 100% stands only for all, and 0% only for none."""
    rounded = percent(count / total, 2)
    return rounded if count in (0, total) else {"100.00%": "<100%", "0.00%": ">0%"}.get(rounded, rounded)


def print_conversion(result: Conversion) -> None:
    """Print what was taken over, what was fitted because it had no trained grid, and what was lost."""
    packed = result.packed
    for grid, count in result.grids.items():
        console.print(f"{count:5} tensors: {grid}", highlight=False)
    if result.blocks:
        said = f"{result.recovered:,} of {result.blocks:,} blocks have their trained codes and scales"
        console.print(said, highlight=False)
    for name, grid in result.fitted.items():
        console.print(f"{name} has no trained grid: fitted to {grid}, as the recipe says", highlight=False)
    for name, count in result.rounded.items():
        console.print(f"{name} stays float: {count:,} values were rounded", highlight=False)
    if result.lossy:
        console.print(
            f"LOSSY: {sum(result.lossy.values()):,} blocks of {len(result.lossy)} tensors were fitted anew, "
            f"the first is {min(result.lossy)}",
            style="bold yellow",
            highlight=False,
        )
    if result.left_out:
        console.print(f"left out: {len(result.left_out)} tensors that the model does not use", highlight=False)
    console.print(f"{packed.path}: recipe {packed.plan.recipe.name}", highlight=False)
