"""Folders around a GGUF file: that of `export gguf` in a release, Ollama's with a Modelfile, LM Studio's library."""

from __future__ import annotations

import re
from pathlib import Path

from intaglio.errors import ConfigError
from intaglio.packed.outputs import MARKER

MODELFILE = "Modelfile"
# Ollama's instructions, as far as an export writes them; PARAMETER may stand more than once.
INSTRUCTION = re.compile(r"(FROM|DRAFT|RENDERER|PARSER) (\S+)|PARAMETER (\w+) (\S+)")
BESIDE = ("README.md", MARKER)  # what may stand in a folder of GGUF files without being one


def is_ollama(path: Path) -> bool:
    """Whether a path is a folder with a Modelfile."""
    return (path / MODELFILE).is_file()


def holds_ggufs(path: Path) -> bool:
    """Whether a path is a folder in which, at any depth, lie GGUF files and nothing else."""
    if not path.is_dir():
        return False
    names = [file.name for file in path.rglob("*") if file.is_file() and file.name not in BESIDE]
    return bool(names) and all(name.endswith(".gguf") for name in names)


def parse_modelfile(path: Path) -> dict[str, str]:
    """Instructions of a Modelfile, PARAMETER ones by the parameter's name.

    Raises ConfigError for a line that is no instruction, one that stands twice, and for no FROM.
    """
    found: dict[str, str] = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = INSTRUCTION.fullmatch(line.strip())
        key = (match[1] or match[3]) if match else ""
        if match is None or key in found:
            raise ConfigError(
                f"{path}: line {number}: {line!r}: expected FROM, DRAFT, RENDERER, PARSER or PARAMETER once"
            )
        found[key] = match[2] or match[4]
    if "FROM" not in found:
        raise ConfigError(f"{path}: no FROM: expected the path of a GGUF file")
    return found


def bundled_gguf(folder: Path) -> Path:
    """The one GGUF file that such a folder is about. ConfigError if it is missing or not the only one."""
    if is_ollama(folder):
        named = parse_modelfile(folder / MODELFILE)
        if "DRAFT" in named and not (folder / named["DRAFT"]).is_file():
            raise ConfigError(f"{folder / named['DRAFT']}: no such file: {MODELFILE} names it as the drafter")
        return folder / named["FROM"]
    files = sorted(folder.rglob("*.gguf"))
    if len(files) != 1:
        raise ConfigError(f"{folder}: {len(files)} GGUF files: expected one")
    return files[0]
