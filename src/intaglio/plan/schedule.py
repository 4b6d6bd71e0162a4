"""Length, rates and stages of training: the table [schedule] of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from intaglio.errors import RecipeError
from intaglio.plan.checks import FINITE, SHARE, Rule, at_least, one_of

STAGES = (["model"], ["layers"], ["scales"], ["layers", "model"], ["layers", "scales"])


def _are_betas(value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2
    return pair and all(isinstance(share, int | float) and 0 <= share < 1 for share in value)


SCHEDULE_RULES = {
    "loss": one_of(("kl", "cross_entropy")),
    "moments": one_of(("float32", "bfloat16", "int8")),
    "stages": Rule(lambda value: value in STAGES, f"one of {', '.join(map(str, STAGES))}", any_type=True),
    "betas": Rule(_are_betas, "two numbers in [0, 1)", any_type=True),
    "sequence_length": at_least(2),
    **dict.fromkeys(("tokens", "batch_size", "calibration_tokens"), at_least(1)),
    **dict.fromkeys(("layer_tokens", "layer_epochs", "layer_batch", "layer_window"), at_least(1)),
    **dict.fromkeys(("lr", "layer_lr", "scale_lr", "embedding_lr", "float_lr", "tail_lr"), FINITE),
    **dict.fromkeys(("weight_decay", "clip", "micro_batch", "gptq_tokens", "lora_rank", "seed"), FINITE),
    "warmup": SHARE,
    "frozen_tail": Rule(lambda value: 0 <= value <= 1, "a share in [0, 1]"),
}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Settings of a model's training to its grids.

    loss: "kl" to a teacher's next-token distribution, or "cross_entropy" with the text's next tokens, which
        needs no teacher.
    learn_scales: whether scales of weights move; else they stay as they began, and only codes follow.
    assistant_only: whether only what assistants say in chats counts in the loss, and completions of prompts.
    lora_rank: 0 to train the weights; else of adapters that are merged into them before they are quantized.
    tokens: training tokens in all. batch_size: sequences per optimizer step.
    sequence_length: tokens of a sequence. micro_batch: sequences per forward; 0 for the whole batch.
    lr: learning rate of latents; scale_lr: of the scales, which are learned as logarithms.
    embedding_lr, float_lr: multiples of `lr` for embedding tables, and for norm gains and the projection to
        per-layer inputs, which stay floats.
    warmup: share of the steps. betas, weight_decay, clip: AdamW and gradient norm, as usual.
    frozen_tail: last share of the steps, in which codes stand still and only scales and float
        leftovers move, with 1 in all of them; tail_lr: multiple of the learning rates in it.
    stages: what is trained, in this order. "layers": the layers one after the other, each to give the original's
        outputs; "scales": the scales of all weights, with codes that stand still; "model": everything.
    layer_tokens: of the text that the stage "layers" learns from, layer_epochs times.
    layer_batch: sequences that pass a layer together, in that stage and in what else `quantize` does with a text.
    layer_lr: as `lr`, in that stage. layer_window: layers that are trained together.
    gptq_tokens: tokens of the text from which GPTQ chooses the first codes (0: rounding to nearest).
    calibration_tokens: of the text on which static scales of activations and KV cache get first values.
    seed: of the data order.
    moments: dtype in which AdamW's moments are kept between steps; the arithmetic is in float32. "int8" is torchao's
        AdamW8bit, codes in blocks of 256. offload_moments: keep them in pinned host memory, on a GPU.
    gathered: of several processes each keeps weights that it gathered in a forward until the backward, and those of a
        teacher for good.
    """

    loss: str = "kl"
    stages: tuple[str, ...] = ("model",)
    learn_scales: bool = True
    assistant_only: bool = False
    lora_rank: int = 0
    tokens: int = 10_000_000
    batch_size: int = 32
    micro_batch: int = 0
    sequence_length: int = 512
    lr: float = 1e-4
    scale_lr: float = 3e-3
    embedding_lr: float = 3.0
    float_lr: float = 1.0
    warmup: float = 0.03
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    frozen_tail: float = 0.7
    tail_lr: float = 1.0
    layer_tokens: int = 262_144
    layer_epochs: int = 2
    layer_batch: int = 8
    layer_lr: float = 3e-4
    layer_window: int = 1
    gptq_tokens: int = 0
    calibration_tokens: int = 16_384
    seed: int = 0
    moments: str = "float32"
    offload_moments: bool = False
    gathered: bool = False

    def tokens_by_layers(self, static: bool) -> int:
        """Tokens of the text that go through a model layer by layer; static: whether static scales are calibrated."""
        learning = self.layer_tokens if "layers" in self.stages else 0
        return max(self.gptq_tokens, learning, self.calibration_tokens if static else 0)


def check_schedule(schedule: Schedule, where: str) -> None:
    """Raise RecipeError for settings that exclude each other."""
    if schedule.moments == "int8" and schedule.offload_moments:
        raise RecipeError(f"{where}: offload_moments with moments = 'int8': expected float32 or bfloat16 moments")
    if "scales" in schedule.stages and not schedule.learn_scales:
        raise RecipeError(f"{where}: the stage 'scales' trains scales alone, and learn_scales = false: leave out one")
    if schedule.lora_rank and schedule.stages != ("model",):
        raise RecipeError(f"{where}: lora_rank trains adapters in the stage 'model' alone: expected stages = ['model']")
