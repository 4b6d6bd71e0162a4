"""Shared by tests of training: fake quantization as plain differentiable code, and a model that steps fast."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from intaglio.numerics.grid import BlockGrid
from intaglio.plan.family import build_meta_model
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train.corpus import Corpus
from tests.support.tiny import GEMMA4, GEMMA4_MOE, fill

SMALL = GEMMA4 | {"vocab_size": 256, "vocab_size_per_layer_input": 256, "max_position_embeddings": 128}
SMALL_MOE = GEMMA4_MOE | {"vocab_size": 256, "vocab_size_per_layer_input": 256, "max_position_embeddings": 128}


def small_model(config: dict[str, Any] = SMALL, *, seed: int = 0) -> nn.Module:
    """A random float32 Gemma of that config, in eval mode, whose layers outweigh its residual stream.

    So each weight matters: rounding them to Q4_0 costs about 0.13 nats.
    """
    meta = build_meta_model(config)
    model = type(meta)(meta.config)
    fill(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "post_" in name:
                parameter.mul_(8)
    return model.eval()


def moe(seed: int = 0) -> Any:
    """A random float32 model whose experts weigh as much as its other parts."""
    return weigh_experts(small_model(SMALL_MOE, seed=seed), seed)


def weigh_experts(model: Any, seed: int) -> Any:
    """Give experts of a random model, in place, weights as large as those of its other parts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.06)
            elif "router" in name and parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def small_plan(*overrides: str, recipe: str = "q4_0", config: dict[str, Any] = SMALL) -> Plan:
    return make_plan(config, Recipe.load(recipe, overrides))


def small_corpus(sequences: int = 16, length: int = 16, *, seed: int = 0, vocabulary: int = 256) -> Corpus:
    """Random tokens, a new document in the middle of every other sequence."""
    tokens = np.random.default_rng(seed).integers(3, vocabulary, (sequences, length), dtype=np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (sequences, 1))
    positions[::2, length // 2 :] -= length // 2
    return Corpus(tokens, positions, "random")


def straight_through(value: Tensor, gradient: Tensor) -> Tensor:
    """Forward `value`, backward as `gradient`."""
    return gradient + (value - gradient).detach()


def plain_step(mode: str, grid: BlockGrid, blocks_RSK: Tensor, z_RS: Tensor, given_RS: Tensor) -> Tensor:
    """Steps [R, S] as the modes of `fakequant` define them."""
    if mode == "fixed":
        return given_RS
    if mode == "canonical":
        highest, lowest = blocks_RSK.amax(-1), blocks_RSK.amin(-1)
        peak = torch.where(highest >= -lowest, highest, lowest)
        step = peak / grid.code_min * (0.6 + 0.4 * torch.sigmoid(z_RS))
    else:
        step = given_RS * z_RS.exp()
    return straight_through(grid.round_step(step.detach().float()).to(step.dtype), step)


def plain_fake_quantize(
    mode: str, grid: BlockGrid, latent_RC: Tensor, z_RS: Tensor, given_RS: Tensor, codes_RC: Tensor | None = None
) -> Tensor:
    """Decoded values [R, C] with autograd's own gradients; steps must not be zero."""
    blocks = latent_RC.unflatten(-1, (-1, grid.block_size))
    step = plain_step(mode, grid, blocks, z_RS, given_RS).unsqueeze(-1)
    if codes_RC is not None:
        return (codes_RC.unflatten(-1, (-1, grid.block_size)) * step).flatten(-2)
    clipped = (blocks / step).clamp(grid.code_min, grid.code_max)
    return (straight_through(clipped.round(), clipped) * step).flatten(-2)
