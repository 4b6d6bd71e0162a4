"""`quantization_config` of a mobile folder: which module has how many bits, as ordered regular expressions.

The expressions have the form of Google's own. They are checked with the reader's rule before they
are written: each linear and each embedding must get the bits of the plan, or stay float as planned.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from intaglio.errors import ConfigError
from intaglio.formats.mobile.layout import module_bits, resolve_bits
from intaglio.plan.plan import HEAD, Plan

DEFAULT_BITS = 4
# Modules that Google's files list as floats, as far as a plan has it so; further modules are listed by name.
FLOAT_MODULES = (
    "model.vision_tower.patch_embedder",
    "model.audio_tower.subsample_conv_projection",
    "model.audio_tower.output_proj",
    "relative_k_proj",
    "model.embed_audio",
    "model.embed_vision",
    "per_layer_model_projection",
)
LAYER = re.compile(r"\.layers\.(\d+)\.")
TOWER = re.compile(r"model\.(vision_tower|audio_tower)\.")

Layers = dict[int, int]  # bits by layer


def quantization_config(plan: Plan) -> dict[str, Any]:
    """Quantization config for transformers' reader. Raises ConfigError if it would not give the plan's bits."""
    bits = module_bits(plan)
    quantized = {name: n for name, n in bits.items() if n is not None}
    floats = [name for name, n in bits.items() if n is None]
    config = {
        "quant_method": "gemma",
        "num_bits": DEFAULT_BITS,
        "quantize_embeddings": True,
        "module_quant_configs": {pattern: {"num_bits": n} for pattern, n in _patterns(quantized)},
        "modules_to_not_convert": _not_converted(floats, list(quantized)),
    }
    for name, expected in bits.items():
        found = resolve_bits(name, config)
        if found != expected:
            raise ConfigError(f"{name}: quantization_config would give it {found} bits, planned are {expected}")
    return config


def _patterns(quantized: dict[str, int]) -> list[tuple[str, int]]:
    towers = {name: n for name, n in quantized.items() if TOWER.match(name)}
    text = {name: n for name, n in quantized.items() if name not in towers}
    head = HEAD.removesuffix(".weight")
    outside = [name for name in text if not LAYER.search(name)]
    single = [(f"^{head}$" if name == head else _escape(name) + "$", text[name]) for name in outside]
    return single + _layer_patterns(text) + _tower_patterns(towers)


def _escape(name: str) -> str:
    """An expression for a name in the text model; of a multimodal one it leaves out the outermost "model."."""
    return re.escape(name.removeprefix("model.") if name.startswith("model.language_model.") else name)


def _layer_patterns(text: dict[str, int]) -> list[tuple[str, int]]:
    """Modules of the text model's layers, by block: `self_attn` or `mlp` as one where all of it agrees."""
    blocks: dict[str, dict[str, Layers]] = {}
    prefix = ""
    for name, n in text.items():
        match = LAYER.search(name)
        if match is None:
            continue
        prefix, module = _escape(name[: match.start()] + ".layers"), name[match.end() :]
        blocks.setdefault(module.split(".")[0], {}).setdefault(module, {})[int(match[1])] = n
    patterns = []
    for block, modules in blocks.items():
        merged = _agreed(list(modules.values()))
        if merged is not None and list(modules) != [block]:
            patterns += _by_layer(prefix, re.escape(block) + r"\.", merged)
            continue
        for module, layers in modules.items():
            patterns += _by_layer(prefix, re.escape(module) + "$", layers)
    return patterns


def _agreed(modules: list[Layers]) -> Layers | None:
    """Bits by layer, if all modules that a layer has agree on them."""
    merged: Layers = {}
    for layers in modules:
        if any(merged.setdefault(layer, n) != n for layer, n in layers.items()):
            return None
    return merged


def _by_layer(prefix: str, module: str, layers: Layers) -> list[tuple[str, int]]:
    """One expression for each width; the one of the last layer needs no numbers, as it is tried last."""
    last = layers[max(layers)]
    others = sorted({n for n in layers.values() if n != last}, key=lambda n: min(i for i in layers if layers[i] == n))
    named = [(f"({'|'.join(str(i) for i in sorted(layers) if layers[i] == n)})", n) for n in others]
    return [(rf"{prefix}\.{which}\.{module}", n) for which, n in (*named, (r"\d+", last))]


def _tower_patterns(towers: dict[str, int]) -> list[tuple[str, int]]:
    """The modules of each tower that are unlike most of it, by kind, and then all the rest."""
    patterns: list[tuple[str, int]] = []
    by_tower: dict[str, dict[str, int]] = {}
    for name, n in towers.items():
        by_tower.setdefault(TOWER.match(name)[1], {})[name] = n  # type: ignore[index]
    for tower, modules in by_tower.items():
        usual = Counter(modules.values()).most_common(1)[0][0]
        unlike = {_kind(name) + "$": n for name, n in modules.items() if n != usual}
        # an expression that begins later in the name loses against one that begins earlier
        patterns += [*unlike.items(), (tower, usual)]
    return patterns


def _kind(name: str) -> str:
    """An expression for a module of a tower in whichever layer it is."""
    return re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name.removeprefix("model.")))


def _not_converted(floats: list[str], quantized: list[str]) -> list[str]:
    """Entries that leave all of these floats and none of the others."""
    entries = []
    left = list(floats)
    for entry in FLOAT_MODULES:
        spared = [name for name in left if resolve_bits(name, {"modules_to_not_convert": [entry]}) is None]
        takes = any(resolve_bits(name, {"modules_to_not_convert": [entry]}) is None for name in quantized)
        if spared and not takes:
            entries.append(entry)
            left = [name for name in left if name not in spared]
    kinds = dict.fromkeys(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in left)
    exact = [re.escape(name) for name in left]
    alike = not any(re.fullmatch(kind, name) for kind in kinds for name in quantized)
    # older readers (that of transformers 5.20 is one) take an entry for the beginning of any longer name
    return entries + [f"{entry}$" for entry in (kinds if alike else exact)]
