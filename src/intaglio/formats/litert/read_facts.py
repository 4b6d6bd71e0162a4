"""Checks that a .litertlm bundle holds the model beside its weights: graph constants, tokenizer, template, settings.

Rotary angles, eps, the cap of logits, the sliding window and the caches are read where the graph computes with them.
All else of the graphs is the trace's: it is compared with the digest that the export wrote into the bundle, so that a
change is noticed.
"""

from __future__ import annotations

import json
import re
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from intaglio.formats.facts import CONFIG, GENERATION, TEMPLATE, TOKENIZER, Facts, compare_facts, config_facts
from intaglio.formats.litert.read_tflite import (
    GRAPHS_KEY,
    LLM_METADATA_SECTION,
    PLAN_KEY,
    TOKENIZER_SECTION,
    Bundle,
    Signature,
    read_message,
    unzip_tokenizer,
)
from intaglio.formats.speech import Speech, compare_templates, compare_tokens, plain_tokens, read_speech
from intaglio.formats.tally import Tally
from intaglio.packed.model import PackedModel
from intaglio.plan.files import read_json
from intaglio.plan.rope import Rope

ADD, MUL, RESHAPE, TANH, SUB, RSQRT, COS = 0, 18, 22, 28, 41, 76, 108  # builtin operators
NUMBERS = {"float32": "<f4", "int32": "<i4"}
# Fields of LlmMetadata and of what it holds (runtime/proto/llm_metadata.proto of LiteRT-LM).
START, STOPS, SAMPLER, MOST_TOKENS, TEMPLATE_TEXT, SUPPRESSED, PAD = 1, 2, 4, 5, 7, 9, 13
TOP_K, TOP_P, TEMPERATURE = 2, 3, 4
EXPRESSED = ("do_sample", "top_k", "top_p", "temperature", "suppress_tokens", "eos_token_id", "bos_token_id")
NEUTRAL = ("pad_token_id", "cache_implementation", "use_cache", "max_length", "max_new_tokens")
MEANT = {"top_k": 50, "top_p": 1.0, "temperature": 1.0}  # transformers' own, where nothing is said
TURN_END = "<turn|>"


def compare_litert_facts(packed: PackedModel, bundle: Bundle, tally: Tally) -> None:
    """Count into `tally` what a bundle says beside its weights, and note what differs."""
    expected = config_facts(packed.plan.model.config)
    said = {key: bundle.said.get(key) for key in (PLAN_KEY, GRAPHS_KEY)}
    compare_facts(CONFIG, {PLAN_KEY: packed.plan.digest, GRAPHS_KEY: bundle.digest}, said, tally)
    expected |= _expected_constants(expected)
    signatures = bundle.models.get("tf_lite_prefill_decode", [])
    for signature in signatures:
        compare_facts(CONFIG, expected, _constants(signature), tally)
    strange = sorted(bundle.other.keys() - {LLM_METADATA_SECTION, TOKENIZER_SECTION})
    tally.unlike_facts += [f"a section of type {kind} that no export writes" for kind in strange]
    parts = {kind: bundle.other.get(kind, []) for kind in (LLM_METADATA_SECTION, TOKENIZER_SECTION)}
    if any(len(found) != 1 for found in parts.values()):
        tally.unlike_facts.append(f"{TOKENIZER}: expected one section of metadata and one tokenizer")
        return
    metadata = read_message(parts[LLM_METADATA_SECTION][0].tobytes())
    caches = {signature.tensors[signature.inputs["mask"]].shape[-1] for signature in signatures}
    compare_facts(CONFIG, {"tokens that fit": max(caches)}, {"tokens that fit": _last(metadata, MOST_TOKENS)}, tally)
    speech = read_speech(packed.path, packed.plan.model.config)
    if speech is not None:
        _compare_tokenizer(speech, unzip_tokenizer(parts[TOKENIZER_SECTION][0]), tally)
        _compare_metadata(speech, metadata, tally)


def _expected_constants(expected: Facts) -> Facts:
    layers = expected["num_hidden_layers"] - (expected.get("num_kv_shared_layers") or 0)
    cap = expected["final_logit_softcapping"]
    angles = {tuple(rope.angles): rope for name, rope in expected.items() if name.startswith("rope of ")}
    return {
        "angles of the rotary embeddings": [angles[key] for key in sorted(angles, key=_order)],
        "eps of all norms": [expected["rms_norm_eps"]],
        "eps in the attributes of norms": [expected["rms_norm_eps"]],
        "cap of the logits": [cap] if cap else [],
        "share of the cap": [1 / cap] if cap else [],
        "sliding window": [expected["sliding_window"]] if "sliding_attention" in expected["layer_types"] else [],
        "head_dim of the caches": expected["head_dim"][:layers],
        "heads of the caches": expected["num_key_value_heads"][:layers],
    }


def _constants(signature: Signature) -> Facts:
    """Facts of a graph: the constants that it computes with."""
    makers = {output: (code, inputs) for code, inputs, outputs in signature.operators for output in outputs}
    read = {code: [inputs for kind, inputs, _ in signature.operators if kind == code] for code in (COS, SUB, TANH)}
    angles = {tuple(_angles(signature, inputs[0], makers)) for inputs in read[COS]}
    norms = [(attributes, inner) for name, attributes, inner in signature.composites if name == "odml.rms_norm"]
    found: Facts = {
        "angles of the rotary embeddings": [Rope(values) for values in sorted(angles, key=_order)],
        "eps of all norms": sorted({value for _, inner in [(b"", signature), *norms] for value in _eps(inner)}),
        "eps in the attributes of norms": sorted({_attribute(attributes) for attributes, _ in norms}),
        "sliding window": sorted({int(v) for inputs in read[SUB] for v in _numbers(signature, inputs, "int32")}),
    }
    if "logits" in signature.outputs:
        tanh = {outputs[0]: inputs[0] for code, inputs, outputs in signature.operators if code == TANH}
        before = [makers[source][1] for source in tanh.values() if source in makers]
        after = [inputs for code, inputs, _ in signature.operators if code == MUL and tanh.keys() & set(inputs)]
        for name, nodes in (("share of the cap", before), ("cap of the logits", after)):
            found[name] = sorted({v for inputs in nodes for v in _numbers(signature, inputs, "float32")})
    count = sum(name.startswith("kv_cache_k_") for name in signature.inputs)
    keys = [signature.tensors[signature.inputs[f"kv_cache_k_{layer}"]].shape for layer in range(count)]
    found["head_dim of the caches"] = [shape[-1] for shape in keys]
    found["heads of the caches"] = [shape[1] for shape in keys]
    return found


def _order(angles: tuple[float, ...]) -> tuple[int, float]:
    """Longer rotary embeddings first; of two that are as long, the slower one."""
    return -len(angles), sum(angles)


def _angles(signature: Signature, tensor: int, makers: dict[int, tuple[int, list[int]]]) -> list[float]:
    """The constants by which the positions behind a cosine are multiplied."""
    waiting, seen = [tensor], set[int]()
    while waiting:
        number = waiting.pop()
        if number in seen or number < 0:
            continue
        seen.add(number)
        found = signature.tensors[number]
        if found.type == "float32" and found.data.size > 4:
            return [float(value) for value in found.data.view("<f4")]
        waiting += makers[number][1] if number in makers else []
    return []


def _eps(graph: Signature) -> Iterator[float]:
    """Constant added before a reciprocal square root, also where the sum is reshaped between the two."""
    makers = {output: (code, inputs) for code, inputs, outputs in graph.operators for output in outputs}
    for code, inputs, _ in graph.operators:
        if code == RSQRT:
            made = makers.get(inputs[0])
            made = makers.get(made[1][0]) if made is not None and made[0] == RESHAPE else made
            if made is not None and made[0] == ADD:
                yield from _numbers(graph, made[1], "float32")


def _numbers(graph: Signature, inputs: list[int], kind: str) -> list[float]:
    """Constants of one element that an operator reads."""
    found = [graph.tensors[number] for number in inputs if number >= 0]
    return [float(t.data.view(NUMBERS[kind])[0]) for t in found if t.type == kind and t.data.size == 4]


def _attribute(attributes: bytes) -> float:
    """The float32 in the attributes of a norm, a flexbuffer with one entry: it ends with value, type and width."""
    return float(struct.unpack("<f", attributes[-8:-4])[0])


def _compare_tokenizer(speech: Speech, text: bytes, tally: Tally) -> None:
    own = read_json(speech.folder / "tokenizer.json")
    name = "vocabulary, merges and steps"
    compare_facts(TOKENIZER, {name: own}, {name: json.loads(text)}, tally)
    texts = speech.texts()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_bytes(text)
        found = plain_tokens(path, texts, add_special=False)
    compare_tokens(speech.tokens(texts, add_special=False), found, texts, tally)
    if not speech.adds_bos:
        tally.unsaid.append("LiteRT-LM puts a first token before every text, this tokenizer does not")


def _compare_metadata(speech: Speech, metadata: dict[int, list[Any]], tally: Tally) -> None:
    """First, last and padding tokens, chat template and sampling, as LiteRT-LM takes them from the bundle."""
    pad = speech.tokenizer.pad_token_id
    ids = {"bos_token_id": speech.tokenizer.bos_token_id, "pad_token_id": pad if pad is not None else 0}
    found = {"bos_token_id": _token(metadata, START), "pad_token_id": _token(metadata, PAD)}
    stops = {_ids(read_message(stop)) for stop in metadata.get(STOPS, [])}
    ends = {index for (index,) in stops if isinstance(index, int)} if all(len(s) == 1 for s in stops) else set(stops)
    turn_end = speech.tokenizer.get_vocab().get(TURN_END)
    if turn_end in ends and turn_end not in speech.end_ids:
        tally.unsaid.append(f"LiteRT-LM ends at {TURN_END!r} too")
        ends.remove(turn_end)
    ids["end tokens"] = sorted(speech.end_ids)
    found["end tokens"] = sorted(ends, key=lambda end: (isinstance(end, tuple), end))
    compare_facts(TOKENIZER, ids, found, tally)
    template = _last(metadata, TEMPLATE_TEXT)
    own = {name: text for name, text in speech.templates.items() if name == "default"}
    compare_templates(
        Speech(speech.folder, speech.tokenizer, own, speech.settings, speech.end_ids),
        {"default": template.decode("utf-8")} if template else {},
        tally,
    )
    tally.unsaid += [f"{TEMPLATE} {name!r}" for name in sorted(speech.templates.keys() - own.keys())]
    _compare_sampling(speech.settings, metadata, tally)


def _compare_sampling(settings: Facts, metadata: dict[int, list[Any]], tally: Tally) -> None:
    sampler = read_message(_last(metadata, SAMPLER) or b"")
    found: Facts = {
        "do_sample": bool(sampler),
        "suppress_tokens": _varints(read_message(_last(metadata, SUPPRESSED) or b"")) or None,
    }
    expected = {
        "do_sample": bool(settings.get("do_sample")),
        "suppress_tokens": settings.get("suppress_tokens") or None,
    }
    if sampler:
        k, p, heat = (_last(sampler, number) for number in (TOP_K, TOP_P, TEMPERATURE))
        found |= {"top_k": k, "top_p": _float(p), "temperature": _float(heat)}
        expected |= {name: MEANT[name] if settings.get(name) is None else settings[name] for name in MEANT}
    else:
        tally.unsaid.append("greedy decoding: LiteRT-LM samples as its caller says where the model does not")
    compare_facts(GENERATION, expected, found, tally)
    tally.unsaid += [f"generation setting {n}" for n, v in settings.items() if v and n not in (*EXPRESSED, *NEUTRAL)]


def _last(message: dict[int, list[Any]], number: int) -> Any:
    return message[number][-1] if number in message else None


def _float(data: bytes | None) -> float | None:
    return None if data is None else float(struct.unpack("<f", data)[0])


def _token(metadata: dict[int, list[Any]], number: int) -> Any:
    found = _ids(read_message(_last(metadata, number) or b""))
    return found[0] if len(found) == 1 else found


def _ids(union: dict[int, list[Any]]) -> tuple[Any, ...]:
    """Token ids of a TokenUnion, or its text."""
    found = [index for entry in union.get(1, []) for index in _varints(read_message(entry))]
    return (*found, *(text.decode("utf-8") for text in union.get(2, [])))


def _varints(message: dict[int, list[Any]]) -> list[int]:
    """The numbers of a message's first field, one by one or packed."""
    found = []
    for entry in message.get(1, []):
        words = re.findall(rb"[\x80-\xff]*[\x00-\x7f]", entry, re.DOTALL) if isinstance(entry, bytes) else []
        found += [sum((byte & 127) << 7 * place for place, byte in enumerate(word)) for word in words]
        found += [entry] if isinstance(entry, int) else []
    return found
