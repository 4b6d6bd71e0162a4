"""Strange inputs by kind: each is one change of a tiny model's folder, and says what must come of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from intaglio.errors import IntaglioError
from intaglio.formats.speech import read_speech
from intaglio.packed.assets import copy_assets
from intaglio.packed.checkpoint import check_weights, checkpoint_spec, load_model
from intaglio.plan.plan import make_plan

# What must come of an input: the base's logits, bit for bit; or the logits that transformers has of the folder itself.
# Any other word is a pattern that the one message of a refusal matches.
SAME, ITSELF = "same", "itself"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n"  # what a clone without git-lfs has
IDS = torch.arange(3, 35)[None]
Tensors = dict[str, Tensor]


class Input(NamedTuple):
    """One input. make: changes a folder. right: what must come of it. found: how it was when it was first tried:
    "right", "silent" (read as something else, or in contradiction to itself), "traceback", or "misleading"."""

    make: Callable[[Path], object]
    right: str
    found: str = "right"


class Base(NamedTuple):
    """The folder that inputs are copies of, what it holds, and its logits."""

    folder: Path
    tensors: Tensors
    logits: Tensor

    @classmethod
    def of(cls, folder: Path) -> Base:
        return cls(folder, load_file(folder / "model.safetensors"), logits_of(load_model(folder)))


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def write(folder: Path, name: str, content: Any) -> None:
    """A file in another form: text, bytes, tensors, or anything else as JSON."""
    path = folder / name
    path.unlink(missing_ok=True)  # a link to the base's
    if name.endswith(".safetensors") and isinstance(content, dict):
        save_file({name: tensor.contiguous().clone() for name, tensor in content.items()}, path, {"format": "pt"})
    else:
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def file(name: str, content: Any) -> Callable[[Path], None]:
    return lambda folder: write(folder, name, content)


def said(name: str, *without: str, **values: Any) -> Callable[[Path], None]:
    """A JSON file with other values, and without some keys."""

    def make(folder: Path) -> None:
        found = json.loads((folder / name).read_text("utf-8")) if (folder / name).is_file() else {}
        write(folder, name, {key: value for key, value in found.items() if key not in without} | values)

    return make


def text(name: str, change: Callable[[str], str | bytes]) -> Callable[[Path], None]:
    return lambda folder: write(folder, name, change((folder / name).read_text("utf-8")))


def tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    return lambda folder: write(folder, "model.safetensors", change(load_file(folder / "model.safetensors")))


def judge(case: Input, base: Base, tmp_path: Path) -> None:
    """Make the input, read it by everything that reads a model, and compare the outcome with what is right."""
    folder = Path(shutil.copytree(base.folder, tmp_path / "model", copy_function=os.link))
    case.make(folder)
    (tmp_path / "assets").mkdir()
    try:
        spec = checkpoint_spec(folder)
        make_plan(spec, "q4_0")
        check_weights(folder, spec)
        logits = logits_of(load_model(folder))
        copy_assets(folder, tmp_path / "assets")
        read_speech(folder, spec.layer_config.to_dict())
    except IntaglioError as error:
        assert case.right not in (SAME, ITSELF), error
        assert str(folder) in str(error)
        assert re.search(case.right, str(error)), error
        return
    assert case.right in (SAME, ITSELF), "read, though it contradicts itself"
    expected = base.logits
    if case.right == ITSELF:
        expected = logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        assert not torch.equal(expected, base.logits)
    assert torch.equal(logits, expected)
