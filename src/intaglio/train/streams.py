"""The inputs of each decoder layer for one text, kept on the host, while the model itself is not in memory.

transformers' own forward runs over each batch once, with a recorder in the place of each decoder layer. So masks,
rotary tables and inputs from per-layer embeddings are its own. From there on the layers run one by one.

A batch has its sequences twice where an original runs beside the quantized model, the original's first.

Shape suffixes: B sequences of a batch, S their rows in memory: B, or 2B beside an original; T tokens of a sequence; W
columns of a table; U rows of it that the text looks up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SHARED_KV = "shared_kv_states"  # transformers' name for the keys and values that later layers attend to
EVERYTHING = slice(None)
Layers = Mapping[int, nn.Module]


class Recorder(nn.Module):
    """Stands in the place of a decoder layer: hands its input on, and keeps all that it is called with."""

    def __init__(self, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]):
        super().__init__()
        self.calls = calls

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append(((hidden, *args), kwargs))
        return hidden


class Table:
    """The rows of an embedding that a text looks up: as the original has them, and as they are decoded.

    ids: int64 [U], sorted. rows: one or two tensors [U, W] on the host, the original's first.
    """

    def __init__(self, module: nn.Embedding, ids: Tensor, rows: list[Tensor]):
        self.module, self.ids, self.rows = module, ids, rows
        module.padding_idx = None

    def place(self, tokens: Tensor, device: torch.device) -> None:
        """Give the module a row for each place of the tokens [B, T], those of the original first: [S x T, W]."""
        at = torch.searchsorted(self.ids, tokens.flatten())
        weight = torch.cat([rows[at] for rows in self.rows]).to(device)
        self.module.weight = nn.Parameter(weight, requires_grad=False)


class Batch:
    """Sequences that pass the layers together.

    tokens, positions: int64 [B, T], on the host. sides: 2 beside an original, else 1. hidden: [S, T, D], the input of
    the next layer, on the host. calls: what else each layer is called with. shared: keys and values that later layers
    attend to, by their kind. counted, watched: bool [B, T], on the device, the places that count in errors, and for the
    static scales.
    """

    def __init__(self, tokens: Tensor, positions: Tensor, sides: int, device: torch.device):
        self.tokens, self.positions, self.device = tokens, positions, device
        size = len(tokens)
        self.rows, self.original, self.quantized = sides * size, slice(0, size), slice((sides - 1) * size, None)
        # Gemma parks activations in the first token of a document that no other token has
        self.counted = (positions > 0).to(device)
        self.watched = self.counted.clone()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.shared: dict[str, tuple[Tensor, ...]] = {}
        self.hidden = torch.empty(0)

    @property
    def watched_rows(self) -> Tensor:
        """bool [S, T]: `watched`, of the quantized model alone."""
        unseen = torch.zeros_like(self.watched).repeat(self.rows // len(self.tokens) - 1, 1)
        return torch.cat((unseen, self.watched))

    def read(self, model: Any, tables: list[Table]) -> None:
        """Run what a model has before its layers, of which each is a Recorder, and keep what these are given."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        for recorder in model.layers:
            recorder.calls = calls
        self.front(model, tables)
        kept: dict[int, Tensor] = {}
        moved = [at_home(call, kept) for call in calls]
        self.hidden = moved[0][0][0]
        self.calls = [(args[1:], kwargs) for args, kwargs in moved]

    def front(self, model: Any, tables: list[Table]) -> None:
        """Run what a model has before its layers."""
        for table in tables:
            table.place(self.tokens, self.device)
        places = torch.arange(self.rows * self.tokens.shape[1], device=self.device).view(self.rows, -1)
        positions = self.positions.to(self.device).repeat(self.rows // len(self.tokens), 1)
        model(input_ids=places, position_ids=positions, use_cache=False)

    def on_device(self, value: Any, part: slice = EVERYTHING) -> Any:
        """A tensor, or all in a tuple, list or dict, on the device; of what has all rows of the batch, some of them."""

        def place(tensor: Tensor) -> Tensor:
            tensor = tensor[part] if tensor.ndim and len(tensor) == self.rows else tensor
            return tensor.to(self.device, non_blocking=True)

        return mapped(place, value)

    def run(self, layers: Layers, hidden: Tensor, part: slice = EVERYTHING, *, keep: bool = False) -> Tensor:
        """Output [S, T, D] of layers that follow each other, on the device.

        hidden: their input. part: which rows it has. keep: whether later layers are to attend to the keys and values.
        """
        given = self.on_device(self.shared, part)
        shared, hidden = dict(given), hidden.to(self.device, non_blocking=True)
        for number, layer in layers.items():
            args, kwargs = self.on_device(self.calls[number], part)
            if SHARED_KV in kwargs:
                kwargs[SHARED_KV] = shared
            hidden = layer(hidden, *args, **kwargs)
        for kind in [kind for kind in shared if keep and shared[kind] is not given.get(kind)]:
            self._keep(kind, shared[kind], part)
        return hidden

    def _keep(self, kind: str, values: tuple[Tensor, ...], part: slice) -> None:
        if part == EVERYTHING:
            self.shared[kind] = at_home(tuple(values), {})
        else:
            for kept, value in zip(self.shared[kind], values, strict=True):
                kept[part].copy_(value, non_blocking=True)


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A structure of tuples, lists and dicts with the function applied to each tensor; other values stay."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(mapped(function, part) for part in value)
    return {key: mapped(function, part) for key, part in value.items()} if isinstance(value, dict) else value


def at_home(value: Any, kept: dict[int, Tensor]) -> Any:
    """A structure of tensors on the host, pinned where they come from a GPU. kept: those already there, by their id."""

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in kept:
            home = tensor.detach()
            if tensor.is_cuda:
                home = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                home.copy_(tensor, non_blocking=True)
            kept[id(tensor)] = home
        return kept[id(tensor)]

    return mapped(move, value)
