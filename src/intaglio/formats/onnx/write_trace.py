"""The decoder as an ONNX graph, traced from transformers' own model without its weights.

A linear is a node of our own in the traced graph, a mere name, and so is the place where new keys and values join
those of the past: `formats/onnx/write.py` puts codes and scales there, by that name. What is left in the
trace are norms and layer scalars, so that no model's weights are ever in memory. Embeddings have
a graph of their own and are not in this one.

B sequences, T new tokens, P tokens of the past, H columns, L layers.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.errors import ConfigError, InputError
from intaglio.plan.family import ModelSpec, build_meta_model
from intaglio.plan.files import one_line

DOMAIN = "intaglio"  # of the nodes that stand for something else
LINEAR, CACHE = "Linear", "Cache"
# Not 21: there ONNX Runtime 1.32, moving DequantizeLinear of an int8 cache, makes a QuantizeLinear that it refuses.
OPSET = 20
# Sizes of the sample inputs: two or more of everything, since a size of one would be taken for a constant.
SAMPLE_BATCH, SAMPLE_TOKENS, SAMPLE_PAST = 2, 4, 3


def kv_names(layers: int) -> list[str]:
    """Transformers.js's names of keys and values of the layers that own some, without past or present before it."""
    return [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def own_kv_layers(spec: ModelSpec) -> int:
    """Number of layers, the first ones, that have keys and values of their own."""
    return sum(donor == layer for layer, donor in enumerate(spec.kv_donors))


def trace_decoder(spec: ModelSpec) -> Any:
    """An onnx.ModelProto of the decoder, with `Linear` and `Cache` nodes for what has weights or a cache.

    Raises InputError for packages that are missing, ConfigError for a model that cannot be traced.
    """
    onnx_ir = _exporter()
    model = _skeleton(spec)
    layers = own_kv_layers(spec)
    arguments = _sample(model.config, layers)
    dynamic = torch.export.Dim.DYNAMIC
    axes = {name: {0: dynamic, 1: dynamic} for name in arguments if name != "past"}
    past = [{0: dynamic, 2: dynamic} for _ in arguments["past"]]
    inputs = [name for name in arguments if name != "past" and arguments[name] is not None]
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _Decoder(model).eval(),
                kwargs=arguments,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=inputs + [f"past_key_values.{name}" for name in kv_names(layers)],
                output_names=["logits", *(f"present.{name}" for name in kv_names(layers))],
                dynamic_shapes={name: axes[name] if name in inputs else None for name in axes} | {"past": past},
            )
    except Exception as error:  # torch raises many types for what it cannot trace
        raise ConfigError(f"transformers' {type(model).__name__} cannot be traced: {one_line(error)}") from error
    assert program is not None
    return onnx_ir.to_proto(program.model)


def _exporter() -> Any:
    try:
        import onnx  # noqa: F401
        import onnx_ir
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"the ONNX export needs more packages ({error}): pip install 'intaglio[onnx]'") from error
    return onnx_ir


def _skeleton(spec: ModelSpec) -> Any:
    """transformers' model with names in place of linears and embeddings, and random values for all other tensors.

    The exporter would leave a product with ones out of the trace, and would merge tensors that are equal.
    """
    generator = torch.Generator().manual_seed(0)
    model: Any = build_meta_model(spec.config).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, _NamedLinear(name, module.out_features))
        elif isinstance(module, nn.Embedding):
            model.set_submodule(name, nn.Identity())
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its tables are computed, not loaded
    # transformers goes through a set of these, in an order, and so a graph, that differs from process to process.
    model.model.unique_layer_types = sorted(set(model.config.layer_types))
    known = {tensor.name for tensor in spec.tensors}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_meta:
            continue
        if name not in known:
            raise ConfigError(f"{name}: the ONNX export does not know this tensor: export the model to gguf or hf")
        parent, _, attribute = name.rpartition(".")
        owner = model.get_submodule(parent)
        delattr(owner, attribute)
        owner.register_buffer(attribute, torch.rand(tensor.shape, generator=generator) + 1.5)
    return model


class _NamedLinear(nn.Module):
    """A linear that is only its name."""

    def __init__(self, name: str, out_features: int) -> None:
        super().__init__()
        self.name, self.out_features = name, out_features

    def forward(self, x: Tensor) -> Tensor:
        return _node(LINEAR, (x,), self.name, [*x.shape[:-1], self.out_features])


def _node(kind: str, inputs: tuple[Tensor, ...], name: str, shape: Any) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", inputs, {"name": name}, dtype=torch.float32, shape=shape, version=1
    )


class _Decoder(nn.Module):
    """transformers' causal language model with its cache as plain tensors, keys and values of each layer in turn."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        inputs_embeds: Tensor,
        per_layer_inputs: Tensor | None,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        cache = _cache(past)
        extra = {} if per_layer_inputs is None else {"per_layer_inputs": per_layer_inputs}
        output = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        return (output.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


def _cache(past: list[Tensor]) -> Any:
    """transformers' cache over these tensors, whose layers join past and new by a node with a name."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class NamedLayer(DynamicLayer):
        def __init__(self, module: str, keys: Tensor, values: Tensor) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.module, self.keys, self.values = module, keys, values
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.keys = self._joined("k_cache", self.keys, key_states)
            self.values = self._joined("v_cache", self.values, value_states)
            return self.keys, self.values

        def _joined(self, kind: str, past: Tensor | None, new: Tensor) -> Tensor:
            assert past is not None
            shape = [past.shape[0], past.shape[1], past.shape[2] + new.shape[2], past.shape[3]]
            return _node(CACHE, (past, new), f"{self.module}.{kind}_scale", shape)

    cache = DynamicCache()  # without a config all its layers keep every token: a window is the mask's matter
    cache.layers = [
        NamedLayer(f"model.layers.{i}.self_attn", keys, values)
        for i, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True))
    ]
    return cache


def _sample(config: Any, layers: int) -> dict[str, Any]:
    """Inputs of the decoder to trace it with; their content does not matter."""
    batch, tokens, past = SAMPLE_BATCH, SAMPLE_TOKENS, SAMPLE_PAST
    width = config.hidden_size_per_layer_input
    with_kv = [config.per_layer_config[layer] for layer in range(layers)]
    kv_shapes = [(batch, layer.num_key_value_heads, past, layer.head_dim) for layer in with_kv]
    return {
        "inputs_embeds": torch.zeros(batch, tokens, config.hidden_size),
        "per_layer_inputs": torch.zeros(batch, tokens, config.num_hidden_layers, width) if width else None,
        "attention_mask": torch.ones(batch, past + tokens, dtype=torch.long),
        "position_ids": torch.arange(past, past + tokens).expand(batch, -1).contiguous(),
        "past": [torch.zeros(shape) for shape in kv_shapes for _ in range(2)],
    }


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep the exporter's remarks on its own progress from the terminal; an error is an exception all the same."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
