"""Gemma 4 as a LiteRT graph in which every stored tensor is a placeholder: runs in LiteRT's environment only.

litert-torch knows how the model has to be laid out for LiteRT-LM: caches as inputs and outputs, one signature
to read a prompt and one to write a token. But its converter folds constants into one another (the soft cap
into the head, for one), and what is folded cannot be told from what was trained. So it never sees a weight:
a linear and a float parameter are each one opaque call that carries a name, which `graph` replaces afterwards
by the stored tensor. No memory is spent on weights here either.

Shape suffixes: B batch (1), T tokens, S cache slots, D hidden, L layers, P width of a per-layer embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from litert_converter.mlir import ir
from litert_converter.mlir.dialects import stablehlo
from litert_torch._convert.interface import Converter
from litert_torch.backend import lowerings
from litert_torch.generative.export_hf.core.exportable_module import ExportableModuleConfig
from litert_torch.generative.export_hf.core.external_emb import exportable_module as external
from litert_torch.generative.export_hf.model_ext import patches
from torch import Tensor, nn
from torch.nn.utils import parametrize

from intaglio.plan.family import build_meta_model
from intaglio.plan.plan import HEAD, Plan

LINEAR, FLOATS = "intaglio.linear", "intaglio.floats"  # call targets of the placeholders


@torch.library.custom_op("intaglio::linear", mutates_args=())
def linear(x: Tensor, name: str, features: int) -> Tensor:
    """Stands for a linear of this tensor, with as many output features."""
    return x.new_zeros((*x.shape[:-1], features))


@torch.library.custom_op("intaglio::floats", mutates_args=())
def floats(like: Tensor, name: str) -> Tensor:
    """Stands for a float tensor that has the shape of `like`."""
    return like.clone()


linear.register_fake(lambda x, name, features: x.new_empty((*x.shape[:-1], features)))
floats.register_fake(lambda like, name: torch.empty_like(like))


@lowerings.lower(torch.ops.intaglio.linear)  # type: ignore[untyped-decorator]
def _lower_linear(context: Any, x: ir.Value, name: str, features: int) -> ir.Value:
    result = ir.RankedTensorType.get((*x.type.shape[:-1], features), x.type.element_type)
    return _call(LINEAR, name, x, result)


@lowerings.lower(torch.ops.intaglio.floats)  # type: ignore[untyped-decorator]
def _lower_floats(context: Any, like: ir.Value, name: str) -> ir.Value:
    return _call(FLOATS, name, like, like.type)


def _call(target: str, name: str, argument: ir.Value, result: ir.Type) -> ir.Value:
    return stablehlo.custom_call([result], [argument], call_target_name=target, backend_config=ir.StringAttr.get(name))


class PlaceholderLinear(nn.Module):
    """A module that stands for a linear; `name` is that of its weight."""

    def __init__(self, name: str, features: int):
        super().__init__()
        self.name, self.features = name, features

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = linear(x, self.name, self.features)
        return result


class PlaceholderFloats(nn.Module):
    """A parametrization: whoever reads the tensor gets the placeholder."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, like: Tensor) -> Tensor:
        result: Tensor = floats(like, self.name)
        return result


def placeholder_model(plan: Plan) -> Any:
    """transformers' model, as litert-torch changes it for LiteRT, with placeholders for all tensors of the plan."""
    with patches.get_patch_context(plan.model.family.model_type):
        model: Any = build_meta_model(plan.model.config | {"dtype": "float32"})
    names = {tensor.name for tensor in plan} | {HEAD}
    for path, module in list(model.named_modules()):
        parent, _, own = path.rpartition(".")
        if isinstance(module, nn.Linear):
            name = f"{path}.weight"
            assert name in names and module.bias is None
            setattr(model.get_submodule(parent), own, PlaceholderLinear(name, module.out_features))
        elif isinstance(module, nn.Embedding):
            setattr(model.get_submodule(parent), own, nn.Identity())  # a model of its own holds these: `tables`
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its tables had no values
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if not value.is_meta:
            continue
        parent, _, own = name.rpartition(".")
        module = model.get_submodule(parent)
        delattr(module, own)
        module.register_buffer(own, torch.zeros(value.shape))
        if name in names:  # the others, of norms without a gain, are not read
            parametrize.register_parametrization(module, own, PlaceholderFloats(name), unsafe=True)
    config = model.config
    config.allow_global_per_layer_attribute_access = True  # litert-torch reads them so
    model.set_attn_implementation("lrt_transposed_attention")
    return model.eval()


class _PerLayer:
    """Mixin: the per-layer embeddings BTLP are one more input."""

    def adapt_inputs(self, *args: Any, per_layer_embeddings: Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().adapt_inputs(*args, **kwargs)  # type: ignore[misc]
        return inputs | {"per_layer_inputs": per_layer_embeddings}

    def _get_input(self, batch: int, tokens: int, dimension: Any, config: Any) -> Any:
        inputs, dynamic = super()._get_input(batch, tokens, dimension, config)  # type: ignore[misc]
        shape = (batch, tokens, config.num_hidden_layers, config.hidden_size_per_layer_input)
        return inputs | {"per_layer_embeddings": torch.ones(shape)}, dynamic


class Prefill(external.LiteRTExportableModuleForDecoderOnlyLMPrefillExternalEmbedder):  # type: ignore[misc]
    """Reads T tokens into the caches."""


class Decode(external.LiteRTExportableModuleForDecoderOnlyLMGenerateExternalEmbedder):  # type: ignore[misc]
    """Reads one token; gives its logits too."""


class PerLayerPrefill(_PerLayer, Prefill):
    """`Prefill` of a model with per-layer embeddings."""


class PerLayerDecode(_PerLayer, Decode):
    """`Decode` of a model with per-layer embeddings."""


def trace(plan: Plan, *, context_tokens: int, prefill_tokens: tuple[int, ...]) -> bytes:
    """The .tflite of the model behind its embeddings, with placeholders and float activations."""
    model = placeholder_model(plan)
    config = ExportableModuleConfig(
        model="", prefill_lengths=list(prefill_tokens), cache_length=context_tokens, externalize_embedder=True
    )
    kinds = (PerLayerPrefill, PerLayerDecode) if model.config.hidden_size_per_layer_input else (Prefill, Decode)
    converter = Converter()
    for kind in kinds:
        module = kind(model, config).eval()
        for name, (inputs, _) in module.get_sample_inputs(model.config).items():
            converter.add_signature(name, module, sample_kwargs=inputs)
    return bytes(converter.convert(strict_export=False).model_content())
