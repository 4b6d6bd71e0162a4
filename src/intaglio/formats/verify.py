"""Compares an artifact with the packed model: reads it back with another reader, and counts differences.

Each kind of artifact has a row in READERS. The readers are gguf-py, safetensors and what the formats'
own libraries bring; the only thing shared with the exporters are tables of names. Everything is
compared by its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from intaglio.errors import MismatchError
from intaglio.formats.checkpoint.read import compare_folder_facts
from intaglio.formats.facts import CONFIG, GENERATION, TEMPLATE, TOKENIZER
from intaglio.formats.gguf.read import compare_gguf
from intaglio.formats.gguf.read_bundles import compare_gguf_folder, compare_ollama, holds_ggufs, is_ollama
from intaglio.formats.litert.read import compare_litert
from intaglio.formats.litert.read_tflite import bundle_in, holds_bundle
from intaglio.formats.mobile.read import compare_mobile
from intaglio.formats.onnx.layout import is_onnx
from intaglio.formats.onnx.read import compare_onnx
from intaglio.formats.tally import Tally
from intaglio.formats.words.read import compare_compressed, compare_mlx, is_compressed, is_mlx
from intaglio.numerics.grid import Quantized
from intaglio.numerics.layout import row_chunks
from intaglio.packed.model import PackedModel
from intaglio.packed.shards import shards
from intaglio.packed.store import open_safetensors
from intaglio.plan.family import TOWER_ROLES, is_mobile, load_config
from intaglio.plan.files import reading
from intaglio.plan.hub import ARTIFACT, find_model
from intaglio.plan.plan import PlannedTensor

GROUPS = (CONFIG, TOKENIZER, "texts", TEMPLATE, GENERATION)
KINDS = ("codes", "scales", "static_scales", "values")


def _words(kind: str) -> str:
    return kind.replace("_", " ")


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Result of a comparison: the facts compared, and those that differ.

    codes, scales, static_scales, values: how many were compared; static scales are those of activations
        and KV cache, values are floats outside of blocks, or all weights of an artifact that stores
        floats. differing_*: how many of them have other bits.
    missing, extra: names of tensors, as the artifact spells them. unlike: tensors of another type
        or shape than planned, whose content was not compared.
    facts: how many facts beside the weights were compared, by their group: config, tokenizer, texts, template,
        generation settings. differing_facts: a sentence for each that is another. unsaid: what the format has no
        place for, or its runtime does by itself.
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
    facts: dict[str, int]
    differing_facts: tuple[str, ...]
    unsaid: tuple[str, ...]

    @property
    def exact(self) -> bool:
        differing = sum(getattr(self, f"differing_{kind}") for kind in KINDS)
        return not (differing or self.missing or self.extra or self.unlike or self.differing_facts)

    @property
    def compared(self) -> str:
        """The compared facts, for a person: "weights, config, tokenizer"."""
        return ", ".join(["weights", *(group for group, count in self.facts.items() if count)])

    def summary(self) -> str:
        """One line for a person."""
        if self.exact:
            counts = ", ".join(f"{getattr(self, kind):,} {_words(kind)}" for kind in KINDS if getattr(self, kind))
            unsaid = f"; not in this format: {'; '.join(self.unsaid)}" if self.unsaid else ""
            return (
                f"{self.artifact.name}: exact: {self.tensors} tensors, {counts}, 0 bits differ; "
                f"compared: {self.compared}{unsaid}"
            )
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
        if self.differing_facts:
            more = f" (and {len(self.differing_facts) - 3} more)" if len(self.differing_facts) > 3 else ""
            wrong.append("; ".join(self.differing_facts[:3]) + more)
        return f"{self.artifact.name}: NOT exact: {'; '.join(wrong)}"


Compare = Callable[[PackedModel, Path, Tally], None]


def verify(packed: PackedModel, artifact: str | Path, *, device: torch.device | str = "cpu") -> Verification:
    """Compare one exported file or folder, or a name of the Hub, with the packed model it was made from.

    device: where decoded weights are compared with those of a transformers folder.
    A difference is counted, not raised. Raises ConfigError for an artifact that cannot be read.
    """
    artifact = find_model(artifact, files=ARTIFACT)
    tally = Tally(device)
    with reading(artifact, "cannot be read", "export it again"):
        # an artifact may be damaged anywhere: each error of a reader becomes one sentence
        next(reader for reader in READERS if reader.recognises(artifact)).compare(packed, artifact, tally)
    return Verification(
        artifact=artifact,
        tensors=tally.counts["tensors"],
        **{kind: tally.counts[kind] for kind in KINDS},
        **{f"differing_{kind}": tally.differing[kind] for kind in KINDS},
        missing=tuple(tally.missing),
        extra=tuple(tally.extra),
        unlike=tuple(tally.unlike),
        facts={group: tally.facts[group] for group in GROUPS if tally.facts[group]},
        differing_facts=tuple(tally.unlike_facts),
        unsaid=tuple(tally.unsaid),
    )


def verify_exact(packed: PackedModel, artifact: str | Path, *, device: torch.device | str = "cpu") -> Verification:
    """Verify what has just been written, as `verify` does; raise MismatchError where anything differs."""
    result = verify(packed, artifact, device=device)
    if not result.exact:
        raise MismatchError(f"{artifact}: {result.summary()}: the export is not what was packed; please report this")
    return result


def _as_in(packed: PackedModel, folder: Path) -> PackedModel:
    """The packed model, without towers if the folder's config has none."""
    text_only = packed.plan.model.whole and "text_config" not in load_config(folder)
    return packed.text_only() if text_only else packed


def _with_facts(compare: Compare, packed: PackedModel, folder: Path, tally: Tally) -> None:
    """Compare a transformers folder: its weights by `compare`, and all that lies beside them."""
    packed = _as_in(packed, folder)
    compare(packed, folder, tally)
    compare_folder_facts(packed, folder, tally)


def _compare_folder(packed: PackedModel, folder: Path, tally: Tally) -> None:
    towers = [tensor for tensor in packed.plan.carried if tensor.spec.role in TOWER_ROLES]
    planned = {packed.plan.stored_name(t.name): t for t in (*packed.plan.tensors, *towers)}
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


@dataclass(frozen=True)
class Reader:
    """A kind of artifact.

    recognises: whether a path is of this kind, by its name and its config alone. compare: counts into the
    tally what the artifact holds and what of it differs; ConfigError if it cannot be read.
    """

    recognises: Callable[[Path], bool]
    compare: Compare


# The first that recognises an artifact reads it.
READERS = (
    Reader(is_mobile, lambda packed, folder, tally: _with_facts(compare_mobile, packed, folder, tally)),
    Reader(is_compressed, lambda packed, folder, tally: _with_facts(compare_compressed, packed, folder, tally)),
    Reader(is_mlx, lambda packed, folder, tally: _with_facts(compare_mlx, packed.text_only(), folder, tally)),
    Reader(is_onnx, compare_onnx),
    Reader(is_ollama, compare_ollama),
    Reader(holds_ggufs, compare_gguf_folder),
    Reader(holds_bundle, lambda packed, path, tally: compare_litert(packed, bundle_in(path), tally)),
    # any other folder is one of decoded weights, and any other file a GGUF
    Reader(Path.is_dir, lambda packed, folder, tally: _with_facts(_compare_folder, packed, folder, tally)),
    Reader(lambda path: True, compare_gguf),
)
