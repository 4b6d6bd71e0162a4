"""The survey behind `intaglio plan`: a plan, its files and memory, recipes that fit a budget, and the model family."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intaglio.errors import ConfigError, RecipeError
from intaglio.packed.checkpoint import check_weights, checkpoint_spec, notes
from intaglio.packed.identity import CHECKPOINT, COMPRESSED, CONFIG, MOBILE, look
from intaglio.packed.origin import model_name
from intaglio.plan.bundled import DRAFTER, MODELS, bundled_config, bundled_name, find_config
from intaglio.plan.carried import describe_whole
from intaglio.plan.family import ModelSpec
from intaglio.plan.hub import CONFIG_ONLY, find_model
from intaglio.plan.memory import TrainingMemory, stage_peaks, training_memory
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe, preset_names
from intaglio.progress import Progress
from intaglio.sizing.components import kv_cache_bytes, parameters
from intaglio.sizing.footprint import KV_BITS, Footprint, footprint, longest_context
from intaglio.sizing.published import LEFT_OUT, PUBLISHED_GB
from intaglio.sizing.sizes import GEMMA_METADATA_BYTES, bf16_bytes, gguf_size, w4a16_size

# Recipes that are the same size as another one, for comparison only, or for a format whose size is not predicted.
NO_OTHER_SIZE = ("q4_0-free", "q4_0-stock", "q4_0-litert")
MADE_FOR = {"mobile-e2b": "e2b", "mobile-e4b": "e4b"}  # part of the name of the one model that they are for


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """Planned use of a model. context: tokens of each of `batch` sequences. gpus: that training is sharded over."""

    context: int = 32768
    batch: int = 1
    gpus: int = 1
    gradient_checkpointing: bool = False
    metadata_bytes: int = GEMMA_METADATA_BYTES
    budget_bytes: int | None = None


@dataclass(frozen=True)
class Fit:
    """A recipe beside a budget. longest: context whose KV cache still fits, by its bits; 0 where nothing does."""

    recipe: str
    disk_bytes: int
    resident_bytes: int
    mapped_bytes: int
    longest: dict[int, int]


@dataclass(frozen=True)
class Survey:
    """Everything that `plan` prints. kv: bytes of the cache by bits. drafter: name and footprint, if there is one."""

    name: str
    plan: Plan
    wishes: Wishes
    footprint: Footprint
    kv: dict[int, dict[str, int]]
    training: TrainingMemory | None
    drafter: tuple[str, Footprint] | None
    fits: tuple[Fit, ...]
    notes: list[str]

    @property
    def checkpointed(self) -> TrainingMemory:
        """Memory of training with gradient checkpointing."""
        return training_memory(self.plan, gpus=self.wishes.gpus, gradient_checkpointing=True)

    @property
    def file_resident_bytes(self) -> int:
        """Resident weights of the file itself, of which a GGUF has no towers."""
        return self.footprint.total("resident_bytes", text_only=not self.plan.mobile)

    @property
    def tower_bytes(self) -> int:
        """The bytes that towers and their embedders add to that, or are part of it in a mobile folder."""
        return self.footprint.total("resident_bytes") - self.footprint.total("resident_bytes", text_only=True)

    @property
    def stages(self) -> dict[str, int]:
        """Bytes on each GPU at the peak of each stage of training; none of a drafter."""
        if self.training is None:
            return {}
        checkpointing = self.wishes.gradient_checkpointing
        return stage_peaks(self.plan, gpus=self.wishes.gpus, gradient_checkpointing=checkpointing)

    def needed_bytes(self, bits: int, *, text_only: bool = False) -> int:
        """Resident weights, the drafter's too, and the KV cache at so many bits."""
        drafter = self.drafter[1].total("resident_bytes") if self.drafter else 0
        return self.footprint.total("resident_bytes", text_only=text_only) + drafter + self.kv[bits]["total"]

    def to_dict(self) -> dict[str, Any]:
        """Everything, and every tensor; ready for JSON."""
        plan = self.plan
        return {
            "model": self.name,
            "recipe": plan.recipe.name,
            "digest": plan.digest,
            "bytes": plan.size_bytes,
            "sizes": self.footprint.to_dict(),
            "kv_cache": {"context": self.wishes.context, "batch": self.wishes.batch}
            | {f"bits_{bits}": sizes for bits, sizes in self.kv.items()},
            "drafter": {"model": self.drafter[0]} | self.drafter[1].to_dict() if self.drafter else None,
            "needed_bytes": {f"bits_{bits}": self.needed_bytes(bits) for bits in self.kv},
            "training": asdict(self.training) | {"total": self.training.total} if self.training else None,
            "stages": self.stages,
            "budget": {"bytes": self.wishes.budget_bytes, "recipes": [asdict(fit) for fit in self.fits]}
            if self.wishes.budget_bytes
            else None,
            "tensors": plan.rows(),
            "static_scales": [scale.name for scale in plan.static_scales],
        }


def find_spec(model: str | Path, *, text_only: bool = False) -> ModelSpec:
    """The model of a folder, a config.json or a bundled name; weights in the folder must be as its config says."""
    path = Path(model)
    if path.exists():
        spec = checkpoint_spec(path, text_only=text_only, kinds=(CHECKPOINT, CONFIG, MOBILE, COMPRESSED))
        if look(path).kind == CHECKPOINT:
            check_weights(path, spec)
        return spec
    name = bundled_name(str(model))
    spec = bundled_spec(name) if name else describe_whole(find_config(model))
    return spec.text_only() if text_only else spec


def _located(model: str | Path, progress: Progress | None) -> str | Path:
    """A path, or a bundled name as it is. Of another name of the Hub, the config alone is downloaded."""
    if Path(model).exists() or not bundled_name(str(model)):
        found = find_model(model, progress, CONFIG_ONLY)
        return found if Path(model).exists() or not found.exists() else found / "config.json"
    return model


@functools.cache
def bundled_spec(name: str) -> ModelSpec:
    """A bundled model with its towers."""
    return describe_whole(bundled_config(name))


def survey(
    model: str | Path,
    recipe: Recipe,
    wishes: Wishes,
    *,
    drafter: str | Path | None = None,
    text_only: bool = False,
    progress: Progress | None = None,
) -> Survey:
    """Plan a model by a recipe and work out what it takes. Raises ConfigError and RecipeError as a plan does."""
    model, drafter = _located(model, progress), None if drafter is None else _located(drafter, progress)
    spec = find_spec(model, text_only=text_only)
    plan = make_plan(spec, recipe)
    made_for = None if drafter is None else _drafter(drafter, spec, recipe, wishes)
    return Survey(
        name=display_name(model),
        plan=plan,
        wishes=wishes,
        footprint=footprint(plan, wishes.metadata_bytes),
        kv={bits: kv_cache_bytes(spec, wishes.context, wishes.batch, bits) for bits in KV_BITS},
        training=None
        if spec.family.drafter
        else training_memory(plan, gpus=wishes.gpus, gradient_checkpointing=wishes.gradient_checkpointing),
        drafter=made_for,
        fits=() if wishes.budget_bytes is None else _fits(display_name(model), spec, recipe, wishes, made_for),
        notes=notes(model, spec) if Path(model).exists() else [],
    )


def display_name(model: str | Path) -> str:
    """A bundled model's full name, else the folder's."""
    path = Path(model)
    named = None if path.exists() else bundled_name(str(model))
    return named or model_name(path.parent if path.name == "config.json" else path)


def _drafter(drafter: str | Path, target: ModelSpec, recipe: Recipe, wishes: Wishes) -> tuple[str, Footprint]:
    """A drafter's footprint on the recipe, or on drafter-mobile when the recipe is not for drafters."""
    spec = find_spec(drafter)
    if not spec.family.drafter:
        raise ConfigError(f"{drafter}: model_type {spec.family.model_type} is no drafter: expected an assistant model")
    width, own = spec.config.get("backbone_hidden_size"), target.layer_config.hidden_size
    if width != own:
        raise ConfigError(
            f"{drafter}: drafts for a model of width {width}, this one's is {own}: choose its own drafter"
        )
    fits = not recipe.families or spec.family.model_type in recipe.families
    fitting = recipe if fits else Recipe.load("drafter-mobile")
    return display_name(drafter), footprint(make_plan(spec, fitting), wishes.metadata_bytes)


def _fits(
    name: str, spec: ModelSpec, recipe: Recipe, wishes: Wishes, drafter: tuple[str, Footprint] | None
) -> tuple[Fit, ...]:
    """The recipe at hand, then every preset of another size that is for this model."""
    assert wishes.budget_bytes is not None
    beside = drafter[1].total("resident_bytes") if drafter else 0
    rows: dict[tuple[int, int], Fit] = {}
    presets = [Recipe.load(preset) for preset in preset_names() if preset not in NO_OTHER_SIZE]
    presets = [preset for preset in presets if MADE_FOR.get(preset.name, "") in name.lower()]
    for candidate in [recipe, *presets]:
        try:
            plan = make_plan(spec, candidate)
        except RecipeError:  # for another family, or without rules for some of this model
            continue
        size = footprint(plan, wishes.metadata_bytes)
        disk, resident, mapped = (size.total(f"{kind}_bytes") for kind in ("disk", "resident", "mapped"))
        free = wishes.budget_bytes - resident - beside
        longest = {bits: longest_context(plan, free, bits, wishes.batch) for bits in KV_BITS}
        rows.setdefault((disk, resident), Fit(candidate.name, disk, resident, mapped, longest))
    return tuple(rows.values())


@dataclass(frozen=True)
class FamilyRow:
    """One model of the family, computed, beside what Google publishes. Bytes; mobile is None for the larger ones."""

    name: str
    parameters: int
    bf16_bytes: int
    gguf_bytes: int
    gguf_resident_bytes: int
    gguf_mapped_bytes: int
    w4a16_bytes: int
    mobile: dict[str, int] | None
    drafter_bytes: int
    published_gb: dict[str, float]


def family(metadata_bytes: int = GEMMA_METADATA_BYTES) -> list[FamilyRow]:
    """The five models with their towers, in GGUF, W4A16 and the mobile format, and their drafters in Q4_0."""
    rows = []
    for name in MODELS:
        spec = bundled_spec(name)
        plan = make_plan(spec, "q4_0")
        text = footprint(plan.text_only(), metadata_bytes)
        drafter = make_plan(bundled_spec(name + DRAFTER), "q4_0")
        rows.append(
            FamilyRow(
                name=name,
                parameters=sum(parameters(spec).values()),
                bf16_bytes=bf16_bytes(plan),
                gguf_bytes=gguf_size(plan, metadata_bytes).total,
                gguf_resident_bytes=text.total("resident_bytes"),
                gguf_mapped_bytes=text.total("mapped_bytes"),
                w4a16_bytes=w4a16_size(plan).total,
                mobile=_mobile(spec, name, metadata_bytes),
                drafter_bytes=gguf_size(drafter, metadata_bytes).total,
                published_gb=PUBLISHED_GB[name],
            )
        )
    return rows


def _mobile(spec: ModelSpec, name: str, metadata_bytes: int) -> dict[str, int] | None:
    recipe = name.replace("gemma-4-", "mobile-")
    if recipe not in preset_names():
        return None
    size = footprint(make_plan(spec, recipe), metadata_bytes)
    return {
        "file": size.file.total,
        "resident": size.total("resident_bytes"),
        "resident_text": size.total("resident_bytes", text_only=True),
        "mapped": size.total("mapped_bytes"),
    }


def family_dict(rows: list[FamilyRow]) -> dict[str, Any]:
    """Ready for JSON."""
    return {"models": [asdict(row) for row in rows], "published_figures_leave_out": list(LEFT_OUT)}
