"""The quality report of a quantized model: one page for people, one for a README, one for programs.

`write_report` makes report.html, report.md and report.json from one `Report`. The page is complete
in itself: no script, no font, no image, no request. Parts without data are left out.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from intaglio.errors import OutputError
from intaglio.measure import charts
from intaglio.measure.charts import CurvePoint, LayerRow
from intaglio.measure.metrics import Comparison, recovered_share
from intaglio.measure.render import finite, nats, percent, render_markdown, render_page
from intaglio.measure.tasks import TaskScore
from intaglio.packed.store import new_path
from intaglio.plan.plan import Plan

LOSSES = {"kl": "KL to the original, nats a token", "cross_entropy": "cross-entropy, nats a token"}
BASELINES = ("stock", "fitted", "start")
Kind = Literal["original", "stock", "fitted", "start", "trained"]


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """The tensors of one role on one grid."""

    role: str
    grid: str
    tensors: int
    parameters: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One model of the comparison.

    kind: "original" (the reference), "stock" (the runtime's own rounding), "fitted" (the recipe's fit),
        "start" (where GPTQ let training begin) or "trained". Shares are recovered by "trained" from the others.
    variant: how it computes, if not as it is meant to; rows of a variant are compared with each other.
    comparison: None for the reference itself, and for what could not be measured. failure: why it could not.
    size_bytes: of its file, None without one.
    """

    label: str
    kind: Kind
    comparison: Comparison | None
    variant: str = ""
    failure: str = ""
    size_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Recovered share of the baseline's KL: 1 - KL(trained) / KL(baseline), both in the same runtime.

    measured: the trained row's comparison.
    """

    share: float
    trained: ComparisonRow
    baseline: ComparisonRow
    measured: Comparison


@dataclass(frozen=True, kw_only=True)
class TrainingPath:
    """Rows of one runtime: rounding without training, where training began, and where it ended."""

    stock: ComparisonRow
    start: ComparisonRow
    trained: ComparisonRow

    @property
    def kls(self) -> tuple[float, float, float]:
        """Mean KL of each, in nats a token."""
        stock, start, trained = self.stock.comparison, self.start.comparison, self.trained.comparison
        assert stock and start and trained
        return stock.kl_mean_nats, start.kl_mean_nats, trained.kl_mean_nats

    @property
    def summary(self) -> str:
        """Shares of the recovery that the start gave and that training added."""
        stock, start, trained = self.kls
        change = recovered_share(trained, start) if start > 0 else 0.0
        turn = "took off" if change >= 0 else "added"
        return (
            f"KL to the original: {self.stock.label.lower()} {nats(stock)}, {self.start.label} {nats(start)}, trained "
            f"{nats(trained)}. Training {turn} {percent(abs(change), 1)} of the start's KL."
        )


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A file that was made. verification: what reading it back said, "0 codes, 0 scale bits differ"."""

    name: str
    size_bytes: int
    sha256: str
    verification: str = ""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Greedy continuations of one prompt, by model label."""

    prompt: str
    continuations: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Provenance: versions by package, the command, seconds of work and training tokens."""

    versions: dict[str, str]
    command: str = ""
    seconds: float | None = None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a report may show. Only title, model, format and the recipe's name are required.

    tasks: scores of the trained artifact. format: what the headline calls the rounding, for example "Q4_0".
    loss_name: of LOSSES, what `loss_curve` holds, and on held-out text `held_out_curve`. codes_curve: share of codes
    that are not those which training began with.
    """

    title: str
    model: str
    format: str
    recipe_name: str
    recipe_toml: str = ""
    plan: list[PlanRow] = field(default_factory=list)
    comparisons: list[ComparisonRow] = field(default_factory=list)
    tasks: list[TaskScore] = field(default_factory=list)
    loss_name: str = LOSSES["kl"]
    loss_curve: list[CurvePoint] = field(default_factory=list)
    held_out_curve: list[CurvePoint] = field(default_factory=list)
    codes_curve: list[CurvePoint] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)
    artifacts: list[Artifact] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    provenance: Provenance | None = None
    notes: list[str] = field(default_factory=list)

    def recoveries(self) -> list[Recovery]:
        """Every trained row against every stock and fitted row of the same runtime; artifacts first."""
        measured = [(row, row.comparison) for row in self.comparisons if row.comparison is not None]
        pairs = [
            Recovery(
                share=recovered_share(a.kl_mean_nats, b.kl_mean_nats), trained=trained, baseline=baseline, measured=a
            )
            for trained, a in measured
            for baseline, b in measured
            if trained.kind == "trained" and baseline.kind in BASELINES
            if trained.variant == baseline.variant and _comparable(a, b)
        ]
        # artifacts before simulations, what is meant before its variants, stock before the others
        return sorted(
            pairs, key=lambda p: (p.measured.simulated, bool(p.trained.variant), BASELINES.index(p.baseline.kind))
        )

    def lead(self) -> Recovery | None:
        """The pair of the headline: against stock, in the artifact's own runtime if it was run there."""
        return next((pair for pair in self.recoveries() if pair.baseline.kind == "stock"), None)

    def path(self) -> TrainingPath | None:
        """Stock rounding, the start and the trained model, if one runtime has measured all three."""
        measured = [(row, row.comparison) for row in self.comparisons if row.comparison is not None and not row.variant]
        for trained_row, trained in measured:
            rows = {row.kind: row for row, other in measured if _comparable(trained, other)}
            start, stock = rows.get("start", rows.get("fitted")), rows.get("stock")
            if trained_row.kind == "trained" and start is not None and stock is not None:
                return TrainingPath(stock=stock, start=start, trained=trained_row)
        return None

    def headline(self) -> str:
        """The finding in one line: what was recovered of what rounding loses, and the start's share of that."""
        lead, path = self.lead(), self.path()
        if lead is None:
            return self.title
        if lead.share < 0:
            return f"QAT is {percent(-lead.share)} further from the original than {self.format} rounding"
        start = "" if path is None else f"; its {path.start.label.removesuffix(' start')} start alone {_share(path)}"
        return f"QAT recovers {percent(lead.share)} of what {self.format} rounding loses{start}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the fields, and what is derived from them. NaN and Inf become None."""
        recovered = [
            {"share": pair.share, "trained": pair.trained.label, "baseline": pair.baseline.label}
            for pair in self.recoveries()
        ]
        layers = [asdict(row) | {"snr_db": {v: row.snr_db(v) for v in row.relative_rms}} for row in self.layers]
        path = self.path()
        derived: dict[str, Any] = {"headline": self.headline(), "recovered": recovered, "layers": layers}
        if path is not None:
            names = ("kl_stock_nats", "kl_start_nats", "kl_trained_nats")
            derived["start"] = {"label": path.start.label} | dict(zip(names, path.kls, strict=True))
        return dict(finite(asdict(self) | derived))


def plan_rows(plan: Plan) -> list[PlanRow]:
    """A plan summed up by role and grid, in the order of first appearance."""
    groups = defaultdict(list)
    for tensor in plan:
        groups[tensor.spec.role, tensor.grid.name].append(tensor)
    return [
        PlanRow(
            role=role,
            grid=grid,
            tensors=len(tensors),
            parameters=sum(math.prod(t.spec.shape) for t in tensors),
            size_bytes=sum(t.size_bytes for t in tensors),
        )
        for (role, grid), tensors in groups.items()
    ]


def write_report(report: Report, out_dir: Path, *, replace: bool = False) -> dict[str, Path]:
    """Write report.html, report.md and report.json into `out_dir`; their paths by suffix.

    Each appears whole or not at all. Raises OutputError for files that exist, unless `replace`, and
    for a folder that cannot be written.
    """
    values = _template_values(report)
    texts = {
        "html": render_page("report", values),
        "md": render_markdown(values),
        "json": json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n",
    }
    paths = {suffix: out_dir / f"report.{suffix}" for suffix in texts}
    taken = next((path for path in paths.values() if path.exists()), None)
    if taken and not replace:  # checked for all of them before any is written
        raise OutputError(f"{taken}: already exists: choose another output or remove it")
    for suffix, path in paths.items():
        with new_path(path, replace=replace, internal=True) as temporary:
            temporary.write_text(texts[suffix], "utf-8")
    return paths


def _template_values(report: Report) -> dict[str, Any]:
    stock = [
        (row.label, row.comparison.kl_mean_nats) for row in report.comparisons if row.kind == "stock" and row.comparison
    ]
    curves = [
        charts.curve("Training loss", report.loss_name, report.loss_curve),
        charts.curve(
            "Loss on held-out text",
            report.loss_name,
            report.held_out_curve,
            lines=stock[:1] if report.loss_name == LOSSES["kl"] else (),
        ),
        charts.curve("Codes changed", "since training began, percent", report.codes_curve, factor=100),
    ]
    kls = [row.comparison.kl_mean_nats for row in report.comparisons if row.comparison]
    return {
        "report": report,
        "lead": report.lead(),
        "path": report.path(),
        "recoveries": report.recoveries(),
        "original": next((row for row in report.comparisons if row.kind == "original"), None),
        "measured": next((row.comparison for row in report.comparisons if row.comparison), None),
        "kl_full_scale": max(kls, default=0) or 1,
        "plan_parameters": sum(row.parameters for row in report.plan),
        "plan_bytes": sum(row.size_bytes for row in report.plan),
        "curves": [curve for curve in curves if curve],
        "heat": charts.heat(report.layers),
        "rosette": charts.rosette(report.artifacts[0].sha256 if report.artifacts else report.title),
    }


def _share(path: TrainingPath) -> str:
    """Share of stock rounding's loss that the start recovers."""
    stock, start, _ = path.kls
    share = recovered_share(start, stock)
    return f"recovers {percent(share)}" if share >= 0 else f"is {percent(-share)} further"


def _comparable(trained: Comparison, baseline: Comparison) -> bool:
    """Measured alike, and against a baseline that loses something."""
    alike = (trained.runtime, trained.simulated) == (baseline.runtime, baseline.simulated)
    return alike and baseline.kl_mean_nats > 0
