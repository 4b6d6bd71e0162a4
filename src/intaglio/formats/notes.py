"""Sentences for an artifact's README: each says where the artifact differs from the packed model."""

from __future__ import annotations

from intaglio.formats.words.layout import schemes
from intaglio.numerics.grid import BlockGrid
from intaglio.plan.plan import Plan


def vllm_note(plan: Plan) -> str:
    """The note says where vLLM's folder differs from the packed model; it is empty where nothing differs."""
    notes = []
    if any("embedding" in t.spec.role and isinstance(t.grid, BlockGrid) and t.grid.portable for t in plan):
        notes.append("Embeddings are bfloat16, exactly what their codes and scales decode to.")
    if any(scheme.static for scheme in schemes(plan).values()):
        notes.append(
            "vLLM 0.32 computes q, k and v, and gate and up, as one linear, and gives all of it the output scale of "
            "the last (v, up), although the file has one for each."
        )
    if any(t.spec.role == "expert" and isinstance(t.grid, BlockGrid) for t in plan):
        notes.append("Each expert is three linears; transformers does not read them, and would make random ones.")
    if plan.recipe.kv_cache is not None:
        notes.append("The format has no place for scales of an int8 KV cache: it stays in floats.")
    return " ".join(notes)


def mlx_note(plan: Plan) -> str:
    """The note says which of the plan's scales an MLX folder cannot hold; it is empty where it holds all."""
    return "MLX has no static scales: activations and KV cache stay in floats." if plan.static_scales else ""


def gguf_note(plan: Plan) -> str:
    """The note says which of the plan's scales a GGUF cannot hold; it is empty where it holds all."""
    if not plan.static_scales:
        return ""
    return "GGUF has no static scales: llama.cpp scales activations as they come and keeps the KV cache in floats."


def litert_note(plan: Plan) -> str:
    """The note says which values LiteRT rounds by itself; it is empty where the plan rounds them too."""
    return "" if plan.static_scales else "LiteRT rounds activations to 8 bits as they come where weights are Q4_0."


def mobile_note(plan: Plan) -> str:
    """The note says which values transformers leaves in floats; it is empty where the plan does so too."""
    return "transformers quantizes activations and leaves the KV cache in floats." if plan.recipe.kv_cache else ""


def not_run(plan: Plan) -> str:
    """The note of a format whose program is in no package registry, so that nobody ran it here."""
    return "Written by the program's documentation and checked by parsing; the program itself was not run."


def too_wide(plan: Plan) -> str:
    """Why a release for all has no transformers folder of this plan; empty where it has."""
    if plan.portable:
        return ""
    return "bfloat16 does not hold this recipe's weights, and float32 takes eight times the room: ask for it by name"
