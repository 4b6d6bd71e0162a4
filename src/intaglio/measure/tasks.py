"""Accuracy of an artifact in tasks of lm-evaluation-harness, in its own runtime, and of the original beside it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.errors import InputError, IntaglioError
from intaglio.numerics.device import Device
from intaglio.plan.files import one_line
from intaglio.progress import Progress

HINT = "`lm_eval ls tasks` lists the names; a file of your own ends in .yaml"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Settings of an evaluation in tasks.

    limit: questions of each task; None for all. shots: examples before a question; None for what the task says.
    chat_template: whether questions are put into the model's chat template.
    """

    limit: int | None = None
    shots: int | None = None
    chat_template: bool = False
    context_tokens: int = 4096


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A metric of a task or of a group of tasks, of the artifact and of the original.

    group: that the task is a part of; empty for what was asked for. metric: with lm_eval's filter behind it where it is
    not "none". runtime: the artifact's. samples: questions that were asked. stderr: standard errors of the scores; None
    where lm_eval has none. difference_stderr: that of score - original_score, from pairs of answers to the same
    question; None for a score that is no mean over questions. recovered: score / original_score, or the inverse where
    less is better; None where a score is 0.
    """

    task: str
    group: str = ""
    metric: str
    runtime: str
    samples: int
    higher_is_better: bool
    score: float
    stderr: float | None
    original_score: float
    original_stderr: float | None
    difference_stderr: float | None
    recovered: float | None


def evaluate_tasks(
    artifact: str | Path,
    original: str | Path,
    tasks: str | Sequence[str],
    asking: Asking | None = None,
    *,
    progress: Progress | None = None,
    device: Device = None,
) -> list[TaskScore]:
    """Scores of an artifact and of the original in tasks, one model after the other.

    artifact: a .gguf, which llama.cpp runs, or a packed model or folder, which transformers runs. tasks: names that
    lm_eval knows, of tasks, groups or tags, and paths of task files, which need no network if their data are local;
    in one text, with commas between.
    Raises InputError without the extra `tasks`, for a task that is unknown or cannot be loaded, and for a question
    longer than the context; RuntimeFailureError where llama.cpp fails.
    """
    progress, asking = progress or Progress(), asking or Asking()
    try:
        from lm_eval.tasks import TaskManager

        from intaglio.measure.harness import Harness
    except ImportError as error:
        raise InputError(f"tasks need lm-evaluation-harness ({error}): pip install 'intaglio[tasks]'") from error
    progress.stage("Loading tasks")
    given = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks)]
    names = [str(Path(name).absolute()) if name.endswith(".yaml") else name for name in given if name]
    _check(names)
    manager = TaskManager(include_defaults=not all(name.endswith(".yaml") for name in names))  # reads 14,000 files
    unknown = [name for name in names if not name.endswith(".yaml") and name not in manager.all_tasks]
    if unknown:
        raise InputError(f"--tasks {','.join(unknown)}: no such task: {HINT}")
    found = []
    for path in (artifact, original):
        progress.stage(f"Asking {Path(path).name}")
        with closing(
            Harness(path, context_tokens=asking.context_tokens, device=device, on_part=progress.part)
        ) as model:
            found.append((model.engine.version, _asked(model, names, manager, asking)))
    (runtime, mine), (_, theirs) = found
    return [score for name in mine["results"] for score in _scores(name, runtime, mine, theirs)]


def _check(names: list[str]) -> None:
    missing = [name for name in names if name.endswith(".yaml") and not Path(name).is_file()]
    if missing or not names:
        raise InputError(f"--tasks {','.join(missing) or 'without a name'}: no such file: {HINT}")


def _asked(model: Any, names: list[str], manager: Any, asking: Asking) -> dict[str, Any]:
    """lm_eval's results of a model; its errors, which are of any type, as InputError."""
    from lm_eval import simple_evaluate

    try:
        results: dict[str, Any] = simple_evaluate(
            model=model,
            tasks=names,
            task_manager=manager,
            num_fewshot=asking.shots,
            limit=asking.limit,
            apply_chat_template=asking.chat_template,
        )
    except IntaglioError:
        raise
    except Exception as error:  # a data set that cannot be loaded, a template that does not fit its columns
        raise InputError(f"--tasks {','.join(names)}: lm_eval cannot ask them: {one_line(error)}") from error
    return results


def _scores(name: str, runtime: str, mine: dict[str, Any], theirs: dict[str, Any]) -> list[TaskScore]:
    """Every metric of a task or group."""
    scores, first, second = [], mine["results"][name], theirs["results"][name]
    for key in first:
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        more = bool(mine["higher_is_better"].get(name, {}).get(metric, True))
        score, other = float(first[key]), float(second[key])
        stderr, other_stderr = (_number(row.get(f"{metric}_stderr,{filtered}")) for row in (first, second))
        scores.append(
            TaskScore(
                task=name,
                group=next((group for group, members in mine["group_subtasks"].items() if name in members), ""),
                metric=metric if filtered == "none" else f"{metric}, {filtered}",
                runtime=runtime,
                samples=int(first["sample_len"]),
                higher_is_better=more,
                score=score,
                stderr=stderr,
                original_score=other,
                original_stderr=other_stderr,
                difference_stderr=_paired(name, metric, filtered, mine, theirs),
                recovered=None if not score or not other else score / other if more else other / score,
            )
        )
    return scores


def _number(value: Any) -> float | None:
    """lm_eval writes "N/A" for a standard error that it does not have."""
    return float(value) if isinstance(value, int | float) else None


def _paired(name: str, metric: str, filtered: str, mine: dict[str, Any], theirs: dict[str, Any]) -> float | None:
    """Standard error of the mean difference of two models' answers to the same questions.

    None for scores that are no mean over questions, such as a perplexity, or the mean of tasks of different sizes.
    """
    answers = []
    for found in (mine, theirs):
        rows = [(task, row) for task in _leaves(name, found) for row in found["samples"].get(task, [])]
        values = {(task, row["doc_id"]): row.get(metric) for task, row in rows if row["filter"] == filtered}
        if len(values) < 2 or not all(isinstance(value, int | float) for value in values.values()):
            return None
        if not math.isclose(statistics.mean(values.values()), found["results"][name][f"{metric},{filtered}"]):
            return None
        answers.append(values)
    spread: float = statistics.stdev(answers[0][question] - answers[1][question] for question in answers[0])
    return spread / math.sqrt(len(answers[0]))


def _leaves(name: str, found: dict[str, Any]) -> list[str]:
    """The task itself, or the tasks of a group."""
    members = found["group_subtasks"].get(name)
    return [leaf for member in members for leaf in _leaves(member, found)] if members else [name]
