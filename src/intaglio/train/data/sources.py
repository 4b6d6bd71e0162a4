"""The files of a source that are read: kinds of files, splits, and what a folder has beside its text."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intaglio.errors import CorpusError, InputError
from intaglio.train.data.reading import Reading, some

KINDS = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKINGS = (".gz", ".xz", ".bz2", ".zst")
ROLES = ("text", "messages", "prompt", "completion", "tools")
MAX_FILES = 100_000
# A folder's papers and settings are no text to train on. One that is named by itself is read.
PAPERS = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|citation|contributing|authors|requirements|robots)(?![a-z])", re.I
)
SETTINGS = re.compile(
    r"(config|generation_config|(tokenizer|processor|preprocessor|special_tokens|added_tokens)\w*|dataset_infos?"
    r"|dataset_dict|state|package|metadata|.*\.index)\.json",
    re.I,
)
WORDS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
WORDS |= {"test": "test", "eval": "test", "training": "train", "testing": "test", "evaluation": "test"}
SPLIT_IN_NAME = re.compile(rf"(?:^|[-_. ])({'|'.join(WORDS)})(?:set)?\d*(?=$|[-_. ])", re.I)
WANTED = {"training": ("train",), "evaluation": ("validation", "test")}
ALL = "all"


@dataclass(frozen=True)
class Source:
    """Text to read: a file, a folder, or the name of a dataset that `datasets` can stream.

    name: a folder or a saved dataset may be followed by @SPLIT, or by @all for everything in it.
    columns: from `ROLES` to the name that the column has in the source.
    """

    name: str | Path
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for role in self.columns:
            if role not in ROLES:
                raise InputError(f"column {role!r}: expected one of {', '.join(ROLES)}")

    def __str__(self) -> str:
        return str(self.name)


Data = str | Path | Source


def path_of(data: Data | None) -> Path | None:
    """The file or folder that data lie in, without the name of a split; None where they are no path."""
    if data is None:
        return None
    path = Path(as_source(data).name)
    return path if path.exists() else Path(str(path).rpartition("@")[0] or path)


def record_of(data: Data | None) -> dict[str, Any]:
    """Record of the text for a provenance: its name, and the dataset of the Hub where it is one."""
    path, name = path_of(data), str(data)
    if path is None:
        return {"data": "the model's own samples"}
    return {"data": name} | ({} if path.exists() else {"datasets": [re.split("[:@]", name)[0]]})


def as_source(data: Data) -> Source:
    """The source that a path or a name stands for."""
    return data if isinstance(data, Source) else Source(data)


def located(source: Source) -> tuple[Path, str | None]:
    """Path and split of a source on disk; the path does not exist if the source is none."""
    path = Path(source.name)
    if not path.exists() and "@" in path.name:
        bare, _, split = str(source.name).rpartition("@")
        if Path(bare).is_dir():
            return Path(bare), split
    return path, None


def kind_of(path: Path) -> str:
    """The suffix of `KINDS` that a file's name ends in, before that of its packing; empty if there is none."""
    name = path.name.lower()
    packing = next((suffix for suffix in PACKINGS if name.endswith(suffix)), "")
    name = name.removesuffix(packing)
    # Windows shows data.jsonl.txt as data.jsonl
    kind = next((kind for text in (".txt", "") for kind in KINDS if kind != text and name.endswith(kind + text)), "")
    return "" if packing and kind == ".parquet" else kind


def expected_kinds() -> str:
    """The names of files that can be read, for messages."""
    return f"{', '.join(KINDS)}; all but .parquet also with {', '.join(PACKINGS)} behind"


def choose(
    names: Mapping[str, str | None], folder: Path, split: str | None, purpose: str, reading: Reading
) -> list[str]:
    """The names to read of those in a folder, given the split of each; None for a name that is of no split.

    Without a wanted split: for training the train split, or what is in no split; for evaluation the validation
    split, then the test split, then everything. Raises CorpusError if there is none.
    """
    there = {found for found in names.values() if found is not None}
    wanted = next((found for found in WANTED[purpose] if found in there), None) if split is None else split
    if wanted is None and purpose == "training" and there:
        chosen = [name for name, found in names.items() if found is None]
    elif wanted is None or wanted == ALL:
        chosen = list(names)
    else:
        chosen = [name for name, found in names.items() if found == wanted]
        reading.split = wanted
    if not chosen:
        lacks = f"no {wanted or 'train'} split"
        advice = some([f"{folder}@{found}" for found in sorted(there)])
        raise CorpusError(f"{folder}: {lacks}: give {advice or folder} to read what is there")
    for name, found in names.items():
        if name not in chosen:
            reason = "in no split" if found is None else f"{found} split"
            reading.left_out.setdefault(reason, []).append(name)
    return chosen


def find_files(folder: Path, split: str | None, purpose: str, reading: Reading) -> list[Path]:
    """The files of a folder and the folders in it that are read, sorted by path."""
    found: dict[str, str | None] = {}
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if PAPERS.match(path.name) or SETTINGS.fullmatch(path.name):
            reading.left_out.setdefault("no data", []).append(name)
        elif kind_of(path):
            found[name] = _split_of(path.relative_to(folder))
        else:
            reading.left_out.setdefault("other kinds of files", []).append(name)
    if not found:
        papers = reading.left_out.get("no data")
        advice = f", or the name of one file of it ({some(papers)} were left out)" if papers else ""
        raise CorpusError(f"{folder}: no text in this folder: expected files that end in {expected_kinds()}{advice}")
    twice = next((name for name in found for packing in PACKINGS if name + packing in found), None)
    if twice is not None:
        raise CorpusError(f"{folder}: {twice} is there packed too, and would be read twice: remove one of the two")
    return [folder / name for name in choose(found, folder, split, purpose, reading)]


def check_regular(path: Path) -> None:
    """Raise CorpusError for what is no file: reading a pipe or a device may never end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFSOCK: "a socket"}.get(stat.S_IFMT(mode))
        raise CorpusError(f"{path}: is {kind or 'no regular file'}: write what it holds to a file, and give that")


def _walk(folder: Path) -> list[Path]:
    paths: list[Path] = []

    def refuse(error: OSError) -> None:
        raise CorpusError(f"{error.filename}: cannot be read: {error.strerror}")

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        paths += [Path(root, name) for name in names if not name.startswith(".")]
        if len(paths) > MAX_FILES:
            raise CorpusError(f"{folder}: has more than {MAX_FILES:,} files: give the folder that the text is in")
    return sorted(paths)


def _split_of(path: Path) -> str | None:
    """The split of a file, by the nearest name that says one. The name of a .md file is a title and says none."""
    kind = kind_of(path)
    words = SPLIT_IN_NAME.findall(path.name[: path.name.lower().rindex(kind)]) if kind != ".md" else []
    if words:
        return WORDS[words[-1].lower()]
    return next((WORDS[part.lower()] for part in reversed(path.parts[:-1]) if part.lower() in WORDS), None)
