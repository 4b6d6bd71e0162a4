"""Tables of formats: what a recipe's grids are shipped as, who writes each target, and what runs it.

They name every writer. How each is read back stands in `formats.verify`, which imports no writer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from intaglio.formats.checkpoint.write import export_hf
from intaglio.formats.gguf.write import check_exportable, check_grids, export_gguf
from intaglio.formats.gguf.write_bundles import export_lmstudio, export_ollama
from intaglio.formats.litert.write import check_litert, export_litert
from intaglio.formats.mobile.write import export_mobile
from intaglio.formats.onnx.write import export_onnx
from intaglio.formats.onnx.write_page import export_web
from intaglio.formats.words.write_mlx import export_mlx
from intaglio.formats.words.write_vllm import export_vllm, vllm_note
from intaglio.numerics.grid import F16, GGUF_GRIDS, Q4_0_POSITIVE, BlockGrid, Grid
from intaglio.plan.plan import Plan
from intaglio.plan.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Export:
    """A file or folder that a run leaves.

    name: in the run folder. kind: of the packed model that it is made from, "trained" or "stock".
    runs: False for an artifact whose measurement would repeat another's. on_device: whether `write` takes a device.
    """

    name: str
    kind: str
    write: Callable[..., Any]
    runs: bool = True
    on_device: bool = False


@dataclass(frozen=True, kw_only=True)
class Format:
    """The files that a run exports, and the baseline that it is compared with.

    label: what the report calls the rounding, for a plan. stock_label, stock_recipe: what anyone's tool would do
    without training, for a recipe. exports: what a run writes. check: raises before training what an
    export would raise after it, for a plan and the source model's folder.
    """

    label: Callable[[Plan], str]
    stock_label: str
    stock_recipe: Callable[[Recipe], Recipe]
    exports: tuple[Export, ...]
    check: Callable[[Plan, Path], None]


def _check_gguf(plan: Plan, model_dir: Path) -> None:
    check_grids(plan)
    check_exportable(plan.model, model_dir)


# llama.cpp's quantizer writes any scale of a tensor type where a recipe has portable ones.
STOCK_GRIDS: dict[Grid, Grid] = dict(GGUF_GRIDS.values())


def _llama_quantize(recipe: Recipe) -> Recipe:
    """The same tensor types as the recipe's, filled as llama.cpp's own quantizer would."""
    rules = tuple(replace(rule, grid=STOCK_GRIDS.get(rule.grid, rule.grid)) for rule in recipe.rules)
    summary = "What llama-quantize writes, bit for bit; the reference that training is measured against"
    return replace(recipe, name=f"{recipe.name}-stock", summary=summary, fit="stock", rules=rules)


def _coarsest(plan: Plan) -> str:
    """The tensor type of the fewest bits, after which the rounding of the whole is called."""
    grids = (tensor.grid for tensor in plan if isinstance(tensor.grid, BlockGrid))
    return str(min(grids, key=lambda grid: grid.code_bits, default=F16).ggml_type)


def _absmax(recipe: Recipe) -> Recipe:
    return replace(recipe, name=f"{recipe.name}-absmax", fit="absmax")


HF = Export(name="hf", kind="trained", write=export_hf, runs=False, on_device=True)
GGUF = Format(
    label=_coarsest,
    stock_label="Stock rounding",
    stock_recipe=_llama_quantize,
    exports=(
        Export(name="model.gguf", kind="trained", write=export_gguf),
        Export(name="stock.gguf", kind="stock", write=export_gguf),
        HF,
    ),
    check=_check_gguf,
)
MOBILE = Format(
    label=lambda plan: "mobile absmax",
    stock_label="Absmax rounding",
    stock_recipe=_absmax,
    exports=(
        Export(name="mobile", kind="trained", write=export_mobile),
        Export(name="stock-mobile", kind="stock", write=export_mobile),
    ),
    check=lambda plan, model_dir: None,
)


LITERT = Format(
    label=lambda plan: "absmax for LiteRT",
    stock_label="Absmax rounding",
    stock_recipe=_absmax,
    exports=(HF,),  # the bundle needs an environment
    check=lambda plan, model_dir: check_litert(plan),
)


def format_of(plan: Plan) -> Format:
    """The format that holds the plan's grids."""
    if not plan.mobile:
        return GGUF
    return LITERT if any(tensor.grid == Q4_0_POSITIVE for tensor in plan) else MOBILE


# Exporters by the target's name in `intaglio export --to`.
EXPORTERS: dict[str, Callable[..., Any]] = {
    "gguf": export_gguf,
    "hf": export_hf,
    "gemma-mobile": export_mobile,
    "vllm": export_vllm,
    "mlx": export_mlx,
    "litert": export_litert,
    "onnx": export_onnx,
    "web": export_web,
    "ollama": export_ollama,
    "lmstudio": export_lmstudio,
}


PIPELINE = (
    "python -c \"from transformers import pipeline; print(pipeline('text-generation', model='{path}')"
    "('Hello', max_new_tokens=40)[0]['generated_text'])\""
)
NODE = (
    'npm install --ignore-scripts @huggingface/transformers@4.3.1 && node --input-type=module -e "'
    "import {{ env, pipeline }} from '@huggingface/transformers'; "
    "env.allowRemoteModels = false; env.localModelPath = './'; "
    "const generate = await pipeline('text-generation', '{path}', {{ dtype: 'q4' }}); "
    "console.log((await generate('Hello', {{ max_new_tokens: 40 }}))[0].generated_text)\""
)


# Sentences for an artifact's README, where it differs from the packed model.
NOT_RUN = "Written by the program's documentation and checked by parsing; the program itself was not run."
GGUF_NOTE = "GGUF has no static scales: llama.cpp scales activations as they come and keeps the KV cache in floats."
LITERT_NOTE = "LiteRT rounds activations to 8 bits as they come where weights are Q4_0."
MLX_NOTE = "MLX has no static scales: activations and KV cache stay in floats."
MOBILE_NOTE = "transformers quantizes activations and leaves the KV cache in floats."
TOO_WIDE = "bfloat16 does not hold this recipe's weights, and float32 takes eight times the room: ask for it by name"


def _static(note: str) -> Callable[[Plan], str]:
    """A note for plans with static scales."""
    return lambda plan: note if plan.static_scales else ""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A folder of a release, named as its exporter in EXPORTERS.

    title: of the runtime. command: runs the artifact from the release's folder; {path} stands for the
    artifact's, {name} for the model's. file: of the artifact in the folder; empty where it is the folder.
    option: of the exporter, without which a release for all is left without it. note: what a plan's artifact is
    without, or has otherwise, for its README. unwanted: why a plan's release is left without it if all are asked for;
    empty where it is not.
    """

    title: str
    command: str
    file: str = ""
    option: str = ""
    note: Callable[[Plan], str] = lambda plan: ""
    unwanted: Callable[[Plan], str] = lambda plan: ""


RUNTIMES: dict[str, Runtime] = {
    "gguf": Runtime(title="llama.cpp", command="llama-cli -m {path}", file="model.gguf", note=_static(GGUF_NOTE)),
    "ollama": Runtime(
        title="Ollama",
        command="ollama create {name} -f {path}/Modelfile && ollama run {name}",
        note=lambda plan: NOT_RUN,
    ),
    "lmstudio": Runtime(title="LM Studio", command="cp -r {path}/*/ ~/.lmstudio/models/", note=lambda plan: NOT_RUN),
    "hf": Runtime(title="transformers", command=PIPELINE, unwanted=lambda plan: "" if plan.portable else TOO_WIDE),
    "gemma-mobile": Runtime(
        title="transformers", command=PIPELINE, note=lambda plan: MOBILE_NOTE if plan.recipe.kv_cache else ""
    ),
    "vllm": Runtime(title="vLLM", command="vllm serve {path}", note=vllm_note),
    "litert": Runtime(
        title="LiteRT-LM",
        command="litert-lm run {path} --prompt Hello",
        file="model.litertlm",
        note=lambda plan: "" if plan.static_scales else LITERT_NOTE,
    ),
    "onnx": Runtime(title="ONNX Runtime and Transformers.js", command=NODE),
    "web": Runtime(title="a web page", command="python {path}/serve.py", option="transformers_js"),
    "mlx": Runtime(title="MLX", command='mlx_lm.generate --model {path} --prompt "Hello"', note=_static(MLX_NOTE)),
}
