"""The page of a run that is being watched: read from the run's folder alone, and rendered anew at every look."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intaglio.errors import InputError, IntaglioError
from intaglio.measure.charts import Curve, curve, curve_of, rosette
from intaglio.measure.render import render_page
from intaglio.measure.report import LOSSES, Sample
from intaglio.plan.files import read_json, reading
from intaglio.plan.recipe import Recipe
from intaglio.progress import LOG_FILE
from intaglio.train.optimizer import Phases
from intaglio.train.run_folder import (
    LOCK_FILE,
    LOSSES_FILE,
    RUN_FILE,
    SPEED_FILE,
    held_by_a_process,
    read_losses,
    read_speed,
)

LOG_LINES, LOG_BYTES = 14, 1 << 14  # of the log's end
RECENT = 50  # steps that the speed is a mean of
FEW = 10  # steps that the present loss is a mean of

Row = dict[str, float]


@dataclass(frozen=True)
class Look:
    """A run as its folder shows it at one moment.

    state: "running" while a process works in the folder; "finished"; "ended", by what `said` says; or "left" by a
    process that is gone. recipe: None before training. rows, speeds: of the logs, one a step. log: time and text of the
    last lines.
    """

    folder: Path
    state: str
    said: str
    recipe: Recipe | None
    rows: list[Row]
    speeds: list[Row]
    log: list[tuple[str, str]]
    samples: list[Sample]
    now: float

    @property
    def phases(self) -> Phases | None:
        return None if self.recipe is None else Phases.of(self.recipe.schedule)

    def figures(self) -> dict[str, Any]:
        """The numbers of the page by name; None for one that is not known."""
        total = self.phases.total if self.phases else None
        recent = [row for row in self.speeds[1:][-RECENT:] if row["tokens_per_s"] > 0]  # the first step also compiles
        speed = len(recent) / sum(1 / row["tokens_per_s"] for row in recent) if recent else None
        tokens = self.rows[0]["tokens"] if self.rows else 0  # of a step
        left = (total - len(self.rows)) * tokens / speed if speed and total and self.state == "running" else None
        last = self.speeds[-1] if self.speeds else {}
        few = [row["loss"] for row in self.rows[-FEW:]]
        return {
            "state": self.state,
            "step": len(self.rows),
            "total_steps": total,
            "tokens": self.rows[-1]["tokens"] if self.rows else 0,
            "loss": sum(few) / len(few) if few else None,
            "tokens_per_s": speed,
            "seconds_left": left,
            "seconds_trained": sum(tokens / row["tokens_per_s"] for row in self.speeds if row["tokens_per_s"] > 0),
            "seconds_since_step": self.now - last["time"] if last else None,
            **{key: latest(self.rows, key) for key in ("held_out_loss", "codes_changed", "codes_moved")},
            **{key: last.get(key) or None for key in ("host_bytes", "gpu_bytes", "planned_bytes")},
        }

    def headline(self) -> str:
        """Where the run is, in a line."""
        step, total = len(self.rows), self.phases.total if self.phases else 0
        where = f"step {step:,} of {total:,}"
        if self.state == "finished":
            return f"Finished after {step:,} steps"
        if self.state == "running":
            if not step:
                return "Getting ready"
            return where.capitalize() if step < total else "Trained; files and measurements follow"
        return f"Stopped at {where}" if step else "Stopped before the first step"

    def curves(self) -> list[Curve]:
        """The charts that there are points for."""
        loss = LOSSES[self.recipe.schedule.loss] if self.recipe else ""
        steps = {int(row["step"]): row for row in self.speeds}  # a step that was done twice counts once
        speeds = [steps[int(r["step"])] | {"tokens": r["tokens"]} for r in self.rows if int(r["step"]) in steps]
        charts = (
            ("Training loss", loss, curve_of(self.rows, "loss"), 1),
            ("Loss on held-out text", loss, curve_of(self.rows, "held_out_loss"), 1),
            ("Codes changed", "since training began, percent", curve_of(self.rows, "codes_changed"), 100),
            ("Codes moved", "in one step, percent", curve_of(self.rows, "codes_moved"), 100),
            ("Speed", "tokens a second", curve_of(speeds, "tokens_per_s"), 1),
            ("Rate", "of latents, in 10⁻⁶", curve_of(self.rows, "lr"), 1e6),
        )
        until = self.rows[-1]["tokens"] if self.rows else 0  # one axis for all, also for what is measured now and then
        found = (curve(title, unit, points, factor=by, until=until) for title, unit, points, by in charts)
        return [chart for chart in found if chart]


def latest(rows: list[Row], key: str) -> float | None:
    """The last value of a figure that only some rows have."""
    return next((row[key] for row in reversed(rows) if key in row), None)


@dataclass
class Watched:
    """A run's folder that is looked at again and again; a log is read anew when it has grown.

    Raises InputError for a folder that holds no run.
    """

    folder: Path
    kept: dict[Path, tuple[tuple[int, int], list[Row]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: no such folder: expected the --out of a training")
        if not (self.folder / LOCK_FILE).exists() and not self._training():
            raise InputError(
                f"{self.folder}: holds no run: expected {RUN_FILE}, which a training writes when it begins"
            )

    def _training(self) -> Path | None:
        """The folder of the training itself; a drafter's run has one for each of its stages."""
        if (self.folder / RUN_FILE).exists():
            return self.folder
        records = sorted(self.folder.glob(f"*/{RUN_FILE}"), key=lambda path: path.stat().st_mtime)
        return records[-1].parent if records else None

    def _read(self, path: Path, read: Callable[[Path], list[Row]]) -> list[Row]:
        if not path.exists():
            return []
        found = path.stat()
        mark = (found.st_mtime_ns, found.st_size)
        if path not in self.kept or self.kept[path][0] != mark:
            self.kept[path] = mark, read(path.parent)
        return self.kept[path][1]

    def look(self) -> Look:
        """The run as it is now. Raises ConfigError for a damaged file."""
        training = self._training()
        recipe, rows, speeds = None, [], []
        if training is not None:
            record = read_json(training / RUN_FILE)
            recipe = Recipe.from_toml(str(record.get("recipe")), source=f"{training / RUN_FILE}: recipe")
            rows = self._read(training / LOSSES_FILE, read_losses)
            speeds = self._read(training / SPEED_FILE, read_speed)
        log = end_of(self.folder / LOG_FILE)
        state, said = self._state(log)
        samples = samples_of(self.folder / "report.json") if state == "finished" else []
        return Look(self.folder.absolute(), state, said, recipe, rows, speeds, log, samples, time.time())

    def _state(self, log: list[tuple[str, str]]) -> tuple[str, str]:
        if held_by_a_process(self.folder):
            return "running", ""
        last = log[-1][1] if log else ""
        if last.startswith("ended: "):
            return "ended", last.removeprefix("ended: ").partition(": ")[2] or last.removeprefix("ended: ")
        return ("finished", "") if last == "done" else ("left", "No process works in this folder.")


def end_of(path: Path) -> list[tuple[str, str]]:
    """Time and text of the last lines of a log; none where it cannot be read. Dates are left out."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()[-LOG_LINES:]
    except OSError:
        return []
    found = (re.fullmatch(r"(?:\d{4}-\d\d-\d\d (\d\d:\d\d:\d\d) )?(.*)", line) for line in lines)
    return [(match[1] or "", match[2]) for match in found if match]


def samples_of(path: Path) -> list[Sample]:
    """The samples of a finished run's report; none where there is no report."""
    if not path.is_file():
        return []
    with reading(path, "not a report", "make it again with `intaglio report`"):
        return [
            Sample(prompt=str(s["prompt"]), continuations={str(k): str(v) for k, v in s["continuations"].items()})
            for s in read_json(path)["samples"]
        ]


def rendered(watched: Watched) -> dict[str, Any]:
    """The answer to each look of the page: {title, figures, parts}; parts are HTML by name.

    A folder that is damaged in the meantime, or gone, gives a part that says so.
    """
    try:
        look = watched.look()
        figures = look.figures()
        values: dict[str, Any] = {"look": look, "figures": figures, "curves": look.curves(), "error": ""}
        title = f"{look.headline()}: {watched.folder.absolute().name}"
    except (IntaglioError, OSError) as error:
        title, figures = f"Cannot be read: {watched.folder.absolute().name}", {"state": "broken"}
        values = {"look": None, "figures": figures, "curves": [], "error": str(error)}
    parts = {name: render_page("watch_parts", values | {"part": name}) for name in ("head", "charts", "log", "samples")}
    return {"title": title, "figures": figures, "parts": parts}


def page(watched: Watched, nonce: str) -> str:
    """The page itself, whole without its script; the script asks for `rendered` and replaces parts that changed."""
    name = str(watched.folder.absolute())
    return render_page("watch", rendered(watched) | {"nonce": nonce, "rosette": rosette(name)})
