"""The .litertlm file: models, tokenizer, chat template, end tokens and sampling.

litert-lm-builder stamps a random uuid and the time into every bundle. Here the uuid follows from the packed model
and the settings, and no time is given, so that two exports are the same file.
"""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from litert_lm_builder import litertlm_builder as builder_module
from litert_lm_builder.litertlm_builder import DType, LitertLmFileBuilder, Metadata, TfLiteModelType
from litert_lm_builder.runtime.proto import llm_metadata_pb2, sampler_params_pb2

from intaglio.formats.litert.read_tflite import GRAPHS_KEY, PLAN_KEY, graph_digest
from intaglio.formats.speech import read_speech

MODEL_TYPES = {
    "prefill_decode": TfLiteModelType.PREFILL_DECODE,
    "embedder": TfLiteModelType.EMBEDDER,
    "per_layer_embedder": TfLiteModelType.PER_LAYER_EMBEDDER,
}
NAMESPACE = uuid.UUID("6f1d7b4e-5a0c-4a53-9a55-0f6f5b3f6c11")  # any fixed one, so that ours are told from others'


def write_bundle(
    models: dict[str, Path],
    assets: Path,
    config: dict[str, Any],
    path: Path,
    *,
    context_tokens: int,
    identity: str,
    plan_digest: str,
) -> None:
    """Join the models, by their keys in MODEL_TYPES, with what `assets` holds beside a model's weights.

    config: of the text model. identity: what the uuid follows from. plan_digest: kept for `verify`, with the digest of
    the models' graphs.
    """
    digest = graph_digest([np.memmap(model, np.uint8, "r").view(np.ndarray) for model in models.values()])
    said = {"Authors": "intaglio", "uuid": str(uuid.uuid5(NAMESPACE, identity)), PLAN_KEY: plan_digest}
    metadata_path = path.with_name("llm_metadata.pb")
    metadata_path.write_bytes(llm_metadata(assets, config, context_tokens).SerializeToString(deterministic=True))
    builder_module.populate_system_metadata = lambda metadata: metadata  # it would add the time and a random uuid
    builder = LitertLmFileBuilder()
    for key, value in (said | {GRAPHS_KEY: digest}).items():
        builder.add_system_metadata(Metadata(key=key, value=value, dtype=DType.STRING))
    builder.add_llm_metadata(str(metadata_path))
    builder.add_hf_tokenizer(str(assets / "tokenizer.json"))
    for name, model in models.items():
        builder.add_tflite_model(str(model), MODEL_TYPES[name])
    with open(path, "wb") as file:
        builder.build(file)


def llm_metadata(assets: Path, config: dict[str, Any], context_tokens: int) -> llm_metadata_pb2.LlmMetadata:
    """Start and stop tokens, sampling, chat template and thinking channel, as Google's Gemma 4 bundles have them."""
    speech = read_speech(assets, config)
    assert speech is not None  # the export looked for tokenizer.json
    generation, tokenizer = speech.settings, _json(assets / "tokenizer_config.json")
    metadata = llm_metadata_pb2.LlmMetadata(max_num_tokens=context_tokens)
    metadata.start_token.token_ids.ids.append(speech.tokenizer.bos_token_id)
    metadata.pad_token.token_ids.ids.append(speech.tokenizer.pad_token_id or 0)
    for stop in speech.end_ids:
        metadata.stop_tokens.add().token_ids.ids.append(stop)
    if generation.get("suppress_tokens"):
        metadata.suppress_tokens.ids.extend(generation["suppress_tokens"])
    if generation.get("do_sample"):
        parameters = metadata.sampler_params
        parameters.type = sampler_params_pb2.SamplerParameters.TOP_P
        # where nothing is said, what transformers does
        parameters.k, parameters.p = generation.get("top_k") or 50, generation.get("top_p") or 1.0
        parameters.temperature = generation.get("temperature") or 1.0
    gemma4 = metadata.llm_model_type.gemma4
    special = {key: value for key, value in tokenizer.items() if key.endswith("_token") and isinstance(value, str)}
    gemma4.code_fence_start, gemma4.code_fence_end = special.get("stc_token", ""), special.get("etc_token", "")
    gemma4.open_quote = gemma4.close_quote = special.get("escape_token", "")
    gemma4.function_response_start = special.get("str_token", "")
    thought = metadata.channels.add(channel_name="thought")
    thought.start, thought.end = (
        f"{special.get('soc_token', '<|channel>')}thought\n",
        special.get("eoc_token", "<channel|>"),
    )
    if "default" in speech.templates:
        metadata.jinja_prompt_template = _for_minijinja(speech.templates["default"])
        turn_end = _token_id(assets, "<turn|>")
        if turn_end is not None and turn_end not in speech.end_ids:
            metadata.stop_tokens.add().token_ids.ids.append(turn_end)
    return metadata


def _for_minijinja(template: str) -> str:
    """LiteRT-LM's template engine has neither transformers' `generation` blocks nor methods of dictionaries."""
    template = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)
    return re.sub(r"\.get\(\s*(['\"][^'\"]+['\"])\s*\)", r"[\1]", template)


def _token_id(assets: Path, content: str) -> int | None:
    tokens = _json(assets / "tokenizer.json").get("added_tokens", [])
    return next((token["id"] for token in tokens if token["content"] == content), None)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
