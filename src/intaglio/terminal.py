"""What a person sees in the terminal: progress bars and tables."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from intaglio.measure.metrics import Comparison
from intaglio.measure.render import percent, size, with_ci
from intaglio.measure.report import Report
from intaglio.progress import Progress as Callbacks
from intaglio.train.loop import StepInfo

console = Console()


class Bars:
    """One bar a stage, with its figures and the time left; `progress` feeds it."""

    def __init__(self) -> None:
        self.bars = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task: TaskID | None = None
        self.first: StepInfo | None = None
        self.progress = Callbacks(stage=self.stage, step=self.step, part=self.part)

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.finish()
        self.bars.stop()

    def stage(self, name: str) -> None:
        self.finish()
        self.task = self.bars.add_task(name, total=None, figures="")

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
    table = _table(report.headline(), ("model", *_headers(), "size"))
    for row in report.comparisons:
        bytes_ = "" if row.size_bytes is None else size(row.size_bytes)
        if row.comparison is None:
            measured = next((r.comparison for r in report.comparisons if r.comparison), None)
            perplexity = f"{measured.perplexity_reference:.3f}" if measured else ""
            table.add_row(row.label, "0", *[""] * (len(_headers()) - 2), perplexity, bytes_)
        else:
            table.add_row(row.label, *_figures(row.comparison), bytes_)
    console.print(table)
    for artifact in report.artifacts:
        console.print(artifact.verification, highlight=False)
    console.print(f"report: {out / 'report.html'}", highlight=False)


def print_comparison(name: str, comparison: Comparison) -> None:
    """What was measured of one artifact, as a table."""
    table = _table(f"{name} in {comparison.runtime}, {comparison.tokens:,} tokens", _headers())
    table.add_row(*_figures(comparison))
    console.print(table)


WIDE = 100  # columns of a terminal that has room for the whole distribution


def _headers() -> tuple[str, ...]:
    spread = ("median", "99%") if console.width >= WIDE else ()
    return ("KL, nats", *spread, "same top", "perplexity")


def _figures(c: Comparison) -> tuple[str, ...]:
    spread = (f"{c.kl_median_nats:.4f}", f"{c.kl_99_nats:.3f}") if console.width >= WIDE else ()
    mean = with_ci(c.kl_mean_nats, c.kl_mean_ci_nats)
    return (mean, *spread, percent(c.same_top_share, 1), f"{c.perplexity_candidate:.3f}")


def _table(title: str, headers: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for header in headers:
        words = header == "model"
        table.add_column(header, justify="left" if words else "right", no_wrap=not words)
    return table
