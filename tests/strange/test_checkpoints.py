"""Weights: names under wrappers, heads said twice, dtypes and signs of quantizers, shards."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.strange import ITSELF, POINTER, SAME, Base, Input, Tensors, file, judge, said, tensors, write
from tests.support.tiny import GEMMA4, make_checkpoint

Make = Callable[[Path], object]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NO_PLACE, OTHER_HEAD, UNMERGED = "would be lost", "has other values than model.embed", "an adapter that is not merged"


def named(prefix: str) -> Make:
    return tensors(lambda found: {prefix + name: tensor for name, tensor in found.items()})


def nested(prefix: str) -> Make:
    return tensors(lambda found: {prefix + name.removeprefix("model."): tensor for name, tensor in found.items()})


def inside(old: str, new: str) -> Make:
    return tensors(lambda found: {name.replace(old, new): tensor for name, tensor in found.items()})


NAMES: dict[str, Input] = {
    **{f"{prefix}*": Input(named(prefix), SAME) for prefix in ("module.", "_orig_mod.", "base_model.model.")},
    **{f"{a}{b}*": Input(named(a + b), SAME) for a, b in (("module.", "module."), ("_orig_mod.", "module."))},
    "twice PEFT's": Input(named("base_model.model.base_model.model."), SAME),
    "FSDP around a compiled model": Input(named("_fsdp_wrapped_module._orig_mod."), SAME),
    "Lightning Fabric's": Input(named("_forward_module."), SAME, "misleading"),
    "Fabric's around DDP": Input(named("_forward_module.module."), SAME, "misleading"),
    "language_model.*": Input(named("language_model."), SAME),
    "model.language_model.*": Input(nested("model.language_model."), SAME),
    "language_model.model.*": Input(nested("language_model.model."), SAME),
    "DDP around a multimodal model": Input(nested("module.model.language_model."), SAME),
    "PEFT around one": Input(nested("base_model.model.model.language_model."), SAME),
    "a compiled multimodal model": Input(nested("_orig_mod.language_model.model."), SAME),
    "a compiled text model inside one": Input(nested("model.language_model._orig_mod."), SAME),
    "a compiled body": Input(nested("model._orig_mod."), SAME),
    "DDP around the body": Input(nested("model.module."), SAME, "misleading"),
    "a compiled layer": Input(inside("layers.0.", "layers.0._orig_mod."), SAME),
    "a wrapped layer": Input(inside("layers.0.", "layers.0.module."), SAME, "misleading"),
    "a checkpointed layer": Input(inside("layers.0.", "layers.0._checkpoint_wrapped_module."), SAME),
    **{
        f"{prefix}*, of another program": Input(named(prefix), f"names begin with '{prefix}', which belongs to another")
        for prefix in ("student.", "policy.", "actor.module.", "pretrained_model.", "model.", "base_model.")
    },
    "without any prefix": Input(nested(""), "and embed_tokens.weight has no place", "misleading"),
    "of a text_model": Input(nested("text_model."), "text_model.embed_tokens.weight has no place", "misleading"),
    "of a decoder": Input(nested("model.decoder."), "model.decoder.embed_tokens.weight has no pl", "misleading"),
    "capital letters": Input(inside("layers", "Layers"), r"Layers\S+ has no place", "misleading"),
    "a parametrized weight": Input(
        inside("0.mlp.up_proj.weight", "0.mlp.up_proj.parametrizations.weight.original"),
        "up_proj.parametrizations.weight.original has no place",
        "misleading",
    ),
    "one tensor under two names": Input(
        tensors(lambda found: found | {f"module.{EMBEDDING}": found[EMBEDDING]}), "are one tensor"
    ),
    "one tensor as text and multimodal models have it": Input(
        tensors(lambda found: found | {"model.language_model.embed_tokens.weight": found[EMBEDDING]}), "are one tensor"
    ),
    "a smoothed copy beside": Input(
        tensors(lambda found: found | {f"ema.{name}": tensor for name, tensor in found.items()}), NO_PLACE
    ),
    "a layer too many": Input(
        tensors(lambda found: found | {n.replace("layers.0.", "layers.4."): t for n, t in found.items()}), NO_PLACE
    ),
    "a layer too few": Input(
        tensors(lambda found: {n: t for n, t in found.items() if "layers.3." not in n}), "tensors are missing"
    ),
    "gate and up in one": Input(
        inside("0.mlp.gate_proj", "0.mlp.gate_up_proj"), r"0\.mlp\.gate_up_proj\.weight has no place", "misleading"
    ),
}


def head(name: str, change: Callable[[torch.Tensor], torch.Tensor] = lambda found: found) -> Make:
    return tensors(lambda found: found | {name: change(found[EMBEDDING])})


def flipped(found: torch.Tensor) -> torch.Tensor:
    return found.flip(0)


def one_other(found: torch.Tensor) -> torch.Tensor:
    found = found.clone()
    found[-1, -1] += 1
    return found


def two_heads(folder: Path) -> None:
    head(HEAD, flipped)(folder)
    head("language_model.lm_head.weight")(folder)
    said("config.json", tie_word_embeddings=False)(folder)


HEADS: dict[str, Input] = {
    "the embedding again": Input(head(HEAD), SAME),
    "the embedding again, in float32": Input(head(HEAD, torch.Tensor.float), SAME),
    "another": Input(head(HEAD, flipped), OTHER_HEAD),
    "another in one value": Input(head(HEAD, one_other), OTHER_HEAD),
    "zeros": Input(head(HEAD, torch.zeros_like), OTHER_HEAD),
    "fewer tokens": Input(head(HEAD, lambda found: found[:4000]), OTHER_HEAD),
    "another of a multimodal model": Input(head("language_model.lm_head.weight", flipped), OTHER_HEAD),
    "another under a wrapper": Input(head("module.lm_head.weight", flipped), OTHER_HEAD),
    "another, compiled": Input(head("lm_head._orig_mod.weight", flipped), OTHER_HEAD),
    "another inside the body": Input(head("model.lm_head.weight", flipped), NO_PLACE),
    "with an adapter": Input(head("lm_head.base_layer.weight", flipped), UNMERGED),
    "a bias": Input(head("lm_head.bias", lambda found: found[:, 0]), NO_PLACE),
    "the embedding under its name": Input(inside(EMBEDDING, HEAD), "the first is model.embed_tokens.weight"),
    "two, not tied": Input(two_heads, "are one tensor"),
}


def everything(dtype: torch.dtype) -> Make:
    return tensors(lambda found: {name: tensor.to(dtype) for name, tensor in found.items()})


def one(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Make:
    return tensors(lambda found: found | {name: change(found[name])})


def beside(sign: str) -> Make:
    return tensors(lambda found: found | {UP.removesuffix("weight") + sign: torch.ones(4)})


CODES = ("int8", "uint8", "int16", "int32", "int64", "bool", "float8_e4m3fn", "float8_e5m2")
SIGNS = {"SCB": "bitsandbytes", "weight.absmax": "bitsandbytes", "weight_scale_inv": "FP8", "input_scale": "FP8"}
SIGNS |= {"weight_zero_point": "compressed-tensors", "g_idx": "GPTQ", "W_q": "HQQ", "biases": "MLX"}
SIGNS |= {"weight._scale": "quanto", "lora_A.default.weight": "not merged", "lora_magnitude_vector": "not merged"}
SIGNS |= {sign: "not merged" for sign in ("hada_w1_a", "oft_r", "boft_R", "vera_lambda_b", "ia3_l")}
SIGNS |= {sign: NO_PLACE for sign in ("scales", "qzeros", "weight_quantizer._amax", "weight_g", "bias", "alpha")}
DTYPES: dict[str, Input] = {
    "all in float16": Input(everything(torch.float16), ITSELF),
    "all in float32": Input(everything(torch.float32), SAME),
    "all in float64": Input(everything(torch.float64), SAME),
    "one in float32": Input(one(UP, torch.Tensor.float), SAME),
    **{
        f"one in {name}": Input(one(UP, operator.methodcaller("to", getattr(torch, name))), "no float|FP8 quantizer")
        for name in CODES
    },
    "a norm in int8": Input(one("model.norm.weight", lambda found: found.to(torch.int8)), "is of type I8"),
    "a norm as a row": Input(one("model.norm.weight", lambda found: found[None]), "of different models"),
    "an empty weight": Input(one(UP, lambda found: found[:0]), "of different models"),
    **{f"{sign} beside": Input(beside(sign), says) for sign, says in SIGNS.items()},
}


def in_shards(
    *, index: bool = True, single: bool = False, change: Callable[[dict[str, str]], Any] = dict, then: Make = str
) -> Make:
    def make(folder: Path) -> None:
        found = load_file(folder / SINGLE)
        order = sorted(found)
        where = {name: FIRST if at < len(order) // 2 else SECOND for at, name in enumerate(order)}
        for shard in (FIRST, SECOND):
            part: Tensors = {name: found[name] for name in order if where[name] == shard}
            write(folder, shard, part)
        if not single:
            (folder / SINGLE).unlink()
        if index:
            write(folder, INDEX, change({"metadata": {"total_size": 1}, "weight_map": where}))  # type: ignore[dict-item]
        then(folder)

    return make


def without(name: str) -> Make:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    write(folder, SECOND, (folder / SECOND).read_bytes()[:-1000])


def leftover(folder: Path) -> None:
    write(folder, FIRST, {"model.norm.weight": torch.ones(256)})


SHARDS: dict[str, Input] = {
    "two with an index": Input(in_shards(), SAME),
    "an index without metadata": Input(
        in_shards(change=lambda found: {"weight_map": found["weight_map"]}), SAME, "misleading"
    ),
    "no index": Input(in_shards(index=False), f"the shard {FIRST}: download {INDEX} too", "misleading"),
    "no index, beside a whole model": Input(in_shards(index=False, single=True), "a shard of another", "silent"),
    "one that an older download left": Input(leftover, "a shard of another", "silent"),
    "an index beside a whole model": Input(in_shards(single=True), "remove the one that is out of date"),
    "one gone": Input(in_shards(then=without(FIRST)), "is not a file of this folder"),
    "one cut off": Input(in_shards(then=cut), "not a valid safetensors file"),
    "one as a pointer of git-lfs": Input(in_shards(then=file(SECOND, POINTER)), "git lfs pull", "misleading"),
    "the index as a pointer": Input(in_shards(then=file(INDEX, POINTER)), "git lfs pull", "misleading"),
    "a whole model as a pointer": Input(file(SINGLE, POINTER), "git lfs pull", "misleading"),
    "a tensor twice in the index": Input(
        in_shards(then=file(INDEX, f'{{"weight_map": {{"model.norm.weight": "{FIRST}", "model.norm.weight": "x"}}}}')),
        "'model.norm.weight' is said twice",
        "misleading",
    ),
    "an empty index": Input(file(INDEX, {"weight_map": {}}), "its weight_map is empty"),
    "an index of the whole": Input(
        lambda folder: write(folder, INDEX, {"weight_map": dict.fromkeys(load_file(folder / SINGLE), SINGLE)}), SAME
    ),
    "a folder in the index": Input(
        file(INDEX, {"weight_map": {"model.norm.weight": "./model.safetensors"}}), "is not a file of this folder"
    ),
    "weights of another program beside": Input(file("consolidated.safetensors", b"x"), SAME),
    "a pickle beside": Input(file("pytorch_model.bin", b"PK"), SAME),
}

KINDS = {"names": NAMES, "heads": HEADS, "dtypes": DTYPES, "shards": SHARDS}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base.of(make_checkpoint(tmp_path_factory.mktemp("strange") / "base", GEMMA4))


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, inputs in KINDS.items() for name in inputs])
def test_checkpoints(kind: str, name: str, base: Base, tmp_path: Path) -> None:
    judge(KINDS[kind][name], base, tmp_path)
