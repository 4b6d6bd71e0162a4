"""Find the grid that each tensor of a file lies on, and how much of it other tools and formats would keep.

A few rows say which grid it may be (`numerics.identify`); if any block of them lies on one, every block of
the tensor is recovered, and counted. A tensor none of whose sampled blocks lies on a grid is latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.numerics.grid import GGUF_GRIDS, Q4_0, BlockGrid, Quantized
from intaglio.numerics.identify import EXCEPTIONS, LATENT, NAMES, Hypothesis, identify
from intaglio.numerics.recover import ANY, FLOAT, HALF, NOTHING, SCALE_NAMES, Recovered, blocks_of, recover
from intaglio.numerics.rounding import round_half, round_significant
from intaglio.packed.model import PackedModel
from intaglio.plan.family import text_config
from intaglio.sources.open import open_source
from intaglio.sources.stored import Source, Stored, codes_of

CHUNK_BLOCKS = 1 << 14  # recovered at once: their temporaries stay in the processor's cache
WHOLE = 0.99  # share of blocks on a grid from which on a tensor counts as lying on it
TABLES = ("embed_tokens_per_layer.weight", "per_layer_token_embd.weight")  # whose rows are slices, one for each layer
MIXED, VECTOR, OTHER = "mixed", "vector", "no floats"


@dataclass(kw_only=True)
class Tally:
    """Counts of blocks. all: of the tensor. recovered: explained bit for bit. stock: those whose codes and
    scale llama-quantize finds again. ships: those whose codes and scale Q4_0 holds. by_rule: recovered by
    the first guess. widths: recovered ones by what their scale needs. portable: those that survive in bfloat16.
    """

    all: int = 0
    recovered: int = 0
    stock: int = 0
    ships: int = 0
    by_rule: int = 0
    portable: int = 0
    widths: list[int] = field(default_factory=lambda: [0] * 5)

    def add(self, codes_NK: Tensor, step: Tensor, width: Tensor, by_rule: Tensor | None, portable: BlockGrid) -> None:
        """Blocks with their steps, float32 [N]; where width is NOTHING, they were not recovered."""
        exact = width != NOTHING
        self.all += len(step)
        self.recovered += int(exact.sum())
        self.widths = [a + int(b) for a, b in zip(self.widths, torch.bincount(width.long(), minlength=5), strict=True)]
        lowest = codes_NK.t().amin(0)
        empty = (lowest == 0) & (codes_NK.t().amax(0) == 0)
        held = exact & ((round_half(step) == step) & torch.isfinite(step) | empty)
        # llama-quantize takes the extremum for code -8; of a block with this code, the extremum it is
        kept = held & ((lowest == -8) | empty)
        narrow = round_significant(step.contiguous(), portable.step_bits) == step
        self.ships += int(held.sum())
        self.stock += int(kept.sum())
        self.portable += int(
            ((kept & (step.abs() >= 2.0**-20) if portable.canonical else exact) & narrow | empty).sum()
        )
        self.by_rule += int((exact if by_rule is None else by_rule).sum())


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Finding about one tensor.

    grid: a key of `identify.NAMES`, "mixed" where blocks lie on none beside others that do, the type of a
    tensor that holds codes, "vector" or "no floats". scale_dtype: the narrowest that explains all scales.
    hypothesis: for whoever recovers the tensor; None if it is latent or holds codes.
    """

    name: str
    stored: str
    shape: tuple[int, ...]
    size_bytes: int
    grid: str
    tally: Tally
    scale_dtype: str | None = None
    hypothesis: Hypothesis | None = None

    @property
    def on_grid(self) -> bool:
        return self.tally.recovered > 0 and self.grid not in (LATENT, VECTOR, OTHER)

    @property
    def in_blocks(self) -> bool:
        """Whether it lies on blocks of 32 with four bits, which Q4_0 can hold."""
        on_blocks = self.hypothesis is not None and not self.hypothesis.by_row
        return self.on_grid and (on_blocks or self.stored in ("Q4_0", "W4A16"))

    @property
    def portable(self) -> bool:
        return self.on_grid and self.tally.portable == self.tally.all

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        shared = {"name": self.name, "stored": self.stored, "shape": list(self.shape), "bytes": self.size_bytes}
        shared |= {"grid": self.grid, "grid_name": NAMES.get(self.grid, self.grid)}
        if not self.on_grid:
            return shared
        tally = self.tally
        found: dict[str, Any] = {"blocks": tally.all, "recovered": tally.recovered}
        found |= {"recovered_share": tally.recovered / tally.all, "scale_dtype": self.scale_dtype}
        if self.in_blocks:
            found |= {"stock_keeps_share": tally.stock / tally.all, "ships_share": tally.ships / tally.all}
            found["portable"] = self.portable
        return shared | found


@dataclass(frozen=True)
class Inspection:
    """Verdicts of all tensors of a source. kind: as in `Source`."""

    path: Path
    kind: str
    verdicts: tuple[Verdict, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"path": str(self.path), "kind": self.kind, "tensors": [v.to_dict() for v in self.verdicts]}


def inspect(
    path: str | Path, *, on_tensor: Callable[[int, int, str], None] = lambda done, total, name: None
) -> Inspection:
    """Look into a checkpoint's folder, a .safetensors or a .gguf file; of any architecture.

    on_tensor: bytes done and in all, and the tensor's name. ConfigError for what cannot be read.
    """
    source = open_source(path)
    if source.kind == "packed":
        return Inspection(source.path, source.kind, tuple(_packed(PackedModel.open(source.path))))
    slices, total, done = slice_columns(source), sum(t.size_bytes for t in source.tensors), 0
    verdicts = []
    for tensor in source:
        on_tensor(done, total, tensor.name)
        verdicts.append(examine(tensor, slices.get(tensor.name)))
        done += tensor.size_bytes
    on_tensor(total, total, "")
    return Inspection(source.path, source.kind, tuple(verdicts))


def _packed(packed: PackedModel) -> Iterator[Verdict]:
    """Verdicts on a packed model, whose plan names all grids."""
    for tensor in packed.plan.everything:
        blocks = isinstance(tensor.grid, BlockGrid)
        count = torch.Size(tensor.spec.shape).numel() // tensor.grid.block_size if blocks else 0  # type: ignore[union-attr]
        tally = Tally(all=count, recovered=count)
        yield Verdict(
            name=tensor.name,
            stored="packed",
            shape=tensor.spec.shape,
            size_bytes=tensor.size_bytes,
            grid=tensor.grid.name,
            tally=tally,
            scale_dtype=str(tensor.grid.scale_dtype).removeprefix("torch.") if blocks else None,  # type: ignore[union-attr]
        )


def slice_columns(source: Source) -> dict[str, int]:
    """Width of the slices that rows consist of, for tables of per-layer embeddings; as far as the source tells.

    From one number of its config or metadata: no model is built for it, whose size a file could make up.
    """
    config, metadata = text_config(source.config or {}), source.metadata or {}
    architecture = metadata.get("general.architecture")
    width = config.get("hidden_size_per_layer_input") or metadata.get(
        f"{architecture}.embedding_length_per_layer_input"
    )
    if type(width) is not int or width < 1:
        return {}
    return {tensor.name: width for tensor in source.tensors if tensor.name.endswith(TABLES)}


def examine(tensor: Stored, slice_columns: int | None = None) -> Verdict:
    """The verdict on one tensor. What is read of it: a few rows, and all of it if they lie on a grid."""
    verdict = Verdict(
        name=tensor.name,
        stored=tensor.kind,
        shape=tensor.shape,
        size_bytes=tensor.size_bytes,
        grid=OTHER,
        tally=Tally(),
    )
    if tensor.bits is not None:
        return _examine_codes(tensor, verdict)
    if not tensor.is_float:
        return verdict
    if not tensor.is_matrix:
        return replace(verdict, grid=VECTOR)
    sample = tensor.sample()
    hypothesis = identify(sample, slice_columns)
    if hypothesis is None:
        return replace(verdict, grid=LATENT)
    hypothesis = _with_width(hypothesis, sample)
    for recovered in recover_all(tensor, hypothesis):
        first = torch.tensor(hypothesis.rule.peaks[0])
        by_rule = (recovered.peak.abs() == first) | (hypothesis.rule.peaks[0] == 8) & (recovered.peak == 7)
        by_rule = by_rule & recovered.exact | (recovered.width == ANY)
        verdict.tally.add(recovered.codes, recovered.scale, recovered.width, by_rule, Q4_0)
    return _concluded(verdict, hypothesis)


def _with_width(hypothesis: Hypothesis, sample_RC: Tensor) -> Hypothesis:
    """The hypothesis with the rule that looks for the sample's scales, since several rules may explain a block."""
    width = recover(blocks_of(sample_RC, hypothesis.width)[: 4 * CHUNK_BLOCKS], hypothesis.rule).width
    counts = torch.bincount(width.long(), minlength=5)
    wide = int(counts[HALF] + counts[FLOAT]) > EXCEPTIONS * int(counts[:NOTHING].sum())
    return replace(hypothesis, rule=replace(hypothesis.rule, narrow=not wide))


def recover_all(tensor: Stored, hypothesis: Hypothesis) -> Iterator[Recovered]:
    """Every block of a float tensor, some of them at a time, in order."""
    for _, values in tensor.pieces():
        yield from recovered_blocks(values, hypothesis)


def recovered_blocks(values_RC: Tensor, hypothesis: Hypothesis) -> Iterator[Recovered]:
    """The blocks of some rows, in order."""
    chunk = max(1, CHUNK_BLOCKS * 32 // hypothesis.width)
    for blocks in blocks_of(values_RC, hypothesis.width).split(chunk):
        yield recover(blocks, hypothesis.rule)


def _concluded(verdict: Verdict, hypothesis: Hypothesis) -> Verdict:
    tally = verdict.tally
    name = hypothesis.name
    if not hypothesis.by_row and name != "free" and tally.by_rule < (1 - EXCEPTIONS) * tally.recovered - 1:
        name = "free" if name in ("extremum-8", "absmax-7") else name
    if tally.recovered == 0:
        return replace(verdict, grid=LATENT)
    grid = name if tally.recovered >= WHOLE * tally.all else MIXED
    return replace(verdict, grid=grid, scale_dtype=_scale_dtype(tally), hypothesis=hypothesis)


def _scale_dtype(tally: Tally) -> str:
    """The narrowest dtype that holds all scales but a few."""
    few = EXCEPTIONS * tally.recovered
    for width in (FLOAT, HALF):
        if tally.widths[width] > few:
            return SCALE_NAMES[width]
    return SCALE_NAMES[1] if tally.widths[1] else SCALE_NAMES[ANY]


def _examine_codes(tensor: Stored, verdict: Verdict) -> Verdict:
    """Codes are on their grid by definition; of blocks of four bits more is asked."""
    if tensor.kind.startswith("int"):
        rows = torch.Size(tensor.shape[:-1]).numel()
        tally = Tally(all=rows, recovered=rows)
        return replace(verdict, grid=tensor.kind, tally=tally, scale_dtype="float32")
    portable = GGUF_GRIDS[tensor.kind if tensor.kind in GGUF_GRIDS else "Q4_0"][0]
    for _, value in tensor.pieces():
        assert isinstance(value, Quantized)
        codes, step = codes_of(value)
        verdict.tally.add(codes, step, _needed_width(step), None, portable)
    dtype = "int8" if tensor.kind == "Q6_K" else _scale_dtype(verdict.tally)
    return replace(verdict, grid=tensor.kind, scale_dtype=dtype)


def _needed_width(step: Tensor) -> Tensor:
    step = step.contiguous()
    half = torch.where(round_half(step) == step, HALF, FLOAT)
    return torch.where(round_significant(step, 8) == step, 1, half).to(torch.uint8)
