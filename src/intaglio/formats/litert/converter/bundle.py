"""The .litertlm file: models, tokenizer, and what LiteRT-LM has to know about the model's text.

litert-lm-builder stamps a random uuid and the time into every bundle. Here the uuid follows from the packed model
and the settings, and no time is given, so that two exports are the same file.
"""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from typing import Any

from litert_lm_builder import litertlm_builder as builder_module
from litert_lm_builder.litertlm_builder import DType, LitertLmFileBuilder, Metadata, TfLiteModelType
from litert_lm_builder.runtime.proto import llm_metadata_pb2, sampler_params_pb2

MODEL_TYPES = {
    "prefill_decode": TfLiteModelType.PREFILL_DECODE,
    "embedder": TfLiteModelType.EMBEDDER,
    "per_layer_embedder": TfLiteModelType.PER_LAYER_EMBEDDER,
}
NAMESPACE = uuid.UUID("6f1d7b4e-5a0c-4a53-9a55-0f6f5b3f6c11")  # any fixed one, so that ours are told from others'


def write_bundle(
    models: dict[str, Path], assets: Path, config: dict[str, Any], path: Path, *, context_tokens: int, identity: str
) -> None:
    """Join the models, by their keys in MODEL_TYPES, with what `assets` holds beside a model's weights.

    config: of the text model. identity: what the uuid follows from.
    """
    metadata_path = path.with_name("llm_metadata.pb")
    metadata_path.write_bytes(llm_metadata(assets, config, context_tokens).SerializeToString(deterministic=True))
    builder_module.populate_system_metadata = lambda metadata: metadata  # it would add the time and a random uuid
    builder = LitertLmFileBuilder()
    for key, value in (("Authors", "intaglio"), ("uuid", str(uuid.uuid5(NAMESPACE, identity)))):
        builder.add_system_metadata(Metadata(key=key, value=value, dtype=DType.STRING))
    builder.add_llm_metadata(str(metadata_path))
    builder.add_hf_tokenizer(str(assets / "tokenizer.json"))
    for name, model in models.items():
        builder.add_tflite_model(str(model), MODEL_TYPES[name])
    with open(path, "wb") as file:
        builder.build(file)


def llm_metadata(assets: Path, config: dict[str, Any], context_tokens: int) -> llm_metadata_pb2.LlmMetadata:
    """Start and stop tokens, sampling, chat template and thinking channel, as Google's Gemma 4 bundles have them."""
    generation, tokenizer = _json(assets / "generation_config.json"), _json(assets / "tokenizer_config.json")
    metadata = llm_metadata_pb2.LlmMetadata(max_num_tokens=context_tokens)
    metadata.start_token.token_ids.ids.append(config["bos_token_id"])
    metadata.pad_token.token_ids.ids.append(config.get("pad_token_id") or 0)
    stops = generation.get("eos_token_id", config["eos_token_id"])
    stops = [*(stops if isinstance(stops, list) else [stops]), _token_id(assets, _text(tokenizer.get("eos_token")))]
    for stop in dict.fromkeys(stop for stop in stops if stop is not None):
        metadata.stop_tokens.add().token_ids.ids.append(stop)
    if generation.get("do_sample"):
        parameters = metadata.sampler_params
        parameters.type = sampler_params_pb2.SamplerParameters.TOP_P
        parameters.k, parameters.p = generation.get("top_k", 64), generation.get("top_p", 0.95)
        parameters.temperature = generation.get("temperature", 1.0)
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
    file, template = assets / "chat_template.jinja", tokenizer.get("chat_template")
    template = file.read_text("utf-8") if file.is_file() else template
    if isinstance(template, str):
        metadata.jinja_prompt_template = _for_minijinja(template)
        turn_end = _token_id(assets, "<turn|>")
        if turn_end is not None and turn_end not in [i for stop in metadata.stop_tokens for i in stop.token_ids.ids]:
            metadata.stop_tokens.add().token_ids.ids.append(turn_end)
    return metadata


def _for_minijinja(template: str) -> str:
    """LiteRT-LM's template engine has neither transformers' `generation` blocks nor methods of dictionaries."""
    template = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)
    return re.sub(r"\.get\(\s*(['\"][^'\"]+['\"])\s*\)", r"[\1]", template)


def _token_id(assets: Path, content: str) -> int | None:
    tokens = _json(assets / "tokenizer.json").get("added_tokens", [])
    return next((token["id"] for token in tokens if token["content"] == content), None)


def _text(token: Any) -> str:
    """A special token of tokenizer_config.json, which is its text or an object with it."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
