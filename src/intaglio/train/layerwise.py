"""Quantization that looks at text, of a model that need not fit in memory: layer by layer, from disk to packed model.

For each decoder layer, from the first to the last:

    read      its weights, from the safetensors files, while the layer before is at work
    prepare   its latents, at the recipe's fit
    GPTQ      moves them, by the inputs that original and quantized model have here
    advance   both models by this layer: the next one's inputs
    train     the latents of a window of layers to give the original's outputs (stage "layers")
    pack      codes and scales, into the file of the packed model

On the device are at most the layers of a window, quantized, and one original. Embeddings are fitted a few rows at a
time, and the rows that the text looks up are kept on the host, with the activations of the text.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.errors import InputError
from intaglio.numerics.device import Device, device_for
from intaglio.numerics.grid import Quantized
from intaglio.packed.checkpoint import TensorReader, stream_chunks
from intaglio.packed.write import PackedWriter, write_packed
from intaglio.plan.family import transformers_config
from intaglio.plan.memory import learns_scales
from intaglio.plan.plan import Plan
from intaglio.progress import Progress
from intaglio.train.calibrate import Observers
from intaglio.train.corpus import Corpus, batch_indices
from intaglio.train.gptq import NOTHING_LEARNED, first_half_by, move_in_passes
from intaglio.train.latents import Latents, prepare
from intaglio.train.layer_training import Training
from intaglio.train.options import Options
from intaglio.train.parts import filled, merged, rooted
from intaglio.train.quantize import fit_tensor
from intaglio.train.sharding import without_memory, world_size
from intaglio.train.static import use_static_attention
from intaglio.train.streams import Batch, Recorder, Table, at_home

TABLES = {"token_embedding": "embed_tokens", "ple_embedding": "embed_tokens_per_layer"}  # roles, and their modules


@dataclass(frozen=True)
class WindowInfo:
    """A window of layers that is packed: its first and last layer.

    before, after: squared error of its outputs against the original's, as a share of these, before and after training
    on the text; None where nothing was trained.
    """

    first: int
    last: int
    before: float | None = None
    after: float | None = None

    @property
    def figures(self) -> str:
        """The window in words, for a progress line."""
        return "layers" if self.after is None else f"layers, error {self.before:.2%} -> {self.after:.2%}"


def quantize_on_text(
    model_dir: str | Path,
    plan: Plan,
    corpus: Corpus,
    out: str | Path,
    *,
    gptq: bool = False,
    layers: bool = False,
    options: Options | None = None,
    device: Device = None,
    provenance: dict[str, Any] | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> list[WindowInfo]:
    """Write a PackedModel by the recipe's fit, its static scales calibrated on `corpus`; return what the windows did.

    gptq: let GPTQ choose the codes, on the schedule's share of the corpus. layers: train each window of layers, on the
    schedule's `layer_tokens`. device: where the layers are at work; None picks a GPU if there is one. progress: shows
    each window of layers that is packed. Raises ConfigError for a damaged checkpoint, WeightError for values or
    activations that are not finite, InputError for several processes and for a recipe that leaves GPTQ nothing to move.
    """
    if world_size() > 1:
        raise InputError("layers are quantized one after the other in one process: start one")
    if not (gptq or layers or plan.static_scales):
        raise InputError(f"recipe {plan.recipe.name}: nothing in it looks at text: leave the text out")
    if gptq and not (plan.recipe.schedule.learn_scales and any(learns_scales(t) and t.quantized_linear for t in plan)):
        raise InputError(NOTHING_LEARNED)
    method = [f"fit {plan.recipe.fit}"]
    method += [f"GPTQ on {corpus.source}"] if gptq else []
    method += [f"layers trained on {corpus.source}"] if layers else []
    method += [f"calibrated on {corpus.source}"] if plan.static_scales else []
    record = {"method": ", ".join(method), **(provenance or {})}
    done: list[WindowInfo] = []
    walk = Walk(Path(model_dir), plan, device_for(device), (options or Options()).dtype, gptq, layers)
    with (
        torch.no_grad(),
        write_packed(Path(out), plan, assets=walk.source, provenance=record, replace=replace) as writer,
        ThreadPoolExecutor(1) as walk.thread,
    ):
        walk.enter(corpus, writer)
        for numbers in walk.windows():
            done.append(walk.window(numbers, writer))
            if progress is not None:
                progress.part(numbers.stop, len(walk.templates), done[-1].figures)
        for name, value in walk.scales.items():
            writer.add_static(name, value)
    return done


class Walk:
    """Passes a text through a model's layers, one window at a time; see the head of this file.

    model: transformers' text model, whose layers stay without memory. batches: of the text; moving, learning: those
    that GPTQ and training see. scales: static scales found so far, by owner.
    """

    def __init__(self, source: Path, plan: Plan, device: torch.device, dtype: torch.dtype, gptq: bool, layers: bool):
        self.source, self.plan, self.schedule = source, plan, plan.recipe.schedule
        self.device, self.dtype, self.gptq, self.layers = device, dtype, gptq, layers
        self.sides = 2 if gptq or layers else 1
        self.reader = TensorReader(source, plan.model)
        self.ahead: tuple[int, Future[dict[str, Tensor]]] | None = None
        self.thread: ThreadPoolExecutor
        self.batches: list[Batch] = []
        self.moving: list[Batch] = []
        self.learning: list[Batch] = []
        self.scales: dict[str, float] = {}
        whole = without_memory(transformers_config(plan.model.config), dtype)
        if plan.recipe.kv_cache is not None:
            use_static_attention(whole)
        self.model: nn.Module = whole.model
        self.templates: list[nn.Module] = list(whole.model.layers)

    def windows(self) -> Iterator[range]:
        """Numbers of the layers of each window: those that are trained together."""
        size = self.schedule.layer_window if self.layers else 1
        for first in range(0, len(self.templates), size):
            yield range(first, min(first + size, len(self.templates)))

    def enter(self, corpus: Corpus, writer: PackedWriter) -> None:
        """Pack all that is not in a layer, and bring the text to the first one."""
        wanted = [
            self.schedule.gptq_tokens if self.gptq else 0,
            self.schedule.layer_tokens if self.layers else 0,
            self.schedule.calibration_tokens if self.plan.static_scales else 0,
        ]
        shares = [min(len(corpus.tokens), -(-tokens // corpus.tokens.shape[1])) for tokens in wanted]
        rows = batch_indices(len(corpus.tokens), max(shares), self.schedule.seed, 0)
        tokens, positions = (torch.from_numpy(a[rows]).long() for a in (corpus.tokens, corpus.positions))
        tables = self._tables(tokens, writer)
        original, front = self._front()
        moving, learning, counting = shares
        # a batch ends where GPTQ's share does: its sums are then those of the same tokens as in `start_from_gptq`
        ends = sorted(
            {moving, len(rows), *range(self.schedule.layer_batch, len(rows), self.schedule.layer_batch)} - {0}
        )
        for start, end in zip([0, *ends], ends, strict=False):
            batch = Batch(tokens[start:end], positions[start:end], self.sides, self.device)
            batch.watched[max(0, counting - start) :] = False
            self.batches.append(batch)
            self.moving += [batch] if end <= moving else []
            self.learning += [batch] if start < learning else []
        hooks = first_half_by(front, original) if original is not None else []
        if self.gptq:
            move_in_passes(front, [partial(b.front, self.model, tables) for b in self.moving])
        for batch in self.batches:
            batch.read(self.model, tables)
        for hook in hooks:
            hook.remove()
        self._pack(front, writer)
        del self.model, tables

    def _tables(self, tokens: Tensor, writer: PackedWriter) -> list[Table]:
        """Fit and pack embeddings and head, a few rows at a time, and keep the rows that the text looks up."""
        names = {t.name: TABLES.get(t.spec.role) for t in self.plan if t.spec.role in (*TABLES, "head")}
        ids, kept = tokens.unique(), {name: ([], []) for name in names}  # type: ignore[var-annotated]
        for name, rows, values in stream_chunks(self.source, self.plan.model, only=names):
            value = fit_tensor(values.to(self.device), self.plan, name, rows)
            writer.add(name, value, rows)
            if names[name] is None:  # the head is behind the layers
                continue
            start = rows.start if rows else 0
            own = ids[(ids >= start) & (ids < start + len(values))] - start
            kept[name][0].append(values[own].to(self.dtype))
            decoded = value.decode(self.dtype) if isinstance(value, Quantized) else value.to(self.dtype)
            kept[name][1].append(decoded[own.to(self.device)].cpu())
        return [
            Table(getattr(self.model, module), ids, [torch.cat(side) for side in kept[name][-self.sides :]])
            for name, module in names.items()
            if module is not None
        ]

    def _front(self) -> tuple[nn.Module | None, Latents]:
        """Put the modules before and behind the layers, but for embeddings, in the model's place; see `_open`."""
        names = [name for name, _ in self.model.named_children() if name not in (*TABLES.values(), "layers")]
        paths = [f"model.{n}" for n in names if any(t.name.startswith(f"model.{n}.") for t in self.plan)]
        self.model.layers = nn.ModuleList(Recorder([]) for _ in self.templates)
        original, latents = self._open(paths, self.reader.read(self._names(paths)))
        for path in paths:
            name = path.removeprefix("model.")
            self.model.add_module(name, latents.model.get_submodule(path))
        for module in self.model.modules():  # rotary tables and factors of embeddings
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, buffer.to(self.device))
        return original, latents

    def _names(self, paths: Iterable[str]) -> list[str]:
        return [tensor.name for tensor in self.plan.under(*paths)]

    def _template(self, path: str) -> nn.Module:
        number = path.rpartition(".")[2]
        return self.templates[int(number)] if number.isdigit() else self.model.get_submodule(path.partition(".")[2])

    def _open(self, paths: list[str], values: dict[str, Tensor]) -> tuple[nn.Module | None, Latents]:
        """Modules of the model as a quantized copy, with its latents, and as the original, if it runs beside it."""
        stored = {name: value.to(self.device, non_blocking=True) for name, value in values.items()}
        exact = torch.float32 if self.device.type == "cpu" else None
        root = rooted({path: filled(self._template(path), path, stored, self.dtype) for path in paths})
        root.config = self.templates[0].config
        root.requires_grad_(True).train()
        latents = prepare(root, self.plan.under(*paths), source=stored)
        if self.sides == 1:
            return None, latents
        original = rooted({path: filled(self._template(path), path, stored, exact) for path in paths})
        return original.requires_grad_(False), latents

    def _read(self, number: int) -> dict[str, Tensor]:
        """A layer's weights on the host, read ahead; the next layer's are read from here on."""
        ahead = self.ahead[1] if self.ahead and self.ahead[0] == number else self._submit(number)
        values = ahead.result()
        if number + 1 < len(self.templates):
            self.ahead = number + 1, self._submit(number + 1)
        return values

    def _submit(self, number: int) -> Future[dict[str, Tensor]]:
        names = self._names([f"model.layers.{number}"])
        return self.thread.submit(self.reader.read, names, pinned=self.device.type == "cuda")

    def window(self, numbers: range, writer: PackedWriter) -> WindowInfo:
        """Quantize and pack these layers, and bring the text behind them."""
        starts = {batch: batch.hidden for batch in self.batches}
        parts = [self._advance(number) for number in numbers]
        latents = merged(parts, self.plan.under(*(f"model.layers.{number}" for number in numbers)))
        errors: tuple[float, ...] = ()
        if self.layers:
            training = Training(latents, numbers, starts, self.learning, self.scales)
            errors = training.run()
            self.scales |= training.scales()
            del training
        self._pack(latents, writer)
        del latents, parts
        gc.collect()  # a module and its hooks may hold each other, and a GPU's memory with them
        return WindowInfo(numbers[0], numbers[-1], *errors)

    def _advance(self, number: int) -> Latents:
        """Open a layer, let GPTQ move it, count for static scales, and bring the text behind it."""
        path = f"model.layers.{number}"
        original, latents = self._open([path], self._read(number))
        layer = {number: latents.model.get_submodule(path)}
        hooks = first_half_by(latents, original) if original is not None else []
        if self.gptq:
            move_in_passes(latents, [partial(b.run, layer, b.hidden) for b in self.moving])
        observers = Observers(latents.model, latents.plan)
        with observers.watching():
            for batch in self.batches:
                observers.counted = batch.watched_rows
                batch.hidden = at_home(batch.run(layer, batch.hidden, keep=True), {})
        for hook in hooks:
            hook.remove()
        self.scales |= observers.fitted()
        return latents

    def _pack(self, latents: Latents, writer: PackedWriter) -> None:
        for tensor in latents.plan:
            writer.add(tensor.name, latents.pack(tensor))
