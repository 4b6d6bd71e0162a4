"""Time and memory of bringing a full-size model into the mobile format, and whether the layout is Google's.

    python benchmarks/mobile_full_size.py E2B --cache DIR

It takes 13 GB in DIR for E2B and 20 GB for E4B, which are freed afterwards, and some minutes on two cores.

The checkpoint is random, in bfloat16, written shard by shard, and has the tensors of the real one: towers,
their embedders, the keys and values of KV-shared layers that nobody reads. Linears are not clipped, as in
Google's mobile files. Then, each command in a process of its own:

    intaglio quantize MODEL --recipe mobile-SIZE    no training
    intaglio export PACKED gemma-mobile             which also reads the folder back, bit by bit

Peak memory is the operating system's count (ru_maxrss; pages of mapped files included). The folder is
compared with the model that transformers' own reader makes of Google's `quantization_config` on the meta
device: names, shapes and dtypes; and for E2B its bytes with those of Google's published file.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from common import environment, write_result
from export_speed import run

from intaglio.packed.store import SafetensorsWriter, open_safetensors
from intaglio.plan.carried import TEXT_PREFIX, describe_whole, whole_name
from intaglio.plan.family import ModelSpec
from intaglio.tiny import MODEL_DIR

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "mobile"
SHARD_BYTES = 2 << 30
CHUNK = 1 << 24
# google/gemma-4-E2B-it-qat-mobile-transformers, model.safetensors: 2,458,111,846 bytes, 375,400 of them header
PUBLISHED_DATA_BYTES = {"E2B": 2_457_736_446, "E4B": None}
FLOAT_PARTS = ("model.audio_tower.", "model.embed_audio.", "model.embed_vision.")  # float32 in Google's files


def config_of(size: str) -> dict[str, Any]:
    config = json.loads((GOLDEN / f"{size}.config.json").read_text("utf-8"))
    for tower in ("vision_config", "audio_config"):
        config[tower]["use_clipped_linears"] = False
    return config


def spec_of(config: dict[str, Any]) -> ModelSpec:
    donors = describe_whole(config).kv_donors
    shared = [layer for layer, donor in enumerate(donors) if donor != layer]
    names = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in shared for name in "kv"]
    return describe_whole(config, names)


def make_checkpoint(folder: Path, size: str) -> None:
    """Random weights, a few rows at a time, in several files as large models come."""
    folder.mkdir(parents=True)
    config = config_of(size)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(MODEL_DIR / name, folder / name)
    model = spec_of(config)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for tensor in (*model.tensors, *model.carried):
        if sum(math.prod(shape) for shape in shards[-1].values()) * 2 > SHARD_BYTES:
            shards.append({})
        shards[-1][whole_name(tensor.name)] = tensor.shape
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}.safetensors"
        weight_map |= dict.fromkeys(shapes, file)
        specs = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
        with SafetensorsWriter(folder / file, specs, {"format": "pt"}) as writer:
            for name, shape in shapes.items():
                write_random(writer, name, shape, generator)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_random(writer: SafetensorsWriter, name: str, shape: tuple[int, ...], generator: torch.Generator) -> None:
    if len(shape) != 2:
        writer.write(name, (1 + torch.randn(shape, generator=generator).mul_(0.02)).to(torch.bfloat16))
        return
    step = max(1, CHUNK // shape[1])
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        values = torch.randn(rows.stop - rows.start, shape[1], generator=generator).mul_(0.02)
        writer.write(name, values.to(torch.bfloat16), rows)


def reader_layout(size: str, config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes in the model that transformers' reader builds with Google's own quantization_config."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.gemma_quant import replace_with_quant_layers
    from transformers.utils.quantization_config import GemmaQuantizationConfig

    official = GemmaQuantizationConfig(**json.loads((GOLDEN / f"{size}.quantization_config.json").read_text("utf-8")))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config | {"tie_word_embeddings": False}))
        replace_with_quant_layers(model, official, official.modules_to_not_convert)
    names = {torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32", torch.bfloat16: "BF16"}
    layout = {}
    for name, tensor in model.state_dict().items():
        dtype = names[tensor.dtype]
        if name.startswith(FLOAT_PARTS) and tensor.is_floating_point():
            dtype = "F32"
        layout[name] = (dtype, tuple(tensor.shape))
    table = f"{TEXT_PREFIX}embed_tokens_per_layer.embedding_scale"
    layout[table] = (
        "F32",
        (layout[table][1][0], config["text_config"]["num_hidden_layers"]),
    )  # as Google's files have it
    return layout


def compare(folder: Path, size: str) -> dict[str, Any]:
    """Names that only the folder has, names that only the reader's model has, and names that differ."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    with open_safetensors(folder / "model.safetensors") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - safe_open does not iterate
        found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    expected = reader_layout(size, config)
    extra = [name for name in found if name not in expected]
    beside = [name for name in extra if name.endswith("_cache_scale") or ".k_proj." in name or ".v_proj." in name]
    data = (folder / "model.safetensors").stat().st_size
    with open(folder / "model.safetensors", "rb") as raw:
        data -= 8 + int.from_bytes(raw.read(8), "little")
    return {
        "tensors": len(found),
        "data_bytes": data,
        "published_data_bytes": PUBLISHED_DATA_BYTES[size],
        "missing": [name for name in expected if name not in found],
        "extra": [name for name in extra if name not in beside],
        "cache_scales_and_unused": len(beside),
        "of_other_dtype_or_shape": {
            n: [found[n], expected[n]] for n in found if n in expected and found[n] != expected[n]
        },
    }


def measure(model: Path, folder: Path, size: str) -> dict[str, Any]:
    cli = [sys.executable, "-c", "from intaglio.cli import main; main()"]
    packed, out = folder / "packed", folder / "mobile"
    commands = {
        "quantize": [*cli, "quantize", model, "--recipe", f"mobile-{size.lower()}", "--out", packed],
        "export": [*cli, "export", packed, "gemma-mobile", "--out", out],
    }
    rows = {}
    for name, arguments in commands.items():
        usage = run(arguments)
        rows[name] = usage._asdict()
        print(f"{name:9} {usage.seconds:7.1f} s  peak {usage.peak_bytes / 1e9:.2f} GB", flush=True)
        if name == "quantize":
            shutil.rmtree(model)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("E2B", "E4B"))
    parser.add_argument("--cache", type=Path, required=True, help="for the checkpoint and what is made of it")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mobile_full_size.json")
    arguments = parser.parse_args()
    folder = arguments.cache / f"mobile-{arguments.size}"
    shutil.rmtree(folder, ignore_errors=True)
    # a child counts the memory that its parent had at the fork as its own peak: keep this process small
    builder = multiprocessing.get_context("spawn").Process(
        target=make_checkpoint, args=(folder / "model", arguments.size)
    )
    builder.start()
    builder.join()
    try:
        checkpoint = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        print(f"checkpoint: {checkpoint / 1e9:.2f} GB", flush=True)
        row = {"checkpoint_bytes": checkpoint, "commands": measure(folder / "model", folder, arguments.size)}
        row |= compare(folder / "mobile", arguments.size)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results = json.loads(arguments.out.read_text("utf-8")) if arguments.out.is_file() else {"models": {}}
    write_result(arguments.out, {"environment": environment(), "models": results["models"] | {arguments.size: row}})
    print(json.dumps({key: value for key, value in row.items() if key != "commands"}, indent=1))


if __name__ == "__main__":
    main()
