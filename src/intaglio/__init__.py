"""intaglio: quantization-aware training for Gemma 4, exact in every file it writes.

    from intaglio import Recipe, make_plan, prepare, quantize, train_model, PackedModel, export_gguf, verify

`make_plan` resolves a recipe against a model; `prepare` puts a model on the plan's grids and returns its latents, which
`GridOptimizer` trains in anyone's loop; `train_model` is our loop; `pack_model` and `quantize` make a PackedModel;
exporters take only that. The verbs of the command line are functions too: docs/python.md has the table.
Names are imported when first used: planning needs no exporter, and exporting no trainer.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see; at run time `_HOMES` says the same, and a test compares them
    from intaglio.drafter.model import Shape
    from intaglio.errors import (
        ConfigError,
        CorpusError,
        InputError,
        IntaglioError,
        MismatchError,
        OutputError,
        QualityError,
        RecipeError,
        RuntimeFailureError,
        TrainingError,
        WeightError,
    )
    from intaglio.formats.checkpoint.write import export_hf
    from intaglio.formats.gguf.write import export_gguf
    from intaglio.formats.gguf.write_bundles import export_lmstudio, export_ollama
    from intaglio.formats.litert.write import export_litert
    from intaglio.formats.mobile.read_packed import import_mobile
    from intaglio.formats.mobile.write import export_mobile
    from intaglio.formats.onnx.write import export_onnx
    from intaglio.formats.onnx.write_page import export_web
    from intaglio.formats.verify import verify
    from intaglio.formats.words.write_mlx import export_mlx
    from intaglio.formats.words.write_vllm import export_vllm
    from intaglio.measure.tasks import Asking, evaluate_tasks
    from intaglio.packed.assets import load_tokenizer
    from intaglio.packed.checkpoint import load_model
    from intaglio.packed.decoded import load_packed
    from intaglio.packed.model import PackedModel
    from intaglio.plan.plan import Plan, make_plan
    from intaglio.plan.recipe import Recipe
    from intaglio.progress import Progress
    from intaglio.runs.chat import chat
    from intaglio.runs.compare import compare as evaluate
    from intaglio.runs.compare import report
    from intaglio.runs.demo import run_demo, run_demo_drafter
    from intaglio.runs.doctor import doctor
    from intaglio.runs.drafter import Texts
    from intaglio.runs.drafter import run as train_drafter
    from intaglio.runs.export import export
    from intaglio.runs.finetune import finetune
    from intaglio.runs.proof import Evaluation
    from intaglio.runs.push import push_release
    from intaglio.runs.quantize import quantize_model
    from intaglio.runs.release import make_release, verify_release
    from intaglio.runs.train import run as train_checkpoint
    from intaglio.runs.watch import watch
    from intaglio.sizing.planning import Wishes, survey
    from intaglio.sizing.planning import family as survey_family
    from intaglio.sources.convert import convert
    from intaglio.sources.inspect import inspect
    from intaglio.train.calibrate import calibrate
    from intaglio.train.corpus import load_corpus, sample_corpus
    from intaglio.train.data.preview import preview
    from intaglio.train.data.sources import Source
    from intaglio.train.grid_optimizer import GridOptimizer
    from intaglio.train.latents import prepare
    from intaglio.train.loop import train as train_model
    from intaglio.train.options import Options
    from intaglio.train.pack import pack_model
    from intaglio.train.quantize import quantize
    from intaglio.train.start import plan_to_go_on

__all__ = [
    "Asking",
    "ConfigError",
    "CorpusError",
    "Evaluation",
    "GridOptimizer",
    "InputError",
    "IntaglioError",
    "MismatchError",
    "Options",
    "OutputError",
    "PackedModel",
    "Plan",
    "Progress",
    "QualityError",
    "Recipe",
    "RecipeError",
    "RuntimeFailureError",
    "Shape",
    "Source",
    "Texts",
    "TrainingError",
    "WeightError",
    "Wishes",
    "calibrate",
    "chat",
    "convert",
    "doctor",
    "evaluate",
    "evaluate_tasks",
    "export",
    "export_gguf",
    "export_hf",
    "export_litert",
    "export_lmstudio",
    "export_mlx",
    "export_mobile",
    "export_ollama",
    "export_onnx",
    "export_vllm",
    "export_web",
    "finetune",
    "import_mobile",
    "inspect",
    "load_corpus",
    "load_model",
    "load_packed",
    "load_tokenizer",
    "make_plan",
    "make_release",
    "pack_model",
    "plan_to_go_on",
    "prepare",
    "preview",
    "push_release",
    "quantize",
    "quantize_model",
    "report",
    "run_demo",
    "run_demo_drafter",
    "sample_corpus",
    "survey",
    "survey_family",
    "train_checkpoint",
    "train_drafter",
    "train_model",
    "verify",
    "verify_release",
    "watch",
]

_HOMES = {
    "drafter.model": ["Shape"],
    "errors": [name for name in __all__ if name.endswith("Error")],
    "formats.checkpoint.write": ["export_hf"],
    "formats.gguf.write": ["export_gguf"],
    "formats.gguf.write_bundles": ["export_lmstudio", "export_ollama"],
    "formats.litert.write": ["export_litert"],
    "formats.mobile.read_packed": ["import_mobile"],
    "formats.mobile.write": ["export_mobile"],
    "formats.onnx.write": ["export_onnx"],
    "formats.onnx.write_page": ["export_web"],
    "formats.verify": ["verify"],
    "formats.words.write_mlx": ["export_mlx"],
    "formats.words.write_vllm": ["export_vllm"],
    "measure.tasks": ["Asking", "evaluate_tasks"],
    "packed.assets": ["load_tokenizer"],
    "packed.checkpoint": ["load_model"],
    "packed.decoded": ["load_packed"],
    "packed.model": ["PackedModel"],
    "plan.plan": ["Plan", "make_plan"],
    "plan.recipe": ["Recipe"],
    "progress": ["Progress"],
    "runs.chat": ["chat"],
    "runs.compare": ["evaluate", "report"],
    "runs.demo": ["run_demo", "run_demo_drafter"],
    "runs.doctor": ["doctor"],
    "runs.drafter": ["Texts", "train_drafter"],
    "runs.export": ["export"],
    "runs.finetune": ["finetune"],
    "runs.proof": ["Evaluation"],
    "runs.push": ["push_release"],
    "runs.quantize": ["quantize_model"],
    "runs.release": ["make_release", "verify_release"],
    "runs.train": ["train_checkpoint"],
    "runs.watch": ["watch"],
    "sizing.planning": ["Wishes", "survey", "survey_family"],
    "sources.convert": ["convert"],
    "sources.inspect": ["inspect"],
    "train.calibrate": ["calibrate"],
    "train.corpus": ["load_corpus", "sample_corpus"],
    "train.data.preview": ["preview"],
    "train.data.sources": ["Source"],
    "train.grid_optimizer": ["GridOptimizer"],
    "train.latents": ["prepare"],
    "train.loop": ["train_model"],
    "train.options": ["Options"],
    "train.pack": ["pack_model"],
    "train.quantize": ["quantize"],
    "train.start": ["plan_to_go_on"],
}
# Public names whose functions are called otherwise in their modules. A public `train` or `drafter` would be hidden by
# the package of that name.
_AT_HOME = {
    "evaluate": "compare",
    "survey_family": "family",
    "train_checkpoint": "run",
    "train_drafter": "run",
    "train_model": "train",
}


if not TYPE_CHECKING:  # a type checker would take any name for one that it gives

    def __getattr__(name: str) -> object:
        for home, names in _HOMES.items():
            if name in names:
                return getattr(import_module(f"intaglio.{home}"), _AT_HOME.get(name, name))
        raise AttributeError(f"module 'intaglio' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
