"""Bytes of a plan on disk and in memory, part by part, and the longest context within a budget.

Three numbers are told apart. On disk: bytes of tensor data in the file. Mapped: tables that are only looked
up, a few rows a token; a runtime leaves them on disk and maps them. Resident: everything else, which every
token reads. An embedding that is also the head is read as a whole for every token, so it is resident; where
the format stores the head beside it, as Gemma mobile does, the head is resident and the embedding mapped.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from intaglio.errors import RecipeError
from intaglio.formats.mobile.layout import stored_tensors
from intaglio.numerics.grid import Q4_0_POSITIVE
from intaglio.plan.family import TensorSpec
from intaglio.plan.plan import HEAD, Plan
from intaglio.sizing.components import LABELS, TOWERS, component_of, kv_cache_bytes, parameters
from intaglio.sizing.sizes import FileSize, file_size

KV_BITS = (16, 8)
LOOKED_UP = ("ple_embedding",)


@dataclass(frozen=True)
class Part:
    """One component: its parameters, the grids it lies on, and its bytes."""

    component: str
    label: str
    parameters: int
    grids: tuple[str, ...]
    disk_bytes: int
    resident_bytes: int
    mapped_bytes: int


@dataclass(frozen=True)
class Footprint:
    """A plan as a file. parts: of the text model, then of towers, which a GGUF does not hold."""

    parts: tuple[Part, ...]
    file: FileSize

    def total(self, field: str, *, text_only: bool = False) -> int:
        """Sum of `disk_bytes`, `resident_bytes`, `mapped_bytes` or `parameters` over the parts."""
        return sum(getattr(part, field) for part in self.parts if not (text_only and part.component in TOWERS))

    @property
    def towers(self) -> bool:
        return any(part.component in TOWERS for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Parts, their sums with and without towers, and the file; ready for JSON."""
        fields = ("parameters", "disk_bytes", "resident_bytes", "mapped_bytes")
        return {
            "parts": [asdict(part) for part in self.parts],
            "total": {field: self.total(field) for field in fields},
            "text_only": {field: self.total(field, text_only=True) for field in fields},
            "file": asdict(self.file) | {"total": self.file.total},
        }


def footprint(plan: Plan, metadata_bytes: int) -> Footprint:
    """Footprint in the plan's own format, Gemma mobile or GGUF. Raises RecipeError for another.

    No format holds a drafter on mobile grids: its codes and scales are counted by themselves.
    """
    if any(tensor.grid == Q4_0_POSITIVE for tensor in plan):
        raise RecipeError(
            f"recipe {plan.recipe.name} is for LiteRT-LM alone, and sizes of its bundles are not predicted: "
            "choose mobile or q4_0, or export the bundle and look"
        )
    stored = _mobile_bytes(plan) if plan.mobile and not plan.model.family.drafter else _grid_bytes(plan)
    untied = "head" in stored
    grids: dict[str, set[str]] = {}
    for carried, tensors in ((False, plan.tensors), (True, plan.carried)):
        for tensor in tensors:
            grids.setdefault(component_of(tensor.spec, carried=carried), set()).add(tensor.grid.name)
    counts, parts = parameters(plan.model), []
    for component, label in LABELS.items():
        if component not in stored:
            continue
        disk = stored[component]
        mapped = disk if component in LOOKED_UP or (component == "token_embedding" and untied) else 0
        # unused tensors lie in the file, and need not be in memory
        resident = 0 if component == "unused" else disk - mapped
        on = tuple(sorted(grids.get(component, grids["token_embedding"] if component == "head" else ())))
        parts.append(Part(component, label, counts.get(component, 0), on, disk, resident, mapped))
    return Footprint(tuple(parts), file_size(plan, metadata_bytes))


def _grid_bytes(plan: Plan) -> dict[str, int]:
    """Bytes by component; towers as they would lie in a file of their own."""
    sizes: dict[str, int] = {}
    for carried, tensors in ((False, plan.tensors), (True, plan.carried)):
        for tensor in tensors:
            component = component_of(tensor.spec, carried=carried)
            if component != "unused":
                sizes[component] = sizes.get(component, 0) + tensor.size_bytes
    return sizes


def _mobile_bytes(plan: Plan) -> dict[str, int]:
    specs: dict[str, TensorSpec] = {tensor.name: tensor.spec for tensor in plan.everything}
    carried = {tensor.name for tensor in plan.carried}
    sizes: dict[str, int] = {}
    for part in stored_tensors(plan):
        if part.part == "static":
            component = "static"
        elif part.name.startswith(HEAD.removesuffix("weight")):
            component = "head"
        else:
            component = component_of(specs[part.source], carried=part.source in carried)
        size = part.dtype.itemsize
        for dimension in part.shape:
            size *= dimension
        sizes[component] = sizes.get(component, 0) + size
    return sizes


def bits_per_weight(part: Part) -> float | None:
    """Bits per weight of a part on disk; None for a part that has none of its own."""
    return 8 * part.disk_bytes / part.parameters if part.parameters else None


def longest_context(plan: Plan, free_bytes: int, bits: int, batch: int = 1) -> int:
    """The most tokens, up to the model's own limit, whose KV cache takes at most `free_bytes`; 0 if none does."""
    lowest, highest = 0, int(plan.model.layer_config.max_position_embeddings)
    if free_bytes < 0:
        return 0
    while lowest < highest:
        middle = (lowest + highest + 1) // 2
        if kv_cache_bytes(plan.model, middle, batch, bits)["total"] <= free_bytes:
            lowest = middle
        else:
            highest = middle - 1
    return lowest
