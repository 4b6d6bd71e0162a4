"""PackedModel: what is written is what is read, whole or not at all, and damage is named."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from intaglio.errors import ConfigError, InputError, IntaglioError, OutputError, WeightError
from intaglio.numerics.grid import Quantized
from intaglio.packed import model as packed_module
from intaglio.packed.hashes import Hashes
from intaglio.packed.model import FILE_NAME, PackedModel
from intaglio.packed.outputs import MARKER, mark
from intaglio.packed.store import SafetensorsWriter, bytes_of, new_path
from intaglio.packed.write import write_packed
from intaglio.plan.plan import make_plan
from intaglio.train.quantize import fit_tensor, quantize
from tests.support.cli import intaglio
from tests.support.repack import resave
from tests.support.tiny import GEMMA4_DENSE, make_checkpoint, pack


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", GEMMA4_DENSE)


@pytest.fixture(scope="module")
def packed(checkpoint: Path) -> PackedModel:
    return pack(checkpoint, checkpoint.parent / "packed")


@pytest.fixture
def copy(packed: PackedModel, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(packed.path, tmp_path / "copy"))


def test_what_was_added_is_read_bit_for_bit(checkpoint: Path, packed: PackedModel) -> None:
    source = load_file(checkpoint / "model.safetensors")
    for tensor, value in packed:
        expected = fit_tensor(source[tensor.name], packed.plan, tensor.name)
        if isinstance(value, Quantized):
            assert isinstance(expected, Quantized)
            assert torch.equal(value.codes, expected.codes)
            assert torch.equal(value.scale.view(torch.uint8), expected.scale.view(torch.uint8))
            assert torch.equal(packed.decode(tensor.name), expected.decode())
        else:
            assert isinstance(expected, Tensor)
            assert torch.equal(value.float(), expected)
    assert {tensor.name for tensor in packed.plan} == set(source)


def test_plan_recipe_and_provenance_come_back(checkpoint: Path, tmp_path: Path) -> None:
    plan = make_plan(checkpoint, "q4_0")
    made = quantize(checkpoint, plan, tmp_path / "packed", provenance={"name": "tiny"})
    assert made.plan.digest == plan.digest
    assert made.plan.recipe == plan.recipe
    assert made.provenance == {"method": "fit mse", "name": "tiny"}
    assert json.loads((made.path / "config.json").read_text()) == plan.model.config
    assert (made.path / "tokenizer.json").is_file()


def test_the_same_model_packs_to_the_same_bytes(checkpoint: Path, packed: PackedModel, tmp_path: Path) -> None:
    assert pack(checkpoint, tmp_path / "again").sha256() == packed.sha256()


def test_existing_output_is_kept_unless_replaced(checkpoint: Path, packed: PackedModel, copy: Path) -> None:
    with pytest.raises(OutputError, match="already exists"):
        quantize(checkpoint, packed.plan, copy)
    (copy / "letter.txt").touch()
    with pytest.raises(OutputError, match=r"holds letter\.txt, which intaglio did not write"):
        quantize(checkpoint, packed.plan, copy, replace=True)
    (copy / "letter.txt").unlink()
    (copy / FILE_NAME).write_bytes(b"")
    quantize(checkpoint, packed.plan, copy, replace=True)
    assert PackedModel.open(copy).sha256() == packed.sha256()


def write_all(packed: PackedModel, target: Path, change: Any = lambda name, value: value) -> None:
    with write_packed(target, packed.plan, assets=packed.path, provenance={}) as writer:
        for tensor, value in packed:
            changed = change(tensor.name, value)
            if changed is not None:
                writer.add(tensor.name, changed)


def off_grid(name: str, value: Quantized | Tensor) -> Quantized | Tensor:
    return value.float() + 1e-4 if isinstance(value, Tensor) else value


def other_grid(name: str, value: Quantized | Tensor) -> Quantized | Tensor:
    return value.decode() if isinstance(value, Quantized) else value


def interrupted(name: str, value: Quantized | Tensor) -> Quantized | Tensor:
    raise KeyboardInterrupt


def full_disk(name: str, value: Quantized | Tensor) -> Quantized | Tensor:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda name, value: None if "layers.1.mlp" in name else value, ValueError, "never written"),
        (off_grid, ValueError, "not on grid"),
        (other_grid, ValueError, "not on grid"),
        (interrupted, KeyboardInterrupt, "^$"),
        (full_disk, OutputError, "disk is full"),
    ],
)
def test_what_fails_half_way_leaves_nothing(
    packed: PackedModel, tmp_path: Path, change: Any, error: type[BaseException], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_all(packed, tmp_path / "out", change)
    assert not list(tmp_path.iterdir())


def test_nan_in_the_checkpoint_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightError, match=r"layers\.2\.mlp\.up_proj\.weight: 1 values.*\(3, 5\)"):
        pack(broken, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [broken]


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000, 1_000_000, -1])
def test_a_truncated_file_is_named(copy: Path, keep: int) -> None:
    path = copy / FILE_NAME
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"packed\.safetensors"):
        PackedModel.open(copy)


@pytest.mark.parametrize("header", [2**63, 2**40, 10])
def test_a_hostile_header_is_named(copy: Path, header: int) -> None:
    path = copy / FILE_NAME
    path.write_bytes(header.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ConfigError, match="not a valid safetensors file"):
        PackedModel.open(copy)


def test_foreign_files_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint: a checkpoint of floats: `intaglio quantize"):
        PackedModel.open(checkpoint)
    shutil.copyfile(checkpoint / "model.safetensors", tmp_path / FILE_NAME)
    with pytest.raises(ConfigError, match="format 'pt'"):
        PackedModel.open(tmp_path)


@pytest.mark.parametrize(
    "metadata",
    [
        {"format": "intaglio-packed-9"},
        {"config": "{"},
        {"config": "[]"},
        {"config": "{}"},
        {"provenance": "3"},
        {"recipe": "= 3"},
        {"recipe": 'name = "x"'},
    ],
    ids=str,
)
def test_damaged_metadata_is_named(copy: Path, metadata: dict[str, str]) -> None:
    resave(copy, **metadata)
    with pytest.raises(InputError):
        PackedModel.open(copy)


CODES = "model.layers.0.self_attn.q_proj.weight.codes"


@pytest.mark.parametrize(
    "tensors",
    [
        {"extra": torch.zeros(1)},
        {CODES: torch.zeros(256, 64, dtype=torch.uint8)},
        {CODES: torch.zeros(256, 128, dtype=torch.float32)},
    ],
    ids=["extra", "shape", "dtype"],
)
def test_tensors_other_than_planned_are_named(copy: Path, tensors: dict[str, Tensor]) -> None:
    resave(copy, tensors=tensors)
    with pytest.raises(ConfigError, match="missing, unexpected or not as planned"):
        PackedModel.open(copy)


def test_codes_that_the_grid_lacks_are_named(copy: Path) -> None:
    codes = load_file(copy / FILE_NAME)["model.embed_tokens.weight.codes"]
    codes[7, 7] = 100
    resave(copy, tensors={"model.embed_tokens.weight.codes": codes})
    with pytest.raises(InputError, match=r"embed_tokens\.weight: codes outside -32\.\.31"):
        PackedModel.open(copy).read("model.embed_tokens.weight")


def test_new_path_replaces_like_with_like_only(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "precious.safetensors").touch()
    mark(folder)
    with pytest.raises(OutputError, match="is a folder"), new_path(folder, replace=True) as temporary:
        temporary.write_text("a file")
    assert sorted(p.name for p in tmp_path.rglob("*")) == [MARKER, "folder", "precious.safetensors"]


def test_new_path_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"), new_path(tmp_path / "file" / "out"):
        pass


def test_safetensors_written_by_hand_is_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "b": torch.tensor([-3, 4], dtype=torch.int8),
        "empty": torch.zeros(0, 4),
    }
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path / "x.safetensors", specs, {"format": "pt"}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
        with pytest.raises(ValueError, match="2 bytes, announced 30"):
            writer.write("a", tensors["b"])
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_every_flipped_byte_of_the_header_is_noticed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copy / FILE_NAME
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    plan = PackedModel.open(copy).plan
    monkeypatch.setattr(packed_module, "make_plan", lambda config, recipe: plan)  # slow, and not what is tested
    for at in range(0, 8 + header, (8 + header) // 150):
        damaged = bytearray(data)
        damaged[at] ^= 0x55
        path.write_bytes(damaged)
        with pytest.raises(IntaglioError):
            PackedModel.open(copy)


# Hashes


def flipped(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_every_flipped_bit_is_noticed(copy: Path) -> None:
    """One bit at 300 places anywhere in the file, of codes, scales, floats and header."""
    path, random = copy / FILE_NAME, np.random.default_rng(5)
    whole = path.read_bytes()
    for at in random.integers(0, len(whole), 300).tolist():
        flipped(path, at, int(random.integers(8)))
        with pytest.raises(IntaglioError):
            Hashes(path).check_all()
        path.write_bytes(whole)
    Hashes(path).check_all()


@pytest.mark.parametrize("end", [1, 40_000, 700_000], ids=["a float", "codes", "more codes"])
def test_a_flipped_bit_is_named_by_the_first_who_reads_it(
    end: int, copy: Path, checkpoint: Path, tmp_path: Path
) -> None:
    path = copy / FILE_NAME
    flipped(path, path.stat().st_size - end)
    opened = PackedModel.open(copy)  # a cheap look at the header
    with pytest.raises(ConfigError, match=r"packed\.safetensors: tensor model\..* is not what was written.*restore"):
        list(opened)
    with pytest.raises(ConfigError, match="is not what was written"):
        opened.check()
    for command in (
        ["export", copy, "hf", "-o", tmp_path / "out"],
        ["export", copy, "--to", "mlx", "-o", tmp_path / "out"],
        ["verify", copy, checkpoint],
        ["quantize", checkpoint, "--trained", copy, "-o", tmp_path / "out"],
        ["train", copy, "-o", tmp_path / "out", "--data", __file__, "--set=schedule.loss=cross_entropy"],
        ["eval", copy, f"--original={checkpoint}", f"--text={__file__}"],
    ):
        outcome = intaglio(*command)
        assert outcome.code == 2 and "is not what was written" in outcome.error, command
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_rows_are_checked_too(copy: Path) -> None:
    flipped(copy / FILE_NAME, (copy / FILE_NAME).stat().st_size - 1)
    opened = PackedModel.open(copy)
    last = max(opened.hashes.places, key=lambda name: opened.hashes.places[name][1])
    name = last.removesuffix(".codes").removesuffix(".scale").removesuffix(".super_scale")
    with pytest.raises(ConfigError, match="is not what was written"):
        opened.read(name, slice(0, 1))


def test_a_model_of_before_the_hashes_is_taken_with_a_warning(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    resave(copy, format="intaglio-packed-1")
    opened = PackedModel.open(copy)
    assert "was packed before tensors had hashes" in caplog.text
    assert opened.hashes is None and len(list(opened)) == len(opened.plan.tensors)


def test_hashes_say_sha256_of_the_bytes(copy: Path) -> None:
    tensors = load_file(copy / FILE_NAME)
    for name, digest in Hashes(copy / FILE_NAME).digests.items():
        assert hashlib.sha256(bytes_of(tensors[name])).hexdigest() == digest


def test_new_path_replaces_no_folder_of_something_else(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="holds no model"), new_path(home, replace=True) as temporary:
        temporary.mkdir()
    assert (home / "thesis.txt").read_text() == "years of work"


def test_an_error_of_a_file_that_was_read_is_not_one_of_writing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="source"), new_path(tmp_path / "out"):
        (tmp_path / "source").read_bytes()
