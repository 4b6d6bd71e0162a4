"""One answer to the question "what does this path hold?", for every verb that takes a model.

`look` tells kinds apart by names of files, by config.json and by the headers of safetensors: no weights are
read, nothing is executed. `expect` raises ConfigError for any kind that the caller cannot use. The message
names the kind, and the verb or step that is right for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.errors import ConfigError
from intaglio.packed.shards import INDEX, SINGLE, shards, unlisted
from intaglio.packed.store import headers
from intaglio.plan.family import load_config
from intaglio.plan.files import POINTER, pointer, read_json

# Kinds of paths; those of the last three lines no verb takes.
CHECKPOINT, CONFIG, PACKED = "checkpoint", "config", "packed"
MOBILE, COMPRESSED, GGUF, TENSORS = "mobile", "compressed-tensors", "gguf", "tensors"
WEIGHTS = "weights"  # of a checkpoint whose config.json is elsewhere
PREPARED, ADAPTER, ADAPTED, QUANTIZED = "prepared", "adapter", "adapted", "quantized"
STALE, LITERT, ONNX, PICKLE, RUN, RELEASE = "stale", "litert", "onnx", "pickle", "run", "release"
MISSING, OTHER = "missing", "other"

FLOAT_KINDS = ("F64", "F32", "F16", "BF16")
PACKED_FILE = "packed.safetensors"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PREPARED_NAMES = re.compile(r"\.quantizers?\.|\.static\.\w+_scale_latent$")
# Names that PEFT 0.21 gives to tensors of its tuners, and the modules that it wraps.
ADAPTER_NAMES = re.compile(
    r"\.(lora_(A|B|E|ga|embedding_[AB]|magnitude_vector)|vera_lambda_[bd]|hada_\w+|lokr_\w+|b?oft_\w+|hra_u|ia3_l|"
    r"ln_tuning_layers|fourierft_spectrum|c3a_kernel|shira_weight|miss_block|bone_block|road_\w+|randlora_\w+|"
    r"base_layer|modules_to_save|original_module|trainable_tokens_\w+)(\.|$)|^(prompt_encoder|prompt_embeddings)\b"
)
FLOATS_INSTEAD = "its codes are no weights to train or to fit: take the checkpoint of floats that it was made from"


@dataclass(frozen=True)
class Quantizer:
    """Marks by which the weights of someone's quantizer are recognised.

    title: its name. methods: values of quant_method in config.json. names: of tensors beside the codes.
    """

    title: str
    methods: tuple[str, ...]
    names: re.Pattern[str]


QUANTIZERS = (
    Quantizer(
        "bitsandbytes",
        ("bitsandbytes",),
        re.compile(r"\.(SCB|weight_format|(nested_)?absmax|(nested_)?quant_map)$|\.quant_state\.bitsandbytes__"),
    ),
    Quantizer("the Gemma mobile format", ("gemma",), re.compile(r"\.embedding_quantized$")),
    Quantizer("compressed-tensors", ("compressed-tensors",), re.compile(r"\.weight_(packed|zero_point|g_idx)$")),
    Quantizer("GPTQ", ("gptq",), re.compile(r"\.g_idx$")),
    Quantizer("AWQ", ("awq",), re.compile(r"\.qweight$")),
    Quantizer("HQQ", ("hqq",), re.compile(r"\.W_q$")),
    Quantizer("quanto", ("quanto",), re.compile(r"\.weight\._(data|scale)$")),
    Quantizer("MLX", ("mlx",), re.compile(r"\.biases$")),
    Quantizer(
        "an FP8 quantizer",
        ("fp8", "fbgemm_fp8", "finegrained_fp8", "modelopt"),
        re.compile(r"\.(weight_scale(_inv|_2)?|input_scale)$"),
    ),
)


@dataclass(frozen=True)
class Found:
    """Contents of a path. kind: one of the constants above. what, advice: how an error says it."""

    path: Path
    kind: str
    what: str
    advice: str

    def error(self) -> ConfigError:
        """The message for a caller that cannot use this kind."""
        return ConfigError(f"{self.path}: {self.what}: {self.advice}")


def expect(path: str | Path, *kinds: str) -> Found:
    """Contents of a path, of one of these kinds. Raises a ConfigError that says what it is instead."""
    found = look(path)
    if found.kind not in kinds:
        raise found.error()
    return found


def look(path: str | Path) -> Found:
    """Contents of a file or folder. Raises ConfigError for safetensors, an index or a config that cannot be read."""
    path = Path(path)
    if path.is_file():
        return _look_at_file(path)
    if not path.is_dir():
        return Found(path, MISSING, "no such file or folder", "expected a model folder with config.json")
    if (path / PACKED_FILE).is_file():
        return _packed(path)
    adapter = next((name for name in ADAPTER_FILES if (path / name).is_file()), None)
    if (path / SINGLE).is_file() or (path / INDEX).is_file():
        config = load_config(path) if (path / "config.json").is_file() else {}
        found = {name: header for shard in shards(path) for name, header in headers(shard).items()}
        return _judge(path, config, found, adapter, CHECKPOINT if config else WEIGHTS)
    return _look_at_rest(path) if adapter is None else _adapter(path)


def _look_at_file(path: Path) -> Found:
    with open(path, "rb") as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        raise pointer(path)
    if start[:4] == b"GGUF":
        return _gguf(path)
    if start[:8] == b"LITERTLM" or start[4:8] == b"TFL3" or path.suffix == ".task":
        return _of_packed(path, LITERT, "a LiteRT bundle")
    if path.suffix == ".onnx":
        return _of_packed(path, ONNX, "an ONNX graph")
    if path.suffix == ".json":
        return Found(path, CONFIG, "a config without weights", "give the folder that holds the weights too")
    if path.suffix == ".safetensors":
        if path.name == PACKED_FILE:
            return _packed(path.parent)
        return _judge(path, {}, headers(path), None, TENSORS)
    if path.suffix in PICKLES:
        return _pickle(path)
    return Found(path, OTHER, "neither GGUF nor .safetensors", "expected one of them, or a checkpoint's folder")


Headers = dict[str, tuple[str, tuple[int, ...]]]  # dtype, as safetensors spells it, and shape by name


def _judge(path: Path, config: dict[str, Any], found: Headers, adapter: str | None, plain: str) -> Found:
    """Kind of whole weights, by their names and dtypes; `plain` if they are floats and nothing else."""
    prepared = _first(PREPARED_NAMES, found)
    if prepared is not None:
        return Found(
            path,
            PREPARED,
            f"holds latents and scales of a prepared model ({prepared}), not a checkpoint",
            "pack the model with intaglio.pack_model in the program that trained it, and keep that folder",
        )
    part = _first(ADAPTER_NAMES, found)
    if part is not None or adapter is not None:
        return _adapted(path, part, adapter)
    if (quantized := _quantized(path, config, found)) is not None:
        return quantized
    advice = {
        TENSORS: "give the folder of the checkpoint that it is part of",
        WEIGHTS: f"put the config.json of the model into {path}",
    }
    made = f"`intaglio quantize {path} --out packed` makes a packed model of it, `intaglio train` a trained one"
    what = {TENSORS: "a file of tensors", WEIGHTS: f"weights without config ({path / 'config.json'}: no such file)"}
    return Found(path, plain, what.get(plain, "a checkpoint of floats"), advice.get(plain, made))


def _quantized(path: Path, config: dict[str, Any], found: Headers) -> Found | None:
    """Name of the quantizer that wrote these weights; None for floats."""
    key = "quantization" if config.get("quantization") is not None else "quantization_config"  # the first is MLX's
    said = config.get(key)
    table = said if isinstance(said, dict) else {}
    method = table.get("quant_method", "mlx" if key == "quantization" and table else None)
    odd = next((name for name, (kind, shape) in found.items() if kind not in FLOAT_KINDS and len(shape) > 1), None)
    signs = [(quantizer, name) for quantizer in QUANTIZERS if (name := _first(quantizer.names, found)) is not None]
    if said is None and odd is None and not signs:
        return None
    if odd is None and not signs:
        return Found(
            path,
            STALE,
            f"config.json says that the weights are codes of {method or said!r}, but all of them are floats",
            f"remove {key} from config.json if they are right, or download them again",
        )
    by_method = next((q.title for q in QUANTIZERS if method in q.methods), str(method) if method else None)
    by_name = signs[0] if signs else None
    if by_method is None and by_name is None and odd is not None and found[odd][0].startswith("F8"):
        by_method = "an FP8 quantizer"
    title = by_method or (by_name[0].title if by_name else None)
    evidence = by_name[1] if by_name else odd
    assert evidence is not None
    if title is None:
        return Found(path, QUANTIZED, f"holds {evidence} in {found[evidence][0]}, which is no float", FLOATS_INSTEAD)
    what = f"holds codes of {title} ({evidence}, {found[evidence][0]})"
    takes = f"`intaglio convert {path} --out packed` makes a packed model of them"
    if title == "the Gemma mobile format" and method == "gemma":
        return Found(path, MOBILE, what, takes)
    if title == "compressed-tensors" and by_name is not None and evidence.endswith(".weight_packed"):
        four_bits = '"num_bits": 8' not in json.dumps(table) and '"num_bits": 2' not in json.dumps(table)
        return Found(path, COMPRESSED, what, takes if four_bits else FLOATS_INSTEAD)
    return Found(path, QUANTIZED, what, FLOATS_INSTEAD)


def _first(pattern: re.Pattern[str], names: Iterable[str]) -> str | None:
    return next((name for name in names if pattern.search(name)), None)


def _look_at_rest(path: Path) -> Found:
    """A folder without safetensors of a checkpoint or of ours."""
    names = sorted(p.relative_to(path).as_posix() for p in (*path.glob("*"), *path.glob("onnx/*.onnx")))
    for suffix, title in ((".litertlm", "a LiteRT bundle"), (".task", "a LiteRT bundle"), (".onnx", "an ONNX folder")):
        if any(name.endswith(suffix) for name in names):
            return _of_packed(path, ONNX if suffix == ".onnx" else LITERT, f"holds {title}")
    if "SHA256SUMS" in names:
        return _of_packed(path, RELEASE, "a release")
    if "run.json" in names:
        advice = f"its packed model is {path / 'packed'}"
        if not (path / "packed").is_dir():
            advice = "it has no packed model yet: continue it with `intaglio train --resume`"
        return Found(path, RUN, "the folder of a run", advice)
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    if gguf is not None:
        return _gguf(path / gguf)
    pickled = next((name for name in names if name.endswith(PICKLES) and "training_args" not in name), None)
    if pickled is not None:
        return _pickle(path / pickled)
    if "config.json" in names:
        load_config(path)
        return Found(path, CONFIG, f"no {SINGLE} or {INDEX}", f"expected weights{unlisted(path)}")
    return Found(path, OTHER, f"{path / 'config.json'}: no such file", "expected a model folder with config.json")


def _packed(path: Path) -> Found:
    advice = (
        f"`intaglio train {path}` goes on with it, `intaglio export` writes it for a runtime; where a checkpoint of "
        f"floats is wanted, `intaglio export {path} hf --out DIR` makes one"
    )
    return Found(path, PACKED, "a packed model", advice)


def _gguf(path: Path) -> Found:
    advice = (
        f"`intaglio convert {path} --config DIR --out packed` makes a packed model of it, "
        "where DIR has the model's config.json and tokenizer"
    )
    return Found(path, GGUF, "a GGUF file", advice)


def _of_packed(path: Path, kind: str, what: str) -> Found:
    return Found(path, kind, what, "give the packed model that it was exported from, or the checkpoint of floats")


def _pickle(path: Path) -> Found:
    folder = path.parent
    advice = (
        'pickles are not read: save them as safetensors, for example with python -c "import transformers as t; '
        f"t.AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('safe'); "
        f"t.AutoTokenizer.from_pretrained('{folder}').save_pretrained('safe')\""
    )
    return Found(folder, PICKLE, f"no {SINGLE}, and {path.name} is a pickle", advice)


def _adapter(path: Path) -> Found:
    base, kind = _adapter_config(path)
    advice = f"merge it into its base, {base}, and give the result: {_merge_command(path, base)}"
    return Found(path, ADAPTER, f"an adapter ({kind}) without its model", advice)


def _adapted(path: Path, tensor: str | None, file: str | None) -> Found:
    """Whole weights with an adapter: it would be ignored by one reader and applied by another."""
    if tensor is not None:
        advice = "merge it before saving, with model.merge_and_unload().save_pretrained(...), and give that folder"
        return Found(path, ADAPTED, f"holds a model with an adapter that is not merged ({tensor})", advice)
    base, kind = _adapter_config(path)
    advice = (
        f"to take the model as it is, remove {' and '.join(n for n in ADAPTER_FILES if (path / n).is_file())}; "
        f"to take the adapter, which is for {base}, merge it: {_merge_command(path, base)}"
    )
    return Found(path, ADAPTED, f"holds a whole model and beside it an adapter ({kind}, {file})", advice)


def _adapter_config(path: Path) -> tuple[str, str]:
    """The base of an adapter, and its kind, as far as its config tells."""
    try:
        config = read_json(path / ADAPTER_FILES[0])
    except ConfigError:
        return "BASE", "PEFT"
    base, kind = str(config.get("base_model_name_or_path")), str(config.get("peft_type"))
    # the base becomes part of a command that people copy: nothing but a path or a name may stand there
    named = re.fullmatch(r"[\w./@ -]+", base) is not None and base != "None"
    return base if named else "BASE", kind if kind.isidentifier() and kind != "None" else "PEFT"


def _merge_command(path: Path, base: str) -> str:
    return (
        'python -c "import peft, transformers as t; '
        f"peft.PeftModel.from_pretrained(t.AutoModelForCausalLM.from_pretrained('{base}'), '{path}')"
        f".merge_and_unload().save_pretrained('merged'); "
        f"t.AutoTokenizer.from_pretrained('{base}').save_pretrained('merged')\""
    )
