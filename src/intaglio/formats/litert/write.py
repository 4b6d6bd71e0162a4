"""A .litertlm bundle for LiteRT-LM: the recipe's codes, weight scales, activation scales and KV scales.

LiteRT's packages pin others than ours, so they live in an environment of their own, and this module only checks
and starts `converter.worker` with that environment's interpreter. The worker reads the packed model itself;
nothing is decoded on the way, and no code of ours runs there but `converter`, `packed` and below.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import intaglio
from intaglio.errors import ConfigError, InputError, RecipeError, RuntimeFailureError
from intaglio.formats.facts import check_dense
from intaglio.formats.litert.converter import ERROR_MARK
from intaglio.formats.speech import plain_tokens, read_speech
from intaglio.formats.write_folder import silent
from intaglio.numerics.grid import Q4_0_POSITIVE, BlockGrid
from intaglio.packed.model import PackedModel
from intaglio.packed.store import new_path, scratch_folder
from intaglio.plan.family import transformers_config
from intaglio.plan.plan import Plan, PlannedTensor
from intaglio.plan.rope import check_rope

PACKAGE = Path(intaglio.__file__).parent
REQUIREMENTS = PACKAGE / "formats/litert/converter/requirements.txt"
ENVIRONMENT = Path(".runtimes/litert")
CONTEXT_TOKENS = 4096
PREFILL_TOKENS = 128


def export_litert(
    packed: PackedModel,
    path: str | Path,
    *,
    python: str | Path | None = None,
    context_tokens: int | None = None,
    prefill_tokens: int | None = None,
    replace: bool = False,
    on_progress: Callable[[int, int], None] = silent,
) -> None:
    """Write the bundle `path`: the text model, its embeddings and its per-layer embeddings as three models.

    python: interpreter of the environment that REQUIREMENTS describes; by default that of ENVIRONMENT, in the
    working directory or beside intaglio's source. context_tokens: that fit into the KV cache; by default
    CONTEXT_TOKENS or what the model allows. prefill_tokens: of a prompt that are read at once.
    Raises RecipeError for grids that LiteRT does not have, InputError if the environment is missing or not as
    required (ConfigError where there is none), OutputError if the bundle cannot be written.
    """
    plan = packed.plan.text_only()
    check_litert(plan)
    _check_static(packed.read_static())
    if not (packed.path / "tokenizer.json").is_file():
        raise ConfigError(f"{packed.path}: no tokenizer.json: LiteRT-LM needs one: put it beside the packed model")
    _check_tokenizer(packed.path)
    longest = int(transformers_config(plan.model.config).max_position_embeddings)
    context_tokens = context_tokens or min(CONTEXT_TOKENS, longest)
    prefill_tokens = prefill_tokens or min(PREFILL_TOKENS, context_tokens)
    if not 1 < prefill_tokens <= context_tokens <= longest:
        raise InputError(
            f"a context of {context_tokens} tokens, read {prefill_tokens} at a time: expected at most the model's "
            f"{longest}, and at least 2 and at most the context at a time"
        )
    interpreter = find_python(python)
    with ExitStack() as stack:
        temporary = stack.enter_context(new_path(Path(path), replace=replace))
        folder = stack.enter_context(scratch_folder(Path(path)))
        bundle = folder.absolute() / "model.litertlm"
        arguments = ["--context-tokens", str(context_tokens), "--prefill-tokens", str(prefill_tokens)]
        _run_worker(interpreter, [str(packed.path.absolute()), str(bundle), *arguments], bundle.parent)
        os.replace(bundle, temporary)
        on_progress(temporary.stat().st_size, temporary.stat().st_size)


def _check_tokenizer(folder: Path) -> None:
    """LiteRT-LM reads tokenizer.json by itself, without transformers' classes."""
    speech = read_speech(folder, {})
    assert speech is not None  # there is a tokenizer.json
    texts = speech.texts()
    found = plain_tokens(folder / "tokenizer.json", texts, add_special=False)
    wrong = [text for text, a, b in zip(texts, found, speech.tokens(texts, add_special=False), strict=True) if a != b]
    if wrong:
        raise ConfigError(
            f"{folder}/tokenizer.json: LiteRT-LM would read {len(wrong)} of {len(texts)} fixed texts otherwise than "
            f"transformers, the first is {wrong[0][:40]!r}: export it to hf, vllm or onnx"
        )


def check_litert(plan: Plan) -> None:
    """Raise RecipeError for a family or a grid that the exporter or LiteRT does not have."""
    check_dense(plan.model, "litert", "the LiteRT bundle")
    check_rope(plan.model, "the traced graph")
    for tensor in sorted(plan, key=lambda tensor: "embedding" in tensor.spec.role):
        _check_tensor(plan, tensor)


def _check_tensor(plan: Plan, tensor: PlannedTensor) -> None:
    grid, columns = tensor.grid, tensor.spec.shape[-1] if tensor.spec.shape else 1
    if not isinstance(grid, BlockGrid):
        return
    what = f"{tensor.name}: recipe {plan.recipe.name} puts it on grid {grid.name}"
    if grid == Q4_0_POSITIVE and tensor.quantized_linear:
        return
    if not grid.positive:
        signed = (
            "whose scales may be negative, and LiteRT takes positive ones only"
            if grid.super_block is None
            else ("which LiteRT does not have")
        )
        raise RecipeError(f"{what}, {signed}: quantize or train with a recipe for it, mobile or q4_0-litert")
    width = tensor.spec.slice_columns or columns
    if grid.block_size not in (columns, width):
        raise RecipeError(f"{what}, with a scale for {grid.block_size} columns: expected one for a row of {columns}")
    if width * grid.code_bits % 8:
        raise RecipeError(f"{what}, where {width} columns are no whole bytes: choose int8 for it")


def _check_static(static: dict[str, float]) -> None:
    """An int8 linear has both a scale of its input and one of its output."""
    for name, value in static.items():
        other = name.replace("input_activation", "output_activation")
        if other != name and other in static and bool(value) != bool(static[other]):
            raise InputError(
                f"{name} = {value!r}, but {other} = {static[other]!r}: LiteRT's linears are int8 on both sides or on "
                "none: calibrate both, or set both to 0"
            )


def find_python(python: str | Path | None) -> Path:
    """The interpreter of LiteRT's environment. InputError says how to make one."""
    if python is not None:
        if not Path(python).is_file():
            raise InputError(f"{python}: no such file: expected the interpreter of LiteRT's environment")
        return Path(python).absolute()
    named = os.environ.get("INTAGLIO_RUNTIMES")  # as the runners of benchmarks/ take it
    folders = [Path(named)] if named else [folder / ENVIRONMENT.parent for folder in (Path.cwd(), PACKAGE.parents[1])]
    candidates = [folder / ENVIRONMENT.name / "bin/python" for folder in folders]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise ConfigError(
            f"LiteRT's packages need an environment of their own: {candidates[0]} is not there: make it with "
            f"`make {ENVIRONMENT}/.done` in intaglio's folder, or with `python3 -m venv {ENVIRONMENT} && "
            f"{ENVIRONMENT}/bin/pip install -r {REQUIREMENTS}` (2.3 GB), or name its interpreter with --python"
        )
    return found


def _run_worker(python: Path, arguments: list[str], folder: Path) -> None:
    """Run the worker in `folder`, with intaglio's own package and nothing else of this environment."""
    (folder / "path").mkdir()
    (folder / "path/intaglio").symlink_to(PACKAGE, target_is_directory=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(folder / "path"), "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
    command = [str(python), "-m", "intaglio.formats.litert.converter.worker", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        if done.returncode < 0:
            known = "; systems do this to the largest process when memory runs out"
            how = f"signal {-done.returncode}{known if done.returncode == -signal.SIGKILL else ''}"
            raise RuntimeFailureError(f"{python}: LiteRT's converter ended with {how}: {lines[-1]}")
        told = next((line.removeprefix(ERROR_MARK) for line in lines if line.startswith(ERROR_MARK)), None)
        raise InputError(told or f"{python}: LiteRT's converter ended with code {done.returncode}: {lines[-1]}")
