"""intaglio: quantization-aware training for Gemma 4, exact in every file it writes.

    from intaglio import Recipe, make_plan, prepare, quantize, train_model, PackedModel, export_gguf, verify

`make_plan` resolves a recipe against a model; `prepare` puts a model on the plan's grids and returns its latents, which
`GridOptimizer` trains in anyone's loop; `train_model` is our loop; `pack_model` and `quantize` make a PackedModel;
exporters take only that.
Names are imported when first used: planning needs no exporter, and exporting no trainer.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "intaglio.errors": (
        "ConfigError",
        "CorpusError",
        "InputError",
        "IntaglioError",
        "MismatchError",
        "OutputError",
        "QualityError",
        "RecipeError",
        "RuntimeFailureError",
        "TrainingError",
        "WeightError",
    ),
    "intaglio.plan.recipe": ("Recipe",),
    "intaglio.plan.plan": ("Plan", "make_plan"),
    "intaglio.packed.assets": ("load_tokenizer",),
    "intaglio.packed.checkpoint": ("load_model",),
    "intaglio.packed.decoded": ("load_packed",),
    "intaglio.packed.model": ("PackedModel",),
    "intaglio.formats.verify": ("verify",),
    "intaglio.train.latents": ("prepare",),
    "intaglio.train.calibrate": ("calibrate",),
    "intaglio.train.corpus": ("load_corpus", "sample_corpus"),
    "intaglio.train.grid_optimizer": ("GridOptimizer",),
    "intaglio.train.loop": ("Options", "train_model"),
    "intaglio.train.pack": ("pack_model",),
    "intaglio.train.quantize": ("quantize",),
    "intaglio.train.start": ("plan_to_go_on",),
    "intaglio.formats.gguf.write": ("export_gguf",),
    "intaglio.formats.checkpoint.write": ("export_hf",),
    "intaglio.formats.words.write_vllm": ("export_vllm",),
    "intaglio.formats.litert.write": ("export_litert",),
    "intaglio.formats.words.write_mlx": ("export_mlx",),
    "intaglio.formats.onnx.write": ("export_onnx",),
    "intaglio.formats.onnx.write_page": ("export_web",),
    "intaglio.formats.gguf.write_bundles": ("export_lmstudio", "export_ollama"),
    "intaglio.runs.release": ("make_release",),
    "intaglio.formats.mobile.write": ("export_mobile",),
    "intaglio.formats.mobile.read_packed": ("import_mobile",),
    "intaglio.sources.inspect": ("inspect",),
    "intaglio.sources.convert": ("convert",),
}
_SHORT = {"train_model": "train"}  # the package intaglio.train would take the place of a function of that name
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'intaglio' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), _SHORT.get(name, name))


def __dir__() -> list[str]:
    return __all__
