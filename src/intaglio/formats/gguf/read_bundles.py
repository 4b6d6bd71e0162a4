"""Folders around a GGUF file: that of `export gguf` in a release, Ollama's with a Modelfile, LM Studio's library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from intaglio.errors import ConfigError
from intaglio.formats.facts import TEMPLATE, compare_facts, strange_files
from intaglio.formats.gguf.read import compare_gguf
from intaglio.formats.speech import read_speech
from intaglio.formats.tally import Tally
from intaglio.formats.turns import SAMPLING, modelfile_facts
from intaglio.packed.model import PackedModel
from intaglio.packed.outputs import MARKER

MODELFILE = "Modelfile"
# Ollama's instructions, as far as an export writes them. A value of more than one word stands in quotes.
VALUE = r'(?:"""(?P<{0}long>.*?)"""|"(?P<{0}quoted>[^"\n]*)"|(?P<{0}plain>[^\s"]+))'
NAMES = r"(?P<name>FROM|DRAFT|RENDERER|PARSER|TEMPLATE)"
INSTRUCTION = re.compile(rf"{NAMES} {VALUE.format('a')}|PARAMETER (?P<parameter>\w+) {VALUE.format('b')}", re.DOTALL)
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


def parse_modelfile(path: Path) -> dict[str, Any]:
    """Instructions of a Modelfile, PARAMETER ones by the parameter's name; "stop" is a list.

    Raises ConfigError for a line that is no instruction, one that stands twice, and for no FROM.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    found: dict[str, Any] = {"stop": []}
    while text.strip():
        text = text.lstrip()
        line = text.partition("\n")[0]
        match = INSTRUCTION.match(text)
        if line.startswith("#"):
            text = text[len(line) :]
            continue
        key = (match["name"] or match["parameter"]) if match else ""
        end = text[match.end() :].partition("\n")[0].strip() if match else line
        if match is None or end or (key in found and key != "stop"):
            raise ConfigError(
                f"{path}: {line[:80]!r}: expected FROM, DRAFT, RENDERER, PARSER, TEMPLATE or PARAMETER once"
            )
        value = next(part for name, part in match.groupdict().items() if name[0] in "ab" and part is not None)
        found[key] = [*found["stop"], value] if key == "stop" else value
        text = text[match.end() :]
    if "FROM" not in found:
        raise ConfigError(f"{path}: no FROM: expected the path of a GGUF file")
    return found


def compare_ollama(packed: PackedModel, folder: Path, tally: Tally) -> None:
    """Count into `tally` what a folder's GGUF and Modelfile say, and what of it is not the packed model's."""
    named = parse_modelfile(folder / MODELFILE)
    files = [named[key] for key in ("FROM", "DRAFT") if key in named]
    compare_gguf(packed, bundled_gguf(folder), tally)
    spec = packed.plan.model.text_only()
    expected = modelfile_facts(read_speech(packed.path, spec.layer_config.to_dict()), spec.family.ollama_code)
    found = {name: named.pop(name, None) for name in expected}
    found |= {"stop": sorted(found["stop"])} | {name: _number(found[name]) for name in SAMPLING}
    compare_facts(TEMPLATE, expected, found, tally)
    strange = {name: value for name, value in named.items() if name not in ("FROM", "DRAFT")}
    compare_facts(TEMPLATE, {}, strange, tally)
    known = [MODELFILE, *(Path(name).as_posix() for name in files)]
    tally.unlike_facts += [f"{name}: a file that no export writes" for name in strange_files(folder, known)]


def _number(text: Any) -> Any:
    """A number of a Modelfile; the text where it is none, or not a finite one."""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", str(text)) else text


def compare_gguf_folder(packed: PackedModel, folder: Path, tally: Tally) -> None:
    """Count into `tally` what the only GGUF of a folder holds and what of it differs from the packed model."""
    compare_gguf(packed, bundled_gguf(folder), tally)


def bundled_gguf(folder: Path) -> Path:
    """The one GGUF file that such a folder is about. ConfigError if it is missing, elsewhere, or not the only one."""
    if is_ollama(folder):
        named = parse_modelfile(folder / MODELFILE)
        for path in _inside(folder, [named[key] for key in ("FROM", "DRAFT") if key in named]):
            if not path.is_file():
                raise ConfigError(f"{path}: no such file: {MODELFILE} names it")
        return folder / str(named["FROM"])
    files = sorted(folder.rglob("*.gguf"))
    if len(files) != 1:
        raise ConfigError(f"{folder}: {len(files)} GGUF files: expected one")
    return files[0]


def _inside(folder: Path, names: list[str]) -> list[Path]:
    """Paths that a Modelfile names. ConfigError for one outside of its folder, also through a link."""
    for name in names:
        if Path(name).is_absolute() or not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{folder / MODELFILE}: names {name}, which is not in this folder: export it again")
    return [folder / name for name in names]
