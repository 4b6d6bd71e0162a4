"""What an artifact of a plan is without, or has otherwise, in words for its README."""

from __future__ import annotations

from intaglio.numerics.grid import BlockGrid
from intaglio.plan.affine import schemes
from intaglio.plan.plan import Plan


def vllm_note(plan: Plan) -> str:
    """What vLLM's folder has otherwise than the packed model."""
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
    """What an MLX folder is without."""
    return "MLX has no static scales: activations and KV cache stay in floats." if plan.static_scales else ""


def litert_note(plan: Plan) -> str:
    """What LiteRT rounds by itself."""
    return "" if plan.static_scales else "LiteRT rounds activations to 8 bits as they come where weights are Q4_0."


def mobile_note(plan: Plan) -> str:
    """What transformers leaves in floats."""
    return "transformers quantizes activations and leaves the KV cache in floats." if plan.recipe.kv_cache else ""


def not_run(plan: Plan) -> str:
    """For programs that are in no package registry."""
    return "Written by the program's documentation and checked by parsing; the program itself was not run."


def too_wide(plan: Plan) -> str:
    """Why a release for all has no transformers folder of this plan; empty where it has."""
    if plan.portable:
        return ""
    return "bfloat16 does not hold this recipe's weights, and float32 takes eight times the room: ask for it by name"
