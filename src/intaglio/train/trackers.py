"""Trackers that are told of each step, by accelerate's classes. Nothing is imported or sent unless it is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from intaglio.errors import InputError
from intaglio.plan.files import one_line

TRACKERS = ("wandb", "trackio", "tensorboard", "mlflow")  # each the name of its package, and of our extra
PROJECT = "intaglio"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says otherwise


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise InputError for a tracker that is not known or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"tracker {name!r}: expected one of {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise InputError(f"tracker {name!r}: its package is not installed: pip install 'intaglio[{name}]'")


def make_tracker(name: str, run_dir: Path) -> Any:
    """accelerate's tracker of this name, for a run that is called as its folder is."""
    from accelerate import tracking

    if name == "wandb":
        return tracking.WandBTracker(os.environ.get("WANDB_PROJECT", PROJECT), name=run_dir.name, dir=run_dir)
    if name == "trackio":
        return tracking.TrackioTracker(PROJECT, name=run_dir.name)
    if name == "tensorboard":
        return tracking.TensorBoardTracker("tensorboard", run_dir)
    return tracking.MLflowTracker(PROJECT, run_name=run_dir.name)


class Trackers:
    """The trackers of a run, in its main process, as a context that ends them.

    config: settings by name. note: takes a line for a person. Raises InputError for a tracker that does not start. One
    that fails later is left out from there on, with a note: no tracker ends a training.
    """

    def __init__(self, names: tuple[str, ...], run_dir: Path, config: Mapping[str, Any], note: Callable[[str], None]):
        self.names, self.run_dir, self.note = dict.fromkeys(names), run_dir.absolute(), note
        self.config = {
            key: value if isinstance(value, str | int | float) else str(value) for key, value in config.items()
        }
        self.running: dict[str, Any] = {}

    def __enter__(self) -> Trackers:
        for name in self.names:
            try:
                from accelerate import PartialState

                PartialState()  # the logger of accelerate's trackers needs it
                tracker = make_tracker(name, self.run_dir)
                tracker.start()
                self.running[name] = tracker
                tracker.store_init_configuration(self.config)
            except Exception as error:  # others' code: of any type
                self.__exit__()
                raise InputError(
                    f"tracker {name!r} does not start: {one_line(error)}: set it up as its own documentation says, or "
                    "leave it out"
                ) from error
        return self

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Tell the figures of a step."""
        self._each(lambda tracker: tracker.log(dict(figures), step=step))

    def __exit__(self, *rest: object) -> None:
        self._each(lambda tracker: tracker.finish())

    def _each(self, act: Callable[[Any], None]) -> None:
        for name, tracker in list(self.running.items()):
            try:
                act(tracker)
            except Exception as error:
                del self.running[name]
                self.note(f"tracker {name!r} failed, and is told no more of this run: {one_line(error)}")
