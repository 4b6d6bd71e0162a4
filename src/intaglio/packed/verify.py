"""Does an artifact hold what was packed? Read it back with another reader, and count.

Each kind of artifact has a row in READERS. The readers are gguf-py, safetensors and what the formats'
own libraries bring; the only thing shared with the exporters are tables of names. Everything is
compared by its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.gguf_reader import ReaderTensor
from torch import Tensor

from intaglio.errors import ConfigError
from intaglio.numerics.grid import Quantized
from intaglio.numerics.layout import from_blocks, map_chunks, row_chunks
from intaglio.packed.checkpoint import is_mobile
from intaglio.packed.model import PackedModel
from intaglio.packed.shards import shards
from intaglio.packed.store import open_safetensors
from intaglio.packed.tally import Tally
from intaglio.packed.tflite import bundle_in, holds_bundle
from intaglio.packed.verify_affine import compare_compressed, compare_mlx, is_compressed, is_mlx
from intaglio.packed.verify_bundles import bundled_gguf, holds_ggufs, is_ollama
from intaglio.packed.verify_litert import compare_litert
from intaglio.packed.verify_mobile import compare_mobile
from intaglio.packed.verify_onnx import compare_onnx
from intaglio.plan.carried import whole_name
from intaglio.plan.family import TOWER_ROLES, load_config
from intaglio.plan.files import reading
from intaglio.plan.names_gguf import GGUF_ROPE_FACTORS, gguf_name, gguf_rope_factors, in_gguf
from intaglio.plan.onnx import is_onnx
from intaglio.plan.plan import PlannedTensor

KINDS = ("codes", "scales", "static_scales", "values")


def _words(kind: str) -> str:
    return kind.replace("_", " ")


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was compared and what differs.

    codes, scales, static_scales, values: how many were compared; static scales are those of activations
        and KV cache, values are floats outside of blocks, or all weights of an artifact that stores
        floats. differing_*: how many of them have other bits.
    missing, extra: names of tensors, as the artifact spells them. unlike: tensors of another type
        or shape than planned, whose content was not compared.
    """

    artifact: Path
    tensors: int
    codes: int
    scales: int
    static_scales: int
    values: int
    differing_codes: int
    differing_scales: int
    differing_static_scales: int
    differing_values: int
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    unlike: tuple[str, ...]

    @property
    def exact(self) -> bool:
        differing = sum(getattr(self, f"differing_{kind}") for kind in KINDS)
        return not (differing or self.missing or self.extra or self.unlike)

    def summary(self) -> str:
        """One line for a person."""
        if self.exact:
            counts = ", ".join(f"{getattr(self, kind):,} {_words(kind)}" for kind in KINDS if getattr(self, kind))
            return f"{self.artifact.name}: exact: {self.tensors} tensors, {counts}, 0 bits differ"
        wrong = [
            f"{getattr(self, f'differing_{kind}'):,} of {getattr(self, kind):,} {_words(kind)} differ"
            for kind in KINDS
            if getattr(self, f"differing_{kind}")
        ]
        for kind in ("missing", "extra", "unlike"):
            names: tuple[str, ...] = getattr(self, kind)
            if names:
                label = "of another type or shape" if kind == "unlike" else kind
                wrong.append(f"{len(names)} tensors {label}, the first is {names[0]}")
        return f"{self.artifact.name}: NOT exact: {'; '.join(wrong)}"


def verify(packed: PackedModel, artifact: str | Path, *, device: torch.device | str = "cpu") -> Verification:
    """Compare one exported file or folder with the packed model it was made from.

    device: where decoded weights are compared with those of a transformers folder.
    A difference is counted, not raised. Raises ConfigError for an artifact that cannot be read.
    """
    artifact = Path(artifact)
    tally = Tally(device)
    with reading(artifact, "cannot be read", "export it again"):
        next(reader for reader in READERS if reader.recognises(artifact)).compare(packed, artifact, tally)
    return Verification(
        artifact=artifact,
        tensors=tally.counts["tensors"],
        **{kind: tally.counts[kind] for kind in KINDS},
        **{f"differing_{kind}": tally.differing[kind] for kind in KINDS},
        missing=tuple(tally.missing),
        extra=tuple(tally.extra),
        unlike=tuple(tally.unlike),
    )


def _compare_gguf(packed: PackedModel, path: Path, tally: Tally) -> None:
    found = {tensor.name: tensor for tensor in read_gguf(path).tensors}
    factors = gguf_rope_factors(packed.plan.model)
    named = {gguf_name(tensor.name) for tensor in packed.plan if in_gguf(tensor)}
    expected = named | ({GGUF_ROPE_FACTORS} if factors else set())
    tally.missing += sorted(expected - set(found))
    tally.extra += sorted(set(found) - expected)
    if factors and GGUF_ROPE_FACTORS in found:
        _compare_floats(torch.tensor(factors), found[GGUF_ROPE_FACTORS], tally)
    for tensor, value in packed:
        stored = found.get(gguf_name(tensor.name)) if in_gguf(tensor) else None
        if stored is None:
            continue
        if isinstance(value, Quantized):
            _compare_blocks(tensor, value, stored, tally)
        else:
            offset = packed.plan.model.family.norm_offset
            shifted = tensor.spec.role == "norm" and offset != 0  # adding zero would turn -0.0 into 0.0
            _compare_floats(value.float() + offset if shifted else value.float(), stored, tally)


def _compare_blocks(tensor: PlannedTensor, value: Quantized, stored: ReaderTensor, tally: Tally) -> None:
    tally.counts["tensors"] += 1
    shape = tuple(int(size) for size in reversed(stored.shape))
    if stored.tensor_type.name != value.grid.ggml_type or shape != tensor.spec.shape:
        tally.unlike.append(stored.name)
        return

    def read(rows: slice, part: Quantized) -> tuple[Quantized, Quantized]:
        return part, from_blocks(value.grid, np.asarray(stored.data[rows]))

    for part, found in map_chunks(read, value):
        tally.compare("codes", part.codes, found.codes)
        tally.compare("scales", part.scale, found.scale)
        if part.super_scale is not None and found.super_scale is not None:
            tally.compare("scales", part.super_scale, found.super_scale)


def _compare_floats(expected: Tensor, stored: ReaderTensor, tally: Tally) -> None:
    tally.counts["tensors"] += 1
    data = np.asarray(stored.data)
    if stored.tensor_type.name not in ("F16", "F32") or data.shape != tuple(expected.shape):
        tally.unlike.append(stored.name)
        return
    tally.compare("values", expected, torch.from_numpy(data.astype(np.float32)))


def _as_in(packed: PackedModel, folder: Path) -> PackedModel:
    """The packed model, without towers if the folder's config has none."""
    text_only = packed.plan.model.whole and "text_config" not in load_config(folder)
    return packed.text_only() if text_only else packed


def _compare_folder(packed: PackedModel, folder: Path, tally: Tally) -> None:
    packed = _as_in(packed, folder)
    whole = packed.plan.model.whole is not None
    towers = [tensor for tensor in packed.plan.carried if tensor.spec.role in TOWER_ROLES]
    planned = {whole_name(t.name) if whole else t.name: t for t in (*packed.plan.tensors, *towers)}
    seen: set[str] = set()
    for shard in shards(folder):
        with open_safetensors(shard) as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                seen.add(name)
                if name not in planned:
                    tally.extra.append(name)
                    continue
                tally.counts["tensors"] += 1
                if tuple(file.get_slice(name).get_shape()) != planned[name].spec.shape:
                    tally.unlike.append(name)
                    continue
                for rows, values in _decoded(packed, planned[name], tally.device):
                    found = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
                    tally.compare("values", values, found.to(tally.device).float())
    tally.missing += sorted(set(planned) - seen)


def _decoded(
    packed: PackedModel, tensor: PlannedTensor, device: torch.device | str
) -> Iterator[tuple[slice | None, Tensor]]:
    """float32 values of a planned tensor on the device with their rows, a few rows at a time; None for all."""
    for rows, value in packed.chunks(tensor.name, device):
        if not isinstance(value, Quantized):
            yield rows, value.float()
            continue
        first = rows.start if rows else 0
        for at, part in row_chunks(value):
            yield slice(first + at.start, first + at.start + len(part.codes)), part.decode()


class _Reader(GGUFReader):
    """gguf-py's reader, with an end: its own reads past the end give nothing, forever if the file says so."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError(f"the file ends at byte {len(self.data)}, before what it announces")
        return super()._get(offset, dtype, count, override_order)


def read_gguf(path: Path) -> GGUFReader:
    """gguf-py's reader of this file. ConfigError if it is missing, truncated or malformed."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file: expected a .gguf file or a transformers folder")
    try:
        return _Reader(path)
    except (ValueError, LookupError, ArithmeticError, TypeError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path}: not a valid GGUF file ({error}): download or export it again") from error


@dataclass(frozen=True)
class Reader:
    """A kind of artifact.

    recognises: whether a path is of this kind, by its name and its config alone. compare: counts into the
    tally what the artifact holds and what of it differs; ConfigError if it cannot be read.
    """

    recognises: Callable[[Path], bool]
    compare: Callable[[PackedModel, Path, Tally], None]


# The first that recognises an artifact reads it.
READERS = (
    Reader(is_mobile, lambda packed, folder, tally: compare_mobile(_as_in(packed, folder), folder, tally)),
    Reader(is_compressed, lambda packed, folder, tally: compare_compressed(_as_in(packed, folder), folder, tally)),
    Reader(is_mlx, compare_mlx),
    Reader(is_onnx, compare_onnx),
    Reader(is_ollama, lambda packed, folder, tally: _compare_gguf(packed, bundled_gguf(folder), tally)),
    Reader(holds_ggufs, lambda packed, folder, tally: _compare_gguf(packed, bundled_gguf(folder), tally)),
    Reader(holds_bundle, lambda packed, path, tally: compare_litert(packed, bundle_in(path), tally)),
    Reader(Path.is_dir, _compare_folder),
    Reader(lambda path: True, _compare_gguf),
)
