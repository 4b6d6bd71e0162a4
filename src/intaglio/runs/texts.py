"""The texts of a run: what training reads, and the held-out windows that it never sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intaglio.errors import CorpusError, InputError
from intaglio.packed.checkpoint import TextModel
from intaglio.packed.store import new_path
from intaglio.plan.files import reading
from intaglio.plan.plan import Plan
from intaglio.progress import Progress
from intaglio.runs.proof import Evaluation
from intaglio.train.corpus import Corpus, held_out_windows, load_corpus, sample_corpus
from intaglio.train.data.sources import Data

SHARE_HELD_OUT = 0.02  # of the training sequences, when no held-out text is given
HELD_OUT_FILE = "heldout.npy"


def training_text(plan: Plan, data: Data | None, tokenizer: Any, teacher: TextModel, progress: Progress) -> Corpus:
    """Training text of a run: a user's text, or without any the teacher's own. `progress` hears what was read."""
    schedule = plan.recipe.schedule
    length = schedule.sequence_length
    if data is not None:
        corpus = load_corpus(
            data,
            tokenizer,
            sequence_length=length,
            vocab_size=plan.model.layer_config.vocab_size,
            max_tokens=max(schedule.tokens, schedule.layer_tokens if "layers" in schedule.stages else 0),
            assistant_only=schedule.assistant_only,
        )
        for line in corpus.reading.lines() if corpus.reading is not None else []:
            progress.note(line)
        return corpus
    if schedule.assistant_only:
        raise InputError(
            "schedule.assistant_only needs chats, and the model's own samples are none: give chats with --data, or "
            "leave it out with --set schedule.assistant_only=false"
        )
    return sample_corpus(
        teacher, tokenizer, tokens=schedule.tokens, sequence_length=length, seed=schedule.seed, progress=progress
    )


def held_out(corpus: Corpus, evaluation: Evaluation, plan: Plan, tokenizer: Any) -> tuple[Corpus, NDArray[np.int32]]:
    """Training sequences, and evaluation windows [N, T] that training never sees."""
    if evaluation.text is not None:
        return corpus, read_windows(evaluation, plan.model.layer_config.vocab_size, tokenizer)
    count = max(1, round(len(corpus.tokens) * SHARE_HELD_OUT))
    if count >= len(corpus.tokens):
        raise CorpusError(
            f"{corpus.source}: {len(corpus.tokens)} sequence: expected two or more, one of them to measure on: "
            "add text, or give held-out text of its own"
        )
    windows = corpus.tokens[-count:][: max(1, evaluation.tokens // corpus.tokens.shape[1])]
    return corpus.rows(slice(-count)), windows


def read_windows(evaluation: Evaluation, vocab_size: int, tokenizer: Any) -> NDArray[np.int32]:
    """Held-out windows [N, T] of `evaluation.text`."""
    assert evaluation.text is not None
    return held_out_windows(
        evaluation.text, tokenizer, length=evaluation.window, max_tokens=evaluation.tokens, vocab_size=vocab_size
    )


def save_windows(windows_NT: NDArray[np.int32], run_dir: Path) -> None:
    """Keep a run's held-out windows in its folder, so that it can be measured again on the same text."""
    with new_path(run_dir / HELD_OUT_FILE, replace=True, internal=True) as temporary, open(temporary, "wb") as file:
        np.save(file, windows_NT)


def saved_windows(path: Path, vocab_size: int) -> NDArray[np.int32]:
    """Windows int32 [N, T] of a file that `save_windows` wrote. CorpusError for any other file."""
    advice = "give held-out text with --text"
    with reading(path, "cannot be read", advice, CorpusError):
        if not path.is_file():
            raise ValueError("no regular file")
        # mapped: a header that announces more than the file has is an error, and no allocation
        windows_NT = np.load(path, allow_pickle=False, mmap_mode="r")
        if not isinstance(windows_NT, np.ndarray):
            raise ValueError("an archive of arrays")
    if windows_NT.ndim != 2 or windows_NT.dtype != np.int32 or not windows_NT.size:
        raise CorpusError(f"{path}: {windows_NT.dtype} of shape {windows_NT.shape}: expected int32 [N, T]: {advice}")
    if windows_NT.min() < 0 or windows_NT.max() >= vocab_size:
        raise CorpusError(f"{path}: has tokens that the vocabulary of {vocab_size} has not: {advice}")
    return np.array(windows_NT)
