"""Memory of training on each GPU: the allocations of `train`, counted from the plan.

Weights are counted exactly, for a forward in bfloat16: the teacher, the student with its decoded weights, float32
latents, scales, gradients, and AdamW's two moments. Codes of a table that is not trained are on the host.
Activations are the tensors that autograd keeps of each layer in eager mode in bfloat16, counted from transformers'
layers (a test compares both); a compiled layer keeps less.
The loss holds four chunks of logits at a time, as measured (benchmarks/results/gpu_step.json).

Sharded over n GPUs as FSDP does it, each holds an n-th of weights, gradients and moments; one layer's weights and the
head's whole; and the table of per-layer embeddings, which is not sharded. Activations and loss are not shared.

Moments are counted as `schedule.moments` keeps them. Offloaded ones come to the GPU one bucket at a time, during the
optimizer step, and are counted with the gradients. With 8-bit moments the step takes weights one by one, and what it
holds of the largest one is counted instead of a bucket.

Gradients come as activations go, so the two are not in memory as a whole together: the larger one counts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from intaglio.errors import InputError
from intaglio.numerics.grid import BlockGrid
from intaglio.plan.activations import FLOAT, HALF, activation_bytes, attention_bytes, layer_bytes
from intaglio.plan.plan import HEAD, Plan, PlannedTensor
from intaglio.plan.schedule import Schedule

LOSS_CHUNK_TOKENS = 512  # as train.distill takes them on a GPU
LOSS_CHUNK_LOGITS = 1 << 27
LOGITS_AT_ONCE = 4  # of student and teacher, and gradients
BUCKET_VALUES = 1 << 28  # whose gradients and decoded values the fused optimizer step holds beside the model's own
INT8_BLOCK, INT8_LEAST, INT8_MAP = 256, 4096, 256  # torchao's: values of a block and of a tensor, and of its map
LABELS = {  # of the rows, for people
    "teacher": "teacher, bfloat16",
    "student": "student, bfloat16",
    "masters": "float32 masters",
    "scales": "scales",
    "gradients": "gradients",
    "optimizer": "AdamW moments",
    "gathered": "one layer, gathered",
    "activations": "activations",
    "loss": "loss, by chunks",
}
# A sharded head is held whole twice in bfloat16, teacher's and student's; its gradient is part of the loss
GATHERED_HEAD = 2 * HALF
# The largest sharded layer, whole: it, the next one and its gradient, and the gradient in float32 as it is summed
GATHERED_LAYER = 3 * HALF + FLOAT
GPTQ_SQUARES = 5 * FLOAT + 3 * 8  # bytes for each pair of inputs: moments and their copies, three factors in float64
GPTQ_WEIGHTS = 8 * FLOAT + 2 * 8  # and for each weight of the linear


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on each GPU.

    teacher, student: bfloat16 weights; the student's hold decoded values, those of tables that are not trained too.
    masters: float32 latents, or codes that stand still.
    scales: learned and fitted ones of weights that are trained, with their first values and present steps.
    gradients: bfloat16, of weights, and what one part of the optimizer step takes beside them.
    gathered: the largest layer and the head, whole, where weights are sharded.
    micro_tokens: tokens of a forward; what they cost is in activations and loss.
    """

    gpus: int
    micro_tokens: int
    gradient_checkpointing: bool
    teacher: int
    student: int
    masters: int
    scales: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    loss: int

    @property
    def rows(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)[3:]}

    @property
    def total(self) -> int:
        """At the peak: all that is always in memory, with either activations and loss, or gradients."""
        return sum(self.at_the_peak.values())

    @property
    def at_the_peak(self) -> dict[str, int]:
        """Those of the rows that are in memory then."""
        rows = self.rows
        gone = ("activations", "loss") if self.activations + self.loss < self.gradients else ("gradients",)
        return {name: size for name, size in rows.items() if name not in gone}


def training_memory(
    plan: Plan,
    *,
    gpus: int = 1,
    gradient_checkpointing: bool = False,
    compiled: bool = True,
    scales_alone: bool = False,
) -> TrainingMemory:
    """Memory of `train` by the plan's own schedule: its micro-batch, or each GPU's share of the batch.

    compiled: decoder layers are, as `train` does by default on a GPU. It counts where layers are recomputed.
    scales_alone: in the stage "scales", where codes of a byte stand in the place of masters, and only scales learn.
    """
    schedule = plan.recipe.schedule
    if not 1 <= gpus <= schedule.batch_size:
        raise InputError(
            f"{gpus} GPUs: expected 1 to {schedule.batch_size}, the sequences of a batch (schedule.batch_size)"
        )
    sequences = schedule.micro_batch or -(-schedule.batch_size // gpus)
    tokens = sequences * schedule.sequence_length
    trained = [t for t in plan if (learns_scales(t) if scales_alone else t.rule.trainable) and not t.spec.buffer]
    weights = sum(t.spec.numel for t in plan)
    trained_weights = sum(t.spec.numel for t in trained)
    learning = [_scales(t) for t in trained if learns_scales(t)]
    learning += [] if scales_alone else [t.spec.numel for t in trained]
    head, chunked = _head_values(plan), gradient_checkpointing and compiled and not plan.model.family.eager
    tables = sum(t.spec.numel for t in plan if t.spec.role == "ple_embedding")

    def shared(size_bytes: int) -> int:
        return -(-size_bytes // gpus)

    return TrainingMemory(
        gpus=gpus,
        micro_tokens=tokens,
        gradient_checkpointing=gradient_checkpointing,
        teacher=shared(HALF * (weights - tables)) + HALF * tables,
        student=shared(HALF * (weights - tables)) + HALF * tables,
        masters=shared((1 if scales_alone else FLOAT) * trained_weights),
        scales=shared(sum(_scale_bytes(t) for t in trained)),
        gradients=shared(HALF * trained_weights) + _step_bytes(schedule, trained, gpus),
        optimizer=0 if schedule.offload_moments else _moment_bytes(schedule, learning, gpus),
        gathered=_gathered_bytes(plan, weights - tables, head) if gpus > 1 else 0,
        activations=activation_bytes(plan.model, tokens, schedule.sequence_length, gradient_checkpointing)
        + (attention_bytes(plan.model, tokens, schedule.sequence_length) if chunked else 0),
        loss=_loss_bytes(plan, tokens, head, gradient_checkpointing),
    )


def _gathered_bytes(plan: Plan, sharded: int, head: int) -> int:
    """Weights that a process has whole for a while. sharded, head: numbers of weights of the model and of its head."""
    largest = max(_layer_values(plan).values())
    if plan.recipe.schedule.gathered:  # all of teacher and student, and a layer's gradients as below
        return 2 * HALF * sharded + (HALF + FLOAT) * largest
    return GATHERED_LAYER * largest + GATHERED_HEAD * head


def _step_bytes(schedule: Schedule, trained: list[PlannedTensor], gpus: int) -> int:
    """Bytes that the optimizer step holds of one bucket, or with 8-bit moments of one weight, beside all gradients."""
    if schedule.moments == "int8":  # the latent's gradient in float32, a copy of the weight's, and decoded values
        return max(-(-t.spec.numel // gpus) for t in trained) * (FLOAT + 2 * HALF)
    bucket = min(BUCKET_VALUES, -(-sum(t.spec.numel for t in trained) // gpus))
    moments = 2 * (HALF if schedule.moments == "bfloat16" else FLOAT) if schedule.offload_moments else 0
    return bucket * (2 * HALF + moments)  # gradients and decoded values


def _moment_bytes(schedule: Schedule, sizes: list[int], gpus: int) -> int:
    """AdamW's two moments, as they are kept. sizes: numbers of values of each tensor that learns."""
    if schedule.moments == "int8":
        return 2 * sum(_int8_bytes(-(-size // gpus)) for size in sizes)
    return -(-2 * (HALF if schedule.moments == "bfloat16" else FLOAT) * sum(sizes) // gpus)


def _int8_bytes(values: int) -> int:
    """One moment as torchao keeps it: codes, a float32 scale a block and a map; float32 where blocks do not fit."""
    if values < INT8_LEAST or values % INT8_BLOCK:
        return FLOAT * values
    return values + FLOAT * (values // INT8_BLOCK + INT8_MAP)


def learns_scales(tensor: PlannedTensor) -> bool:
    """Whether training moves a tensor's scales; those of finer grids stay as fitted."""
    grid = tensor.grid
    return isinstance(grid, BlockGrid) and tensor.rule.trainable and (grid.positive or grid.code_bits <= 4)


def _scales(tensor: PlannedTensor) -> int:
    return tensor.spec.numel // tensor.grid.block_size if isinstance(tensor.grid, BlockGrid) else 0


def _scale_bytes(tensor: PlannedTensor) -> int:
    grid = tensor.grid
    if not isinstance(grid, BlockGrid):
        return 0
    steps = FLOAT * _scales(tensor)  # of the last decode
    if learns_scales(tensor):  # of a canonical grid the extremum says where learning began; of others it is kept
        return steps + _scales(tensor) * (FLOAT + (0 if grid.canonical else FLOAT))
    supers = 0 if grid.super_block is None else HALF * (tensor.spec.numel // grid.super_block)
    return steps + _scales(tensor) * grid.scale_dtype.itemsize + supers


def _head_values(plan: Plan) -> int:
    return next(
        t.spec.numel for t in plan if t.name == HEAD or (plan.model.tied_head and t.spec.role == "token_embedding")
    )


def _layer_values(plan: Plan) -> dict[str, int]:
    """Numbers of weights in each decoder layer."""
    layers: dict[str, int] = {}
    for tensor in plan:
        if tensor.name.startswith("model.layers."):
            layer = tensor.name.split(".")[2]
            layers[layer] = layers.get(layer, 0) + tensor.spec.numel
    return layers


def _loss_bytes(plan: Plan, tokens: int, head: int, gradient_checkpointing: bool) -> int:
    """Chunks of logits in bfloat16, the gradient of the hidden states, and that of a head which is trained.

    Logits are gone before checkpointed layers are computed again, so only what they exceed such a layer by counts.
    """
    config, length = plan.model.layer_config, plan.recipe.schedule.sequence_length
    chunk = min(tokens, max(LOSS_CHUNK_TOKENS, LOSS_CHUNK_LOGITS // config.vocab_size))
    trained = any(t.rule.trainable for t in plan if t.name == HEAD or t.spec.role == "token_embedding")
    logits: int = HALF * LOGITS_AT_ONCE * chunk * config.vocab_size
    if gradient_checkpointing:
        layers = range(config.num_hidden_layers)
        logits = max(0, logits - tokens * max(layer_bytes(plan.model, layer, length) for layer in layers))
    return logits + HALF * (tokens * int(config.hidden_size) + head * trained)


@dataclass(frozen=True)
class LayersMemory:
    """Bytes of quantization layer by layer, with GPTQ and the stage "layers" as far as the schedule asks for them.

    weights: on the GPU, the window's layers in bfloat16 and one original. masters: latents and scales. gptq: second
    moments of the widest linear's inputs, their factors, and what is as large as its weights. training: gradients,
    AdamW's moments and activations of the window. forward: of a layer and a batch, without gradients.
    host: activations of the text between two layers, and the rows of embeddings that it looks up.
    """

    weights: int
    masters: int
    gptq: int
    training: int
    forward: int
    host: int

    @property
    def total(self) -> int:
        """On the GPU, at the peak."""
        return self.weights + self.masters + max(self.gptq, self.training, self.forward)


def layers_memory(plan: Plan) -> LayersMemory:
    """Memory of `quantize --data`, or the stage "layers" of `train`, at the window of layers that takes most."""
    schedule, learning = plan.recipe.schedule, "layers" in plan.recipe.schedule.stages
    window = schedule.layer_window if learning else 1
    sides = 2 if learning or schedule.gptq_tokens else 1
    values = list(_layer_values(plan).values())
    largest = max(sum(values[i : i + window]) for i in range(0, len(values), window))
    tokens = schedule.layer_batch * schedule.sequence_length
    layers = [t for t in plan if t.name.startswith("model.layers.")]
    scales = max(_scale_bytes(t) / t.spec.numel for t in layers)
    linears = [t.spec.shape for t in layers if t.quantized_linear and len(t.spec.shape) == 2]
    rows, columns = max(linears, key=lambda shape: (shape[1], shape[0]), default=(0, 0))
    activations = max(layer_bytes(plan.model, layer, schedule.sequence_length) for layer in range(len(values)))
    width, config = plan.model.layer_config.hidden_size, plan.model.layer_config
    per_layer = (getattr(config, "hidden_size_per_layer_input", 0) or 0) * len(values)
    text = schedule.tokens_by_layers(bool(plan.static_scales))
    state = largest * (HALF + 2 * FLOAT) + 2 * HALF * min(BUCKET_VALUES, largest)
    return LayersMemory(
        weights=HALF * (largest + max(values) * (sides - 1)),
        masters=round(largest * (FLOAT + scales)),
        gptq=(GPTQ_SQUARES * columns**2 + GPTQ_WEIGHTS * rows * columns) * bool(schedule.gptq_tokens),
        training=(state + tokens * activations * window) * learning,
        forward=tokens * sides * activations,
        host=text * sides * HALF * (3 * width + 2 * per_layer + schedule.sequence_length),
    )


def stage_peaks(plan: Plan, *, gpus: int = 1, gradient_checkpointing: bool = False) -> dict[str, int]:
    """Bytes on each GPU at the peak of each stage that a recipe may have; "layers" runs on one."""
    how: dict[str, Any] = {"gpus": gpus, "gradient_checkpointing": gradient_checkpointing}
    by_layers = replace(plan, recipe=plan.recipe.with_schedule(stages=("layers",)))
    return {
        "layers": layers_memory(by_layers).total,
        "scales": training_memory(plan, scales_alone=True, **how).total,
        "model": training_memory(plan, **how).total,
    }
