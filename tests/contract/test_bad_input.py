"""Bad input: one clear message, an exit code, no traceback, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from intaglio.packed import store
from intaglio.packed.outputs import mark
from intaglio.train import lesson
from intaglio.train import quantize as quantize_module
from tests.support.cases import Case
from tests.support.cli import LOGS, contents, intaglio
from tests.support.repack import resave

SCHEDULE = {"tokens": 8 * 64, "batch_size": 2, "sequence_length": 32}
SETTINGS = [f"--set=schedule.{key}={value}" for key, value in SCHEDULE.items()]
SETTINGS += ["--eval-tokens=256", "--precision=no", "--no-compile"]
TEXT = "The whale swam past the ship, and nobody on it said a word.\n" * 40
WEIGHT = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def checkpoint(gemma4: Case, tmp_path: Path) -> Path:
    """A tiny model that a test may damage."""
    return Path(shutil.copytree(gemma4.checkpoint, tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


def everything(folder: Path) -> dict[str, bytes | None]:
    """Every file with its bytes, and every folder, hidden ones too."""
    return {str(p.relative_to(folder)): None for p in folder.rglob("*")} | contents(folder)  # type: ignore[operator]


def refused(*arguments: object, says: str, within: Path, code: int = 2) -> str:
    """Run a command that must fail with such a message and leave a folder as it was."""
    before = everything(within)
    outcome = intaglio(*arguments)
    assert outcome.code == code, outcome.err
    assert re.search(says, outcome.error), outcome.error
    assert everything(within) == before
    return outcome.error


def train(model: Path, data: Path, out: Path, *more: object) -> list[object]:
    return ["train", model, f"--data={data}", f"--out={out}", *SETTINGS, *more]


def reads_a_model(model: Path, text: Path, out: Path) -> list[list[object]]:
    """Every verb that reads a checkpoint."""
    return [
        ["plan", model],
        ["quantize", model, f"--out={out}"],
        train(model, text, out),
        ["eval", model, f"--original={model}", f"--text={text}", "--eval-tokens=256"],
    ]


# Models


def test_a_folder_that_is_not_there(text: Path, tmp_path: Path) -> None:
    for command in reads_a_model(tmp_path / "none", text, tmp_path / "out"):
        refused(*command, says=r"none.*: expected a model folder", within=tmp_path)


def test_a_folder_without_config(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    (checkpoint / "config.json").unlink()
    for command in reads_a_model(checkpoint, text, tmp_path / "out"):
        says = r"model: weights without config \(.*model/config\.json: no such file\): put the config\.json of"
        refused(*command, says=says, within=tmp_path)
    (checkpoint / "model.safetensors").unlink()
    refused("plan", checkpoint, says=r"model/config\.json: no such file: expected a model folder", within=tmp_path)


def test_a_folder_without_weights(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert intaglio("plan", checkpoint).code == 0  # which needs none
    for command in reads_a_model(checkpoint, text, tmp_path / "out")[1:]:
        refused(*command, says=r"model: no model\.safetensors.*expected weights", within=tmp_path)


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


CONFIGS = {
    "empty": ("", "not valid JSON"),
    "cut off": ('{"model_type": "gemma4', "not valid JSON"),
    "no UTF-8": ('{"model_type": "\udcff"}', "cannot be read as UTF-8"),
    "nested too deep": (nested(100_000), "not valid JSON"),
    "a list": ("[]", "expected a JSON object, got list"),
    "no model_type": ("{}", "no model_type"),
    "another architecture": (
        '{"model_type": "llama"}',
        "model_type 'llama': expected one of gemma2, gemma3, gemma3_text, gemma4, .*gemma4_unified_text",
    ),
    "a model_type that is a list": ('{"model_type": ["gemma4_text"]}', r"model_type \['gemma4_text'\]: expected"),
    "a text_config without model_type": ('{"model_type": "x", "text_config": {}}', "model_type None: expected"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_cannot_be_read(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    content, says = CONFIGS[kind]
    (checkpoint / "config.json").write_text(content, "utf-8", errors="surrogateescape")
    for command in (["plan", checkpoint], ["quantize", checkpoint, f"--out={tmp_path / 'out'}"]):
        refused(*command, says=rf"model(/config\.json)?: .*{says}", within=tmp_path)


CONTRADICTIONS: dict[str, Any] = {
    "hidden_size": -256,
    "num_attention_heads": 0,
    "num_hidden_layers": "four",
    "vocab_size": None,
    "layer_types": ["sliding_attention"],
    "head_dim": 63,
    "num_kv_shared_layers": 9,
    "hidden_activation": "no such function",
}


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_a_config_that_contradicts_itself(key: str, checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {key: CONTRADICTIONS[key]}))
    says = (
        r"model: transformers cannot (read|build) this config: \w+Error: .|shape|hidden_size = -256: expected a number"
    )
    refused("quantize", checkpoint, f"--out={tmp_path / 'out'}", says=says, within=tmp_path)


def test_a_config_of_another_model_than_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))
    says = r"mlp\..*has shape \[\d+, \d+\], the config says .*: config and weights are of different models"
    refused("plan", checkpoint, says=says, within=tmp_path)
    assert intaglio("plan", checkpoint / "config.json").code == 0  # by itself it is a config like any other


PLANS = {
    "--budget=8": r"--budget '8': no unit: expected for example 8GB \(10\^9 bytes\) or 8GiB \(2\^30\)",
    "--budget=8XB": r"--budget '8XB': expected an amount of memory, for example 8GB",
    "--budget=-8GB": r"--budget '-8GB': expected an amount of memory",
    "--budget=GB": r"--budget 'GB': expected an amount of memory",
    "--budget=0GB": r"--budget '0GB': expected an amount of memory",
    "--budget=1e99GB": r"--budget '1e99GB': expected an amount of memory",
    "--metadata-bytes=15800000": r"--metadata-bytes '15800000': no unit",
    "--context=0": r"--context '0': expected a number of tokens, for example 4096, 32k",
    "--context=32kk": r"--context '32kk': expected a number of tokens",
    "--gpus=1000": r"1000 GPUs: expected 1 to 32, the sequences of a batch",
    "--drafter=e4b": r"e4b: model_type gemma4_text is no drafter: expected an assistant model",
    "--drafter=e4b-assistant": r"drafts for a model of width 2560, this one's is 1536: choose its own drafter",
    "--drafter=nobody": r"nobody: no such folder or file, and no model that intaglio knows by name",
}


@pytest.mark.parametrize("option", PLANS)
def test_what_a_plan_cannot_answer(option: str, tmp_path: Path) -> None:
    refused("plan", "e2b", option, says=PLANS[option], within=tmp_path)


def test_a_plan_page_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "plan.html").write_text("mine")
    refused("plan", "e2b-assistant", f"--html={tmp_path / 'plan.html'}", says="already exists", within=tmp_path)


def test_a_text_model_whose_layers_all_share(tmp_path: Path, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_kv_shared_layers": 4}))
    says = "num_kv_shared_layers = 4: no layer has keys and values to share: only a drafter may have so many"
    refused("plan", checkpoint, says=says, within=tmp_path)


def change_weights(checkpoint: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value: float, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    change_weights(checkpoint, lambda weights: weights[WEIGHT][3, 5].fill_(value))
    says = rf"{re.escape(WEIGHT)}: 1 values are NaN or Inf, the first at index \(3, 5\): repair"
    refused("quantize", checkpoint, f"--out={tmp_path / 'out'}", says=says, within=tmp_path)
    refused(*train(checkpoint, text, tmp_path / "out"), says=says, within=tmp_path)


def test_weights_beyond_the_format(checkpoint: Path, tmp_path: Path) -> None:
    change_weights(checkpoint, lambda weights: weights[WEIGHT][3, 5].fill_(1e9))
    says = rf"{re.escape(WEIGHT)}: .*float16 scales end at 65504"
    refused("quantize", checkpoint, f"--out={tmp_path / 'out'}", says=says, within=tmp_path)


def test_a_tensor_that_is_missing(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.pop(WEIGHT))
    for command in reads_a_model(checkpoint, text, tmp_path / "out")[1:]:
        refused(*command, says=rf"1 tensors are missing, the first is {re.escape(WEIGHT)}", within=tmp_path)


def test_a_tensor_of_another_shape(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.update({WEIGHT: torch.zeros(8, 8)}))
    for command in reads_a_model(checkpoint, text, tmp_path / "out")[1:]:
        refused(*command, says=rf"{re.escape(WEIGHT)} has shape \[8, 8\], the config says", within=tmp_path)


def test_columns_that_do_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"intermediate_size": 272}))
    says = r"layers\.0\.mlp\.down_proj\.weight: shape \[256, 272\].*multiple of 32.*\[weights\.odd\] with match = .*f16"
    refused("quantize", checkpoint, f"--out={tmp_path / 'out'}", says=says, within=tmp_path)


# Damaged and hostile files


def header(length: int, tail: bytes) -> bytes:
    return length.to_bytes(8, "little") + tail


def safetensors_of(tensors: dict[str, dict[str, Any]], data: bytes = b"\0" * 64) -> bytes:
    text = json.dumps(tensors).encode()
    return header(len(text), text + data)


HOSTILE = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:100],
    "cut in the data": lambda data: data[:-100],
    "a header of 2^60 bytes": lambda data: header(2**60, data[8:]),
    "a header that is no JSON": lambda data: header(4, b"\xff\xff\xff\xff"),
    "offsets past the end": lambda data: safetensors_of(
        {WEIGHT: {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ),
    "offsets that run backwards": lambda data: safetensors_of(
        {WEIGHT: {"dtype": "F32", "shape": [4], "data_offsets": [32, 16]}}
    ),
    "a shape that overflows": lambda data: safetensors_of(
        {WEIGHT: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]}}
    ),
    "a pickle": lambda data: pickle.dumps({"weight": 1}),
}
hostile = pytest.mark.parametrize("kind", HOSTILE)


@hostile
def test_a_damaged_checkpoint(kind: str, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(HOSTILE[kind](path.read_bytes()))
    for command in reads_a_model(checkpoint, text, tmp_path / "out")[1:3]:
        refused(*command, says=r"model\b.*(not a valid safetensors file|cannot load this checkpoint)", within=tmp_path)


@hostile
def test_a_damaged_packed_model(kind: str, gemma4: Case, tmp_path: Path) -> None:
    packed = Path(shutil.copytree(gemma4.packed.path, tmp_path / "packed"))
    path = packed / "packed.safetensors"
    path.write_bytes(HOSTILE[kind](path.read_bytes()))
    says = r"packed\.safetensors: not a valid safetensors file.*download or export it again"
    refused("export", packed, "gguf", f"--out={tmp_path / 'x.gguf'}", says=says, within=tmp_path)
    refused("export", packed, "hf", f"--out={tmp_path / 'x'}", says=says, within=tmp_path)
    refused("verify", packed, gemma4.gguf, says=says, within=tmp_path)


@hostile
def test_a_damaged_transformers_folder(kind: str, gemma4: Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gemma4.hf, tmp_path / "hf"))
    path = folder / "model.safetensors"
    path.write_bytes(HOSTILE[kind](path.read_bytes()))
    says = r"hf/model\.safetensors: not a valid safetensors file"
    refused("verify", gemma4.packed.path, folder, says=says, within=tmp_path)


GGUFS = {
    "empty": lambda data: b"",
    "not GGUF": lambda data: b"ELF" + data[3:],
    "cut in the keys": lambda data: data[:2000],
    "cut in the data": lambda data: data[:-4096],
    "2^60 tensors": lambda data: data[:8] + (2**60).to_bytes(8, "little") + data[16:],
    "2^60 keys": lambda data: data[:16] + (2**60).to_bytes(8, "little") + data[24:],
    "a key of 2^60 bytes": lambda data: data[:24] + (2**60).to_bytes(8, "little") + data[32:],
}


@pytest.mark.parametrize("kind", GGUFS)
def test_a_damaged_gguf(kind: str, gemma4: Case, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(GGUFS[kind](gemma4.gguf.read_bytes()))
    refused("verify", gemma4.packed.path, path, says=r"x\.gguf: not a valid GGUF file", within=tmp_path)
    command = ["eval", path, f"--original={gemma4.checkpoint}", f"--text={text}", "--eval-tokens=256"]
    refused(*command, says=r"x\.gguf: ", within=tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "gone.safetensors"}}',
        '{"weight_map": {"a": "gone.safetensors", "b": 3}}',
    ],
)
def test_a_damaged_shard_index(index: str, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(index)
    says = r"model\.safetensors\.index\.json: (not a shard index|not valid JSON|expected a JSON object|lists)"
    refused("quantize", checkpoint, f"--out={tmp_path / 'out'}", says=says, within=tmp_path)


def in_two_shards(checkpoint: Path) -> dict[str, str]:
    """Split a checkpoint into two shards with an index; returns the index's map."""
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, checkpoint / file, {"format": "pt"})
    index = {name: file for file, held in files.items() for name in held}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return index


def test_shards_that_lack_or_repeat_a_tensor(checkpoint: Path, tmp_path: Path) -> None:
    index = in_two_shards(checkpoint)
    file, other = index[WEIGHT], {"a.safetensors": "b.safetensors"}.get(index[WEIGHT], "a.safetensors")
    assert intaglio("plan", checkpoint).code == 0
    weights, others = load_file(checkpoint / file), load_file(checkpoint / other)
    save_file(others | {WEIGHT: weights[WEIGHT]}, checkpoint / other, {"format": "pt"})
    for command in (["plan", checkpoint], ["quantize", checkpoint, f"--out={tmp_path / 'out'}"]):
        says = rf"{re.escape(WEIGHT)} is in a\.safetensors and in b\.safetensors: expected once"
        refused(*command, says=says, within=tmp_path)
    save_file(others, checkpoint / other, {"format": "pt"})
    save_file({n: w for n, w in weights.items() if n != WEIGHT}, checkpoint / file, {"format": "pt"})
    says = rf"index\.json: puts {re.escape(WEIGHT)} into {file}, but no shard holds it"
    refused("plan", checkpoint, says=says, within=tmp_path)
    (checkpoint / file).unlink()
    refused("plan", checkpoint, says=rf"index\.json: lists '{file}', which is not a file", within=tmp_path)


@pytest.mark.parametrize("key", ["config", "provenance", "recipe"])
@pytest.mark.parametrize("value", ["", "{", nested(100_000), "name = " + "[" * 100_000], ids=range(4))
def test_damaged_metadata_of_a_packed_model(key: str, value: str, gemma4: Case, tmp_path: Path) -> None:
    path = Path(shutil.copytree(gemma4.packed.path, tmp_path / "packed")) / "packed.safetensors"
    resave(path.parent, **{key: value})
    command = ["export", path.parent, "hf", f"--out={tmp_path / 'x'}"]
    refused(*command, says=r"packed\.safetensors", within=tmp_path)


def test_an_artifact_of_another_model_is_no_traceback(gemma4: Case, cases: dict[str, Case], tmp_path: Path) -> None:
    for artifact in (cases["gemma4-dense"].gguf, cases["gemma4-dense"].hf):
        refused("verify", gemma4.packed.path, artifact, says="NOT exact", within=tmp_path, code=3)
    says = r"checkpoint: a checkpoint of floats: `intaglio quantize .*checkpoint --out packed` makes a packed model"
    refused("verify", gemma4.checkpoint, gemma4.gguf, says=says, within=tmp_path)


# Nothing is executed


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_weights_are_not_loaded(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    for command in reads_a_model(checkpoint, text, tmp_path / "out")[1:]:
        refused(*command, says=r"model: no model\.safetensors, and pytorch_model\.bin is a pickle", within=tmp_path)


def test_code_in_a_model_folder_does_not_run(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    evil = f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\n"
    (checkpoint / "evil.py").write_text(evil)
    config = json.loads((checkpoint / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(*train(checkpoint, text, tmp_path / "out"), says="no usable tokenizer", within=tmp_path)
    assert intaglio("quantize", checkpoint, f"--out={tmp_path / 'out'}").code == 0
    assert not (tmp_path / "exploded").exists()


def test_a_chat_template_stays_in_its_sandbox(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{{ messages.__class__.__base__.__subclasses__() }}")
    data = tmp_path / "chat.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    says = r"chat\.jsonl:1: the tokenizer's chat template refuses these messages"
    refused(*train(checkpoint, data, tmp_path / "out"), says=says, within=tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01", b"garbage", "pickle"])
def test_held_out_tokens_that_cannot_be_read(content: bytes | str, gemma4: Case, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("stock", "fitted", "packed"):
        shutil.copytree(gemma4.packed.path, run / name)
    if content == "pickle":
        np.save(run / "heldout.npy", np.array([Bomb(tmp_path / "exploded")], dtype=object), allow_pickle=True)
    else:
        (run / "heldout.npy").write_bytes(content)  # type: ignore[arg-type]
    command = ["report", run, f"--original={gemma4.checkpoint}"]
    refused(*command, says=r"heldout\.npy: cannot be read.*--text", within=tmp_path)


def test_a_report_on_a_folder_without_a_run(gemma4: Case, tmp_path: Path) -> None:
    command = ["report", tmp_path, f"--original={gemma4.checkpoint}"]
    refused(*command, says=r"no packed\.safetensors: expected the folder that train or quantize wrote", within=tmp_path)


# Recipes

RECIPES = {
    "not there": (None, "no recipe"),
    "no TOML": ("name = ", "not valid TOML"),
    "no UTF-8": (b"name = '\xff'", "cannot be read as UTF-8"),
    "nested too deep": ("a = " + "[" * 100_000, "not valid TOML"),
    "an unknown key": ('name = "x"\nspeed = 3', "unknown key 'speed': expected one of"),
    "a rule that matches nothing": (
        'name = "x"\n[weights.all]\nmatch = "."\ngrid = "f32"\n[weights.more]\nroles = ["mlp"]\ngrid = "f16"',
        r"\[weights\.more\] matches no tensor",
    ),
    "a tensor without a rule": ('name = "x"\n[weights.a]\nroles = ["mlp"]\ngrid = "q4_0"', r"no rule covers model\."),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_recipe_that_cannot_be_used(kind: str, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    content, says = RECIPES[kind]
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in reads_a_model(checkpoint, text, tmp_path / "out")[:3]:
        refused(*command, f"--recipe={path}", says=says, within=tmp_path)


def test_an_override_that_cannot_be_used(checkpoint: Path, tmp_path: Path) -> None:
    says = "unknown key 'speed': expected one of assistant_only, batch_size"
    refused("plan", checkpoint, "--set=schedule.speed=3", says=says, within=tmp_path)


# Tokenizers and text


def change_tokenizer(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = checkpoint / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    change(tokenizer)
    path.write_text(json.dumps(tokenizer), "utf-8")


def add_words(tokenizer: dict[str, Any]) -> None:
    entry = dict(tokenizer["added_tokens"][-1]) | {"special": False}
    tokenizer["added_tokens"] += [entry | {"id": 4096 + i, "content": word} for i, word in enumerate(["whale", "zzz"])]


def test_a_tokenizer_with_more_tokens_than_the_model(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    change_tokenizer(checkpoint, add_words)
    says = r"4096, .*(vocabulary of|has) 4096.*(use the tokenizer that belongs|belongs to another model)"
    refused(*train(checkpoint, text, tmp_path / "out"), says=says, within=tmp_path)
    text.write_text(TEXT.replace("whale", "shark"))  # a text that needs none of the new words: still refused at once
    refused(*train(checkpoint, text, tmp_path / "out"), says=says, within=tmp_path)
    assert intaglio("quantize", checkpoint, f"--out={tmp_path / 'packed'}").code == 0
    command = ["export", tmp_path / "packed", "gguf", f"--out={tmp_path / 'x.gguf'}"]
    refused(*command, says=says, within=tmp_path)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"model": 3}', nested(100_000)])
def test_a_tokenizer_that_cannot_be_read(content: str | None, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    path = checkpoint / "tokenizer.json"
    path.unlink() if content is None else path.write_text(content)
    refused(*train(checkpoint, text, tmp_path / "out"), says="model.*tokenizer", within=tmp_path)


TEXTS = {
    "an empty file": ("x.txt", b"", r"x\.txt: empty: expected text"),
    "blank lines": ("x.txt", b" \n\n  \n", r"x\.txt: empty: expected text"),
    "a sentence": ("x.txt", b"One.", r"x\.txt: got \d+ tokens: expected 32 or more, the length of one sequence"),
    "one sequence": ("x.txt", TEXT[:180].encode(), r"1 sequence: expected two or more, one of them to measure on"),
    "no UTF-8": ("x.txt", b"good\nbad \xff\n", r"x\.txt:2: not valid UTF-8"),
    "no text": ("x.bin", b"\0", r"x\.bin: unknown kind of file: expected a name that ends in"),
    "cut JSON": ("x.jsonl", b'{"text": "good"}\n{"text": "ba', r"x\.jsonl:2: not valid JSON"),
    "JSON of another kind": ("x.jsonl", b"3\n", r"x\.jsonl:1: got int: expected an object with text, messages,"),
    "JSON without text": ("x.jsonl", b'{"body": "x"}\n', r"x\.jsonl:1: got the keys body: .*--column text=body"),
    "JSON nested too deep": ("x.jsonl", nested(100_000).encode() + b"\n", r"x\.jsonl:1: not valid JSON"),
    "a cut archive": ("x.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0", r"x\.jsonl\.gz: cannot be read"),
    "no parquet": ("x.parquet", b"PAR1", r"x\.parquet: cannot be read"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_that_cannot_be_used(kind: str, gemma4: Case, tmp_path: Path) -> None:
    name, content, says = TEXTS[kind]
    (tmp_path / name).write_bytes(content)
    refused(*train(gemma4.checkpoint, tmp_path / name, tmp_path / "out"), says=says, within=tmp_path)


def test_text_that_is_not_there(gemma4: Case, text: Path, tmp_path: Path) -> None:
    says = r"none\.txt: no such file or folder"
    refused(*train(gemma4.checkpoint, tmp_path / "none.txt", tmp_path / "out"), says=says, within=tmp_path)
    command = train(gemma4.checkpoint, text, tmp_path / "out", f"--text={tmp_path / 'none.txt'}")
    refused(*command, says=says, within=tmp_path)


# Options


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--precision=fp8", "precision 'fp8': expected bf16 or no"),
        ("--checkpoint-every=-1", "checkpoint_every = -1: expected 0 or more"),
        ("--eval-tokens=0", "--eval-tokens|at most 0 tokens: expected"),
    ],
)
def test_an_option_that_cannot_be_used(option: str, says: str, gemma4: Case, text: Path, tmp_path: Path) -> None:
    refused(*train(gemma4.checkpoint, text, tmp_path / "out", f"--text={text}", option), says=says, within=tmp_path)


# Training that goes wrong


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
    value: float, gemma4: Case, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = lesson.chunked_kl, []

    def spoiled(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return plain(*args, **kwargs) * (value if len(calls) == 4 else 1)

    monkeypatch.setattr(lesson, "chunked_kl", spoiled)
    outcome = intaglio(*train(gemma4.checkpoint, text, tmp_path / "out", "--checkpoint-every=2"))
    assert outcome.code == 2
    assert re.search(r"loss is (nan|inf) at step 4: .*step-00000002: lower schedule\.lr", outcome.error)
    assert set(contents(tmp_path / "out")) == {
        *LOGS,
        "checkpoints/step-00000002/state.safetensors",
        "checkpoints/step-00000002/meta.json",
    }


# Outputs


def test_outputs_that_exist_are_kept(gemma4: Case, text: Path, tmp_path: Path) -> None:
    packed, out = gemma4.packed.path, tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    (tmp_path / "x.gguf").write_text("years of work")
    exists = "already exists: choose another output"
    refused("quantize", gemma4.checkpoint, f"--out={out}", says=exists, within=tmp_path)
    refused("export", packed, "hf", f"--out={out}", says=exists, within=tmp_path)
    refused("export", packed, "gguf", f"--out={tmp_path / 'x.gguf'}", says=exists, within=tmp_path)
    refused(*train(gemma4.checkpoint, text, out), says="not empty and holds no run", within=tmp_path)
    refused(*train(gemma4.checkpoint, text, out, "--resume"), says="not empty and holds no run", within=tmp_path)
    refused("demo", f"--out={out}", "--replace", says="already exists", within=tmp_path)


def test_outputs_of_another_kind_are_not_replaced(gemma4: Case, tmp_path: Path) -> None:
    packed, out = gemma4.packed.path, tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for target in ("gguf", "hf"):
        command = ["export", packed, target, f"--out={out}", "--replace"]
        refused(*command, says="out: holds no model that intaglio wrote, so it is not replaced", within=tmp_path)
    mark(out)
    command = ["export", packed, "gguf", f"--out={out}", "--replace"]
    refused(*command, says="out: is a folder, and the output is not", within=tmp_path)


def test_outputs_below_a_file(gemma4: Case, text: Path, tmp_path: Path) -> None:
    out = text / "out"
    for command in (
        ["quantize", gemma4.checkpoint, f"--out={out}"],
        ["export", gemma4.packed.path, "gguf", f"--out={out}"],
        train(gemma4.checkpoint, text, out),
    ):
        refused(*command, says=r"text\.txt.*cannot be written", within=tmp_path)


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_while_packing_and_exporting(gemma4: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.SafetensorsWriter, "write", no_space)
    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", no_space)
    full = "out: cannot be written: the disk is full: free some space"
    packed, out = gemma4.packed.path, tmp_path / "out"
    refused("quantize", gemma4.checkpoint, f"--out={out}", says=full, within=tmp_path)
    refused("export", packed, "hf", f"--out={out}", says=full, within=tmp_path)
    refused("export", packed, "gguf", f"--out={out}", says=full, within=tmp_path)


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """The operating system's own limit: a write beyond it fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size_bytes", [0, 1000, 300_000, 1_500_000])
def test_writes_that_fail_half_way(size_bytes: int, gemma4: Case, text: Path, tmp_path: Path) -> None:
    packed, out = gemma4.packed.path, tmp_path / "out"
    commands = (
        ["quantize", gemma4.checkpoint, f"--out={out}"],
        ["export", packed, "hf", f"--out={out}"],
        ["export", packed, "gguf", f"--out={out}"],
    )
    for command in commands:
        before = everything(tmp_path)
        with files_of_at_most(size_bytes):
            outcome = intaglio(*command)
        assert outcome.code == 2
        assert re.search(r"out: cannot be written: (File too large|the disk is full)", outcome.error), outcome.error
        assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("size_bytes", "left"),
    [(0, set()), (5, set()), (200, set()), (100_000, {"run.json"}), (2_000_000, LOGS - {"run.log"})],
    ids=["lock", "half a lock", "half a run record", "first codes", "checkpoint"],
)
def test_a_full_disk_while_training(size_bytes: int, left: set[str], gemma4: Case, text: Path, tmp_path: Path) -> None:
    with files_of_at_most(size_bytes):
        outcome = intaglio(*train(gemma4.checkpoint, text, tmp_path / "out", "--checkpoint-every=2"))
    assert outcome.code == 2
    assert re.search(r"out/\S+: cannot be written: (File too large|the disk is full)", outcome.error), outcome.error
    assert set(contents(tmp_path / "out")) - {"run.log"} == left


# Ctrl-C


def test_ctrl_c_leaves_nothing_half_written(gemma4: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, done = quantize_module.fit_tensor, []

    def interrupted(*args: Any) -> Any:
        done.append(1)
        if len(done) == 5:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(quantize_module, "fit_tensor", interrupted)
    command = ["quantize", gemma4.checkpoint, f"--out={tmp_path / 'out'}"]
    refused(*command, says="^stopped; a training run continues", within=tmp_path, code=130)
