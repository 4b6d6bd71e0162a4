"""The texts of the quality table: the calibration text that all methods share, and held-out windows of four domains.

    python benchmarks/quality/texts.py MODEL WORK

WORK/calibration.npy        int64 [N, 512], the beginning of the bundled training text, as `intaglio quantize` packs it
WORK/training.npy           int64 [N, 256], the beginning of the same text, for peers that train
WORK/domains/NAME.npy       int64 [N, 256], each window behind a bos
WORK/texts.json             where each text came from, with the sha256 of its characters, and bytes a token

Nothing of the other domains is in the repository: they come from installed packages and from one wheel.

    held-out    the bundled held-out text: the domains that the bundled model was trained on
    numpy       docstrings of numpy (BSD-3-Clause): English prose about a library that is not in the bundled text
    code        source of Python's own standard library (PSF licence); the bundled text has only its documentation
    french      translated messages of Django (BSD-3-Clause), from its wheel on PyPI
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import lzma
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from intaglio import load_corpus, load_tokenizer
from intaglio.plan.family import read_spec
from intaglio.tiny import HELDOUT_TEXT, TRAIN_TEXT
from intaglio.train.corpus import held_out_windows

DJANGO = "django==5.2.8"
MODULES = (
    *("argparse", "bdb", "calendar", "configparser", "csv", "datetime", "difflib", "fractions", "heapq", "inspect"),
    *("imaplib", "locale", "mailbox", "optparse", "pickle", "shutil", "statistics", "tarfile", "textwrap", "zipfile"),
)
NAMESPACES = ("", ".fft", ".linalg", ".ma", ".polynomial", ".random")
MIN_CHARS = 400  # shorter docstrings say little more than a signature
CALIBRATION_LENGTH, TRAINING_LENGTH, WINDOW = 512, 256, 256


def numpy_text() -> Iterator[str]:
    """Docstrings of numpy's public functions and classes, each once."""
    seen = set()
    for namespace in NAMESPACES:
        module: Any = np
        for part in namespace.split(".")[1:]:
            module = getattr(module, part)
        for name in sorted(dir(module)):
            text = None if name.startswith("_") else inspect.getdoc(getattr(module, name))
            if text and len(text) >= MIN_CHARS and text not in seen:
                seen.add(text)
                yield text


def code_text() -> Iterator[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    for name in MODULES:
        yield (folder / f"{name}.py").read_text("utf-8")


def french_text() -> Iterator[str]:
    """The translations in Django's wheel, one document for each catalogue."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, DJANGO]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if "/locale/fr/" in name and name.endswith("/django.po"):
                    yield "\n".join(messages(archive.read(name).decode("utf-8")))


def messages(catalogue: str) -> Iterator[str]:
    """The translated strings of a .po catalogue."""
    for block in re.findall(r'^msgstr(?:\[\d\])? ((?:".*"\n?)+)', catalogue, re.MULTILINE)[1:]:  # the first is its head
        text = "".join(ast.literal_eval(line) for line in block.splitlines())
        if text:
            yield text


def sources() -> dict[str, tuple[str, list[str]]]:
    """For each domain where its text comes from, and its documents."""
    with lzma.open(HELDOUT_TEXT, "rt", encoding="utf-8") as lines:
        held_out = [json.loads(line)["text"] for line in lines]
    return {
        "held-out": ("bundled held-out text", held_out),
        "numpy": (f"docstrings of numpy {np.__version__}", list(numpy_text())),
        "code": (f"standard library of Python {platform.python_version()}", list(code_text())),
        "french": (f"translations of {DJANGO}", list(french_text())),
    }


def write(model: Path, work: Path, tokens: int, calibration_tokens: int, training_tokens: int) -> None:
    tokenizer, vocabulary = load_tokenizer(model), read_spec(model).layer_config.vocab_size
    (work / "domains").mkdir(parents=True, exist_ok=True)
    for name, length, count in (
        ("calibration", CALIBRATION_LENGTH, calibration_tokens),
        ("training", TRAINING_LENGTH, training_tokens),
    ):
        corpus = load_corpus(TRAIN_TEXT, tokenizer, sequence_length=length, vocab_size=vocabulary, max_tokens=count)
        np.save(work / f"{name}.npy", corpus.tokens.astype(np.int64))
    found = {}
    for name, (source, documents) in sources().items():
        path = work / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), "utf-8")
        windows_NT = held_out_windows(path, tokenizer, length=WINDOW, vocab_size=vocabulary)
        wanted = (3 * tokens if name == "held-out" else tokens) // WINDOW
        chosen_NT = windows_NT[:: max(1, len(windows_NT) // wanted)][:wanted]  # from all over the text
        np.save(work / "domains" / f"{name}.npy", chosen_NT.astype(np.int64))
        whole = "".join(documents).encode()
        found[name] = {
            "source": source,
            "sha256": hashlib.sha256(whole).hexdigest(),
            "bytes_a_token": round(len(whole) / windows_NT.size, 2),
            "windows": len(chosen_NT),
        }
        print(name, found[name], flush=True)
    (work / "texts.json").write_text(json.dumps(found, indent=1), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--tokens", type=int, default=4096, help="held-out tokens of each domain; three times as many of the first"
    )
    parser.add_argument("--calibration-tokens", type=int, default=131072)
    parser.add_argument("--training-tokens", type=int, default=2_097_152)
    options = parser.parse_args()
    write(options.model, options.work, options.tokens, options.calibration_tokens, options.training_tokens)


if __name__ == "__main__":
    main()
