"""Mutated files: whoever reads one has a typed error or a right answer, in little time and memory."""

from __future__ import annotations

import contextlib
import json
import math
import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from intaglio.errors import ConfigError, IntaglioError
from intaglio.formats.table import EXPORTERS
from intaglio.formats.verify import verify
from intaglio.packed.assets import SETTINGS, SPECIAL_TOKENS, TOKENIZER, check_assets
from intaglio.packed.outputs import why_kept
from intaglio.plan.contradictions import check_sizes
from intaglio.plan.family import load_config
from intaglio.plan.files import read_json
from intaglio.plan.recipe import Recipe
from intaglio.runs.texts import saved_windows
from intaglio.sources.inspect import Inspection, inspect
from intaglio.tiny import MODEL_DIR
from intaglio.train.checkpoint import read_state, read_step, write_state
from intaglio.train.run_folder import _holder, check_run_dir, read_losses, read_speed
from tests.support import ggml
from tests.support.cases import Case
from tests.support.tiny import MULTIMODAL

EACH, SEED = 1000, 16
SECONDS, BYTES = 5.0, 256 << 20
ODD_NUMBERS = [0, 1, 31, 33, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def weights() -> dict[str, torch.Tensor]:
    codes = torch.randint(-8, 8, (8, 64), generator=torch.Generator().manual_seed(0))
    return {
        "blk.0.grid.weight": (codes * 0.5).to(torch.bfloat16),
        "blk.1.latent.weight": torch.randn(8, 64, generator=torch.Generator().manual_seed(1)),
        "norm.weight": torch.ones(64, dtype=torch.float16),
    }


def safetensors_file() -> bytes:
    return save(weights(), {"format": "pt"})


def gguf_file(folder: Path) -> bytes:
    path = folder / "base.gguf"
    writer = GGUFWriter(path, "gemma4")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b"])
    for name, tensor in weights().items():
        values = tensor.float().numpy()
        if "grid" in name:
            writer.add_tensor(name, ggml.quantize(values, "Q4_0"), raw_dtype=GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@st.composite
def mutations(draw: st.DrawFn, data: bytes, header: int) -> bytes:
    """Bytes flipped, numbers planted, pieces cut out, doubled or put in: mostly in the header."""
    mutated = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        end = min(len(mutated), header if draw(st.integers(0, 5)) else len(mutated))
        at = draw(st.integers(0, max(0, end - 1)))
        kind = draw(st.sampled_from(["byte", "number", "cut", "end", "put", "double"]))
        if kind == "byte" and mutated:
            mutated[at] = draw(st.integers(0, 255))
        elif kind == "number":
            size = draw(st.sampled_from([4, 8]))
            number = draw(st.sampled_from(ODD_NUMBERS)) % (1 << 8 * size)
            mutated[at : at + size] = number.to_bytes(size, "little")
        elif kind == "cut":
            del mutated[at : at + draw(st.integers(1, 16))]
        elif kind == "end":
            del mutated[at:]
        elif kind == "put":
            mutated[at:at] = draw(st.binary(min_size=1, max_size=12))
        else:
            mutated[at:at] = mutated[at : at + draw(st.integers(1, 64))]
    return bytes(mutated)


DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "", None]


@st.composite
def headers(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file whose header is JSON still, but says other things of one of its tensors."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = header[draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))]
    kind = draw(st.sampled_from(["dtype", "shape", "order", "offsets", "name", "metadata"]))
    number = draw(st.sampled_from([*ODD_NUMBERS, -1, 1.5, None]))
    if kind == "dtype":
        entry["dtype"] = draw(st.sampled_from(DTYPES))
    elif kind == "shape":
        entry["shape"][draw(st.integers(0, len(entry["shape"]) - 1))] = number
    elif kind == "order":
        entry["shape"] = draw(st.permutations([*entry["shape"], 1, 1]))
    elif kind == "offsets":
        entry["data_offsets"][draw(st.integers(0, 1))] = number
    elif kind == "name":
        header[draw(st.text(max_size=8))] = header.pop("norm.weight")
    else:
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.none() | st.text(max_size=3), max_size=2))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def survives(data: bytes, path: Path) -> Inspection | None:
    """Return what is found in such a file, or None after a typed error; any other error fails the test."""
    path.write_bytes(data)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        found = inspect(path)
    except IntaglioError as error:
        assert path.name in str(error)
        found = None
    assert time.process_time() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
    return found


def check(found: Inspection, size: int) -> None:
    for verdict in found.verdicts:
        assert math.prod(verdict.shape) >= 0 and 0 <= verdict.size_bytes <= size
        tally = verdict.tally
        assert 0 <= tally.stock <= tally.ships <= tally.recovered <= tally.all
        assert tally.all in (0, math.prod(verdict.shape) // 32) or verdict.stored == "Q6_K" or verdict.hypothesis
    json.dumps(found.to_dict())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return {"safetensors": safetensors_file(), "gguf": gguf_file(tmp_path_factory.mktemp("fuzz"))}


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_mutated_files(kind: str, base: dict[str, bytes], tmp_path: Path) -> None:
    data, path = base[kind], tmp_path / f"x.{kind}"
    right = survives(data, path)
    assert right is not None and right.verdicts[0].grid in ("Q4_0", "int4", "extremum-8", "absmax-8")
    header = 8 + int.from_bytes(data[:8], "little") if kind == "safetensors" else 480
    outcomes: list[bool] = []

    @settings(max_examples=EACH, suppress_health_check=list(HealthCheck))
    @given(mutations(data, header) | headers(data) if kind == "safetensors" else mutations(data, header))
    def run(mutated: bytes) -> None:
        found = survives(mutated, path)
        outcomes.append(found is not None)
        if found is not None:
            check(found, len(mutated))

    run()
    assert len(outcomes) >= EACH
    # both happen often, so the mutations are neither harmless nor all alike
    assert np.mean(outcomes) > 0.02 and np.mean(outcomes) < 0.9


# Files of a run and other small files: each reader gives a right answer or a typed error that names the file

ODD_TEXTS = [
    *("null", "true", "-1", "1.5", "1e999", "NaN", "-Infinity", "9" * 400, '""', '"\\ud800"', '"\\u0000"', "[]", "{}"),
    *(
        "[" * 3000,
        '{"a":' * 3000,
        '"' + "x" * 5000 + '"',
        "[[[]]]",
        '{"step": {}}',
        "'",
        "\x00",
        "\ufeff1",
        "0x10",
        "1_000",
    ),
]
SMALL = {"plan": "a" * 64, "recipe": "name = 'x'\n[schedule]\nlr = 0.1\n", "precision": "no", "corpus": "b" * 64}
LOSSES = [{"step": i, "tokens": 64 * i, "loss": 1 / i} for i in range(1, 6)]
SPEEDS = [{"step": i, "time": 1e9 + i, "tokens_per_s": 1.5, "host_bytes": 1 << 30} for i in range(1, 6)]
STATE = {"model.a.weight": torch.ones(4, 8), "optimizer.a.weight.step": torch.zeros(()), "b": torch.ones(3).half()}
SPECS = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in STATE.items()}


def mutated_bytes(data: bytes, random: Random) -> bytes:
    """Bytes flipped, odd texts and numbers put in, pieces cut out or doubled."""
    mutated = bytearray(data)
    for _ in range(random.randint(1, 3)):
        at, kind = random.randrange(len(mutated) + 1), random.randrange(6)
        if kind == 0 and at < len(mutated):
            mutated[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            mutated[at : at + 8] = (random.choice(ODD_NUMBERS) % 2**64).to_bytes(8, "little")
        elif kind == 2:
            del mutated[at : at + random.randint(1, 20)]
        elif kind == 3:
            del mutated[at:]
        elif kind == 4:
            mutated[at:at] = random.choice(ODD_TEXTS).encode("utf-8", "surrogatepass")
        else:
            mutated[at:at] = mutated[at : at + random.randint(1, 64)]
    return bytes(mutated)


def mutated_json(data: bytes, random: Random) -> bytes:
    """One value of a JSON file, or of a line of it, replaced by an odd one."""
    lines = data.decode().splitlines()
    at = random.randrange(len(lines)) if data.count(b"\n{") else None
    text = data.decode() if at is None else lines[at]
    values = [match.span() for match in re.finditer(r'(?<=[:,\[{ ])("(\\.|[^"\\])*"|-?[\d.]+|\{|\[)', text)]
    begin, end = random.choice(values)
    text = text[:begin] + random.choice(ODD_TEXTS) + text[end:]
    if at is None:
        return text.encode("utf-8", "surrogatepass")
    return "\n".join([*lines[:at], text, *lines[at + 1 :]]).encode("utf-8", "surrogatepass")


def state_file(folder: Path) -> bytes:
    write_state(folder / "state.safetensors", STATE)
    return (folder / "state.safetensors").read_bytes()


def held_out_file(folder: Path) -> bytes:
    with open(folder / "heldout.npy", "wb") as file:
        np.save(file, np.arange(32, dtype=np.int32).reshape(4, 8))
    return (folder / "heldout.npy").read_bytes()


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


# Name of the file, its right content, its reader, and how many mutations.
READERS: dict[str, tuple[Callable[[Path], bytes], Callable[[Path], Any], int]] = {
    "run.json": (lambda f: json_bytes(SMALL), lambda p: check_run_dir(p.parent, SMALL, True), 2000),
    "losses.jsonl": (
        lambda f: ("\n".join(map(json.dumps, LOSSES)) + "\n").encode(),
        lambda p: read_losses(p.parent),
        2000,
    ),
    "speed.jsonl": (
        lambda f: ("\n".join(map(json.dumps, SPEEDS)) + "\n").encode(),
        lambda p: read_speed(p.parent),
        1000,
    ),
    "heldout.npy": (held_out_file, lambda p: saved_windows(p, 64), 1500),
    "step-00000007/meta.json": (lambda f: json_bytes({"step": 7, "torch": "2"}), lambda p: read_step(p.parent), 1500),
    "state.safetensors": (state_file, lambda p: dict(read_state(p, SPECS)), 1500),
    "config.json": (lambda f: json_bytes(MULTIMODAL), lambda p: check_sizes(load_config(p)), 2000),
    "recipe.toml": (lambda f: Recipe.load("q4_0").to_toml().encode(), Recipe.load, 700),
    "report.json": (lambda f: json_bytes({"recipe_toml": "x"}), read_json, 500),
    "packed/.intaglio": (lambda f: json_bytes({"files": ["a", "b"]}), lambda p: why_kept(p.parent), 500),
    "run.lock": (lambda f: json_bytes({"pid": 1, "host": "x", "command": ["a"], "since": "y"}), _holder, 500),
}


@pytest.mark.parametrize("name", READERS)
def test_mutated_files_of_a_run(name: str, tmp_path: Path) -> None:
    make, read, count = READERS[name]
    path, random = tmp_path / name, Random(f"{SEED} {name}")
    path.parent.mkdir(exist_ok=True)
    data = make(tmp_path)
    path.write_bytes(data)
    read(path)
    accepted, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    for _ in range(count):
        mutate = mutated_json if random.random() < 0.5 and name.endswith(("json", "jsonl", "lock")) else mutated_bytes
        path.write_bytes(mutate(data, random))
        try:
            read(path)
            accepted += 1
        except IntaglioError as error:
            assert str(tmp_path) in str(error) or name == "config.json"  # which is checked as a value
    assert accepted < count or name in ("packed/.intaglio", "run.lock")  # these say less where they are damaged
    assert name != "state.safetensors" or accepted == 0
    assert time.process_time() - began < 20
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


def test_other_state_than_expected_is_never_accepted(tmp_path: Path) -> None:
    """Hashes are right, and names, shapes or dtypes are not those of the run: one thing changed in each of 300."""
    random, path = Random(SEED), tmp_path / "state.safetensors"
    for _ in range(300):
        state = dict(STATE)
        name = random.choice(list(state))
        kind = random.choice(["drop", "rename", "dtype", "shape", "add", "swap"])
        if kind in ("drop", "rename"):
            tensor = state.pop(name)
            state |= {f"{name}.x": tensor} if kind == "rename" else {}
        elif kind == "dtype":
            state[name] = state[name].to(random.choice([torch.bfloat16, torch.float64, torch.int8, torch.int32]))
        elif kind == "shape":
            state[name] = state[name][None]
        elif kind == "swap":
            other = random.choice([key for key in state if key != name])
            state[name], state[other] = state[other], state[name]
        else:
            state["more"] = torch.zeros(2)
        with contextlib.suppress(KeyError):  # a dtype that we never write
            write_state(path, state)
            with pytest.raises(ConfigError, match=r"state\.safetensors: "):
                read_state(path, SPECS)
    write_state(path, STATE)
    optional = {"b": SPECS["b"], "c": SPECS["b"]}
    assert set(dict(read_state(path, {k: v for k, v in SPECS.items() if k != "b"}, optional))) == set(STATE)


@pytest.mark.parametrize("name", [TOKENIZER, SPECIAL_TOKENS, "added_tokens.json", SETTINGS])
def test_mutated_files_beside_a_tokenizer(name: str, tmp_path: Path) -> None:
    """Whatever these files say, `check_assets` accepts it or raises a typed error."""
    folder = shutil.copytree(MODEL_DIR, tmp_path / "model")
    said = {"added_tokens_decoder": {"1": {"content": "<eos>"}, "2": {"content": "<bos>"}}, "bos_token": "<bos>"}
    said |= {"eos_token": {"content": "<eos>"}, "chat_template": [{"name": "default", "template": "x"}], "<eos>": 1}
    path, random = folder / name, Random(f"{SEED} {name}")
    data = json.dumps(said if name != SETTINGS else {"eos_token_id": [1, 2], "top_k": 3}).encode()
    for _ in range(600):
        path.write_bytes((mutated_json if random.random() < 0.8 else mutated_bytes)(data, random))
        with contextlib.suppress(IntaglioError):
            check_assets(folder)


@pytest.mark.parametrize("target", ["mlx", "vllm", "hf"])
def test_mutated_configs_of_artifacts(
    target: str, gemma4: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`verify` of an artifact whose config.json says odd things: a difference, or a typed error."""
    EXPORTERS[target](gemma4.packed, tmp_path / "x")
    monkeypatch.setattr("intaglio.formats.words.read.compare_listed", lambda *args: None)  # of weights
    monkeypatch.setattr("intaglio.formats.verify._decoded", lambda *args: iter(()))
    path, random = tmp_path / "x" / "config.json", Random(f"{SEED} {target}")
    data = path.read_bytes()
    for _ in range(400):
        path.write_bytes((mutated_json if random.random() < 0.7 else mutated_bytes)(data, random))
        with contextlib.suppress(IntaglioError):
            verify(gemma4.packed, tmp_path / "x").summary()
