"""Checks that an ONNX folder holds the model beside its weights: graph constants, config, tokenizer, template.

Rotary angles, eps of norms and the cap of logits are read where the graph computes with them. All other nodes and
small constants are the trace's: they are compared with the digest that the export wrote into the file, so that a
change is noticed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from intaglio.formats.facts import CONFIG, TOKENIZER, Facts, compare_facts, config_facts, spelled_twice, strange_files
from intaglio.formats.onnx.layout import DECODER, EMBEDDINGS, FOLDER, GRAPH_KEY, file_name, graph_digest
from intaglio.formats.speech import compare_folder_speech, compare_tokens, plain_tokens, read_speech
from intaglio.formats.tally import Tally
from intaglio.packed.assets import ASSETS
from intaglio.packed.model import PackedModel
from intaglio.plan.family import load_config, text_config
from intaglio.plan.files import read_json
from intaglio.plan.rope import Rope


def compare_onnx_facts(packed: PackedModel, folder: Path, graphs: dict[str, Any], tally: Tally) -> None:
    """Count into `tally` what an ONNX folder says beside its weights. graphs: the sessions, opened."""
    model = packed.plan.model
    expected = config_facts(model.config)
    own = load_config(folder)
    compare_facts(CONFIG, expected | spelled_twice(model.layer_config), config_facts(own, text_only=True), tally)
    ids = {f"{kind}_token_id": model.config.get(f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    compare_facts(CONFIG, ids, {name: own.get(name) for name in ids}, tally)
    compare_facts(CONFIG, expected | _expected_constants(expected), _constants(graphs[DECODER]), tally)
    for session, graph in graphs.items():
        said = {entry.key: entry.value for entry in graph.model.metadata_props}
        known = {"intaglio.plan": packed.plan.digest, "intaglio.recipe": packed.plan.recipe.name}
        known[GRAPH_KEY] = graph_digest(graph.model)
        compare_facts(CONFIG, known, {name: said.get(name) for name in known}, tally)
        data = sorted(path.name for path in (folder / FOLDER).glob(f"{file_name(session)}_data*"))
        count = own.get("transformers.js_config", {}).get("use_external_data_format", {}).get(file_name(session))
        compare_facts(CONFIG, {f"data files of {session}": len(data)}, {f"data files of {session}": count}, tally)
    speech = read_speech(packed.path, model.config)
    compare_folder_speech(speech, folder, text_config(own), tally)
    if speech is not None and (folder / "tokenizer.json").is_file():
        said = read_json(folder / "tokenizer_config.json")
        compare_facts(
            TOKENIZER, {"add_bos_token": speech.adds_bos}, {"add_bos_token": said.get("add_bos_token")}, tally
        )
        texts = speech.texts()
        compare_tokens(speech.tokens(texts), plain_tokens(folder / "tokenizer.json", texts), texts, tally)
    sessions = [path.name for path in (folder / FOLDER).iterdir() if path.name.startswith((DECODER, EMBEDDINGS))]
    strange = strange_files(folder, [*ASSETS, "config.json", *(f"{FOLDER}/{name}" for name in sessions)])
    tally.unlike_facts += [f"{name}: a file that no export writes, and a runtime may load" for name in strange]


def _expected_constants(expected: Facts) -> Facts:
    return {
        "angles of the rotary embeddings": [
            rope
            for rope in sorted(
                (value for name, value in expected.items() if name[:8] == "rope of "), key=lambda rope: rope.angles
            )
        ],
        "eps of all norms": [expected["rms_norm_eps"]],
        "cap of the logits": [expected["final_logit_softcapping"] or 0.0],
    }


def _constants(graph: Any) -> Facts:
    """Facts of the decoder's nodes: the constants that they compute with."""
    cosines = [node.input[0] for node in graph.graph.node if node.op_type == "Cos"]
    eps = {value for node in _reading(graph, "ReduceMean", "Add") for value in _numbers(graph, node)}
    after = _reading(graph, "Tanh", "Mul")
    caps: set[float | None] = {value for node in after for value in _numbers(graph, node)}
    for tanh in (node for node in graph.graph.node if node.op_type == "Tanh"):
        divided = graph.makers.get(tanh.input[0])
        caps |= {*_numbers(graph, divided)} if divided is not None and divided.op_type == "Div" else {None}
    return {
        "angles of the rotary embeddings": [
            Rope(angles) for angles in sorted({_angles(graph, name) for name in cosines})
        ],
        "eps of all norms": sorted(eps),
        "cap of the logits": sorted(caps, key=str) or [0.0],
    }


def _angles(graph: Any, name: str) -> tuple[float, ...]:
    """The table of floats that a value is computed from, by whatever name: torch folds it, or keeps the buffer's."""
    table = graph.array(name) if name in graph.tensors else None
    if table is not None and table.dtype.kind == "f" and table.size > 1:
        return tuple(table.ravel().tolist())
    maker = graph.makers.get(name)
    return next((found for source in (maker.input if maker else ()) if (found := _angles(graph, source))), ())


def _reading(graph: Any, maker: str, kind: str) -> list[Any]:
    """Nodes of one kind that read what nodes of another make."""
    made = [node for node in graph.graph.node if node.op_type == maker]
    return [user for node in made for user in graph.users.get(node.output[0], []) if user.op_type == kind]


def _numbers(graph: Any, node: Any) -> list[float]:
    """Constants of one element that a node reads."""
    found = [graph.array(name) for name in node.input if name in graph.tensors]
    return [float(value.ravel()[0]) for value in found if value is not None and value.size == 1]
