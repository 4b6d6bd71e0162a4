"""ONNX for ONNX Runtime and Transformers.js: a PackedModel's codes and scales in the two sessions of a Gemma 4.

A folder with config.json, tokenizer and `onnx/`, where each session is a graph with its data beside it.
The decoder's graph is traced from transformers (`onnx_trace.py`, `onnx_decoder.py`), without weights; that of the
embeddings is made here. Codes and scales go in by name, a few rows at a time. Nothing is fitted or rounded.

With static scales, linears have QuantizeLinear and DequantizeLinear around them, and the cache that
goes from step to step is of int8. Of a multimodal model the text alone is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from intaglio.errors import ConfigError
from intaglio.formats.checkpoint.write import hf_config
from intaglio.formats.onnx.layout import (
    DECODER,
    EMBEDDINGS,
    FOLDER,
    GRAPH_KEY,
    Matrix,
    file_name,
    graph_digest,
    matrices,
)
from intaglio.formats.onnx.write_data import IR_VERSION, KERNELS, DataFiles, float_tensor, opsets, quantized_tensors
from intaglio.formats.onnx.write_decoder import decoder_graph
from intaglio.formats.speech import read_speech
from intaglio.packed.assets import copy_assets
from intaglio.packed.model import PackedModel
from intaglio.packed.store import new_path
from intaglio.plan.family import transformers_config
from intaglio.plan.files import read_json
from intaglio.plan.rope import check_rope


def export_onnx(packed: PackedModel, path: str | Path, *, replace: bool = False) -> None:
    """Write the folder `path`, which Transformers.js and ONNX Runtime open.

    Raises ConfigError for a model that these files cannot hold, RecipeError for a grid that no kernel
    has, InputError for packages that are missing, OutputError if the folder cannot be written.
    """
    with new_path(Path(path), replace=replace) as temporary:
        write_onnx(packed, temporary)


def write_onnx(packed: PackedModel, folder: Path) -> None:
    """`export_onnx` into a new folder that stays, whole or not."""
    packed = packed.text_only()
    check_rope(packed.plan.model, "the traced graph")
    placed = matrices(packed.plan)
    (folder / FOLDER).mkdir(parents=True)
    copy_tokenizer(packed.path, folder)
    files = {}
    for session, make in ((DECODER, decoder_graph), (EMBEDDINGS, embeddings_graph)):
        with DataFiles(folder / FOLDER, file_name(session)) as data:
            model = make(packed, {m.module: m for m in placed if m.session == session}, data)
            (folder / FOLDER / file_name(session)).write_bytes(_finished(model, packed))
            files[file_name(session)] = data.count
    config = json.dumps(web_config(packed, files), indent=2) + "\n"
    (folder / "config.json").write_text(config, "utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy tokenizer and settings, in a form in which Transformers.js reads them as transformers does.

    That knows no classes of tokenizers: tokenizer.json says each step. Whether a first token stands before a text, and
    the chat template, it looks for in tokenizer_config.json. ConfigError where it could not read the tokenizer.
    """
    copy_assets(source, folder)
    path = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").is_file() or not path.is_file():
        raise ConfigError(f"{source}: no tokenizer.json or no tokenizer_config.json: Transformers.js needs both")
    speech = read_speech(source, {})
    assert speech is not None  # there is a tokenizer.json
    config = read_json(source / path.name) | {"add_bos_token": speech.adds_bos}
    if set(speech.templates) == {"default"}:
        config["chat_template"] = speech.templates["default"]
    elif speech.templates:
        config["chat_template"] = [{"name": name, "template": text} for name, text in speech.templates.items()]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    steps = speech.tokenizer.backend_tokenizer.to_str(pretty=True)
    if json.loads(steps) != read_json(source / "tokenizer.json"):
        (folder / "tokenizer.json").write_text(steps, "utf-8")


def web_config(packed: PackedModel, files: dict[str, int]) -> dict[str, Any]:
    """config.json as Transformers.js wants it: the text model within a Gemma 4, and how many data files there are."""
    text = hf_config(packed.plan.model, torch.float32)
    del text["architectures"]
    ids = {key: text.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "model_type": packed.plan.model.family.whole,
        "architectures": ["Gemma4ForConditionalGeneration"],
        "text_config": text,
        **ids,
        "transformers.js_config": {"dtype": "q4", "use_external_data_format": files},
    }


def _finished(model: Any, packed: PackedModel) -> bytes:
    """The graph's bytes: without the exporter's notes, which differ from machine to machine, and with ours."""
    model.producer_name, model.producer_version = "intaglio", ""
    for item in [model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output]:
        item.doc_string = ""
        del item.metadata_props[:]
    del model.graph.value_info[:]
    said = {"intaglio.plan": packed.plan.digest, "intaglio.recipe": packed.plan.recipe.name}
    for key, value in (said | {GRAPH_KEY: graph_digest(model)}).items():
        model.metadata_props.add(key=key, value=value)
    return bytes(model.SerializeToString(deterministic=True))


# Embeddings


def embeddings_graph(packed: PackedModel, placed: dict[str, Matrix], data: DataFiles) -> Any:
    """input_ids [B, T] -> inputs_embeds [B, T, H] and, where there is a table, per_layer_inputs [B, T, L, P]."""
    from onnx import TensorProto, helper

    config = transformers_config(packed.plan.model.config)
    nodes: list[Any] = []
    tensors: list[Any] = []
    outputs = []
    for matrix in placed.values():
        table = matrix.tensor.spec.role == "ple_embedding"
        width = config.hidden_size_per_layer_input if table else config.hidden_size
        output, shape = ("per_layer_inputs", [config.num_hidden_layers, width]) if table else ("inputs_embeds", [width])
        nodes += _lookup(packed, matrix, data, tensors, output, shape)
        # transformers multiplies by the root of the width, rounded to float32
        tensors.append(data.add_array(f"{matrix.module}.embed_scale", np.array(width**0.5, np.float32)))
        dims = ["batch_size", "sequence_length", *shape]
        outputs.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, dims))
        if table:
            tensors.append(data.add_array(f"{matrix.module}.shape", np.array([0, 0, *shape], np.int64)))
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
    graph = helper.make_graph(nodes, EMBEDDINGS, [ids], outputs, tensors)
    return helper.make_model(graph, opset_imports=opsets(), ir_version=IR_VERSION)


def _lookup(
    packed: PackedModel, matrix: Matrix, data: DataFiles, tensors: list[Any], output: str, shape: list[int]
) -> list[Any]:
    """Nodes that look rows up, scale them and, of the table of per-layer embeddings, give each layer its own."""
    from onnx import TensorProto, helper

    name, kernel = matrix.module, matrix.kernel
    rows, scaled = f"{name}.rows", output if len(shape) == 1 else f"{name}.scaled"
    if kernel is None:
        tensors.append(float_tensor(packed, matrix, data))
        nodes = [helper.make_node("Gather", [f"{name}.weight", "input_ids"], [rows], name=name, axis=0)]
        if matrix.half:
            nodes.append(helper.make_node("Cast", [rows], [f"{rows}.float"], to=TensorProto.FLOAT))
            rows += ".float"
    else:
        tensors += quantized_tensors(packed, matrix, data)
        inputs = [f"{name}.weight.codes", "input_ids", f"{name}.weight.scale"]
        how: dict[str, Any] = {"bits": kernel.bits, "block_size": kernel.block, "gather_axis": 0, "quantize_axis": 1}
        nodes = [helper.make_node("GatherBlockQuantized", inputs, [rows], name=name, domain=KERNELS, **how)]
    nodes.append(helper.make_node("Mul", [rows, f"{name}.embed_scale"], [scaled]))
    if scaled != output:
        nodes.append(helper.make_node("Reshape", [scaled, f"{name}.shape"], [output]))
    return nodes
