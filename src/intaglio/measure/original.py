"""The original that everything is measured against: its dtype, its logits, and how exact they are.

Shape suffixes: N windows, T tokens of a window, V vocabulary.

An original and one candidate are in memory beside each other. On a CPU both are float32. On a GPU they are float32 too
if they fit, and bfloat16 if they do not; then the weights of both are rounded to bfloat16, and so are all activations.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from intaglio.measure.evaluate import Candidate, Kept, evaluate_many, logits_of
from intaglio.measure.metrics import Comparison
from intaglio.packed.checkpoint import TextModel, load_model
from intaglio.plan.family import ModelSpec
from intaglio.progress import Progress

NOISE_WINDOWS = 4  # enough for a noise floor: it is the same size on every text
KEEP_BYTES_CPU = 1 << 30  # of the original's logits: 4096 tokens of a vocabulary of 65536
# Shares of a GPU's memory: of two models, and, beside them, of a batch of logits and of logits that are kept. A forward
# holds about six arrays of a batch's logits, those of candidate and original together.
MODELS_SHARE, BATCH_SHARE, KEEP_SHARE = 0.85, 1 / 24, 0.4
BATCH_TOKENS = 16384  # a GPU is busy with fewer


@dataclass(frozen=True)
class Original:
    """The original as it is measured.

    logits: of the windows, for one candidate after the other. batch: windows that share a forward.
    noise_kl: KL in nats of the original to itself, computed in another way: `noise_of` says in which.
    """

    model: TextModel
    logits: Kept
    windows_NT: Tensor
    batch: int
    noise_kl: float
    noise_of: str

    @property
    def note(self) -> str:
        """Noise floor of figures that were measured with it."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return (
            f"The original and the rows named “simulated” compute in {dtype} on {self.model.device.type}. Noise floor "
            f"of that choice: KL {self.noise_kl:.1e} nats, the original against itself {self.noise_of}."
        )

    def compare(self, candidate: Candidate, progress: Progress) -> Comparison:
        """Measure a candidate against the original on the windows; raises as `evaluate_many` does."""
        return evaluate_many(self.logits, {"candidate": candidate}, self.windows_NT, progress)["candidate"]


def open_original(
    model_dir: str | Path, spec: ModelSpec, windows_NT: Tensor, device: torch.device, given: TextModel | None = None
) -> Original:
    """Put the original on the device, and see how exact its logits of these windows are; int64 [N, T].

    given: the same model, if it is in memory; it is used where its dtype and device are those that are wanted.
    Raises as `load_model` does.
    """
    parameters = sum(tensor.numel for tensor in spec.tensors)
    dtype, few_NT = measuring_dtype(parameters, device), windows_NT[:NOISE_WINDOWS]
    exact = None
    if dtype != torch.float32 and _fit(1, parameters, device):
        exact = list(logits_of(load_model(model_dir, device=device), few_NT))
    if given is None or given.dtype != dtype or given.device != device:
        given = None  # so that it is gone before the next one comes
        given = load_model(model_dir, dtype, device)
    model: TextModel = given
    batch, keep_bytes = _room(model, windows_NT, device)
    noise_of = "in float32" if exact is not None else "with another attention kernel"
    reference = exact if exact is not None else _by_another_kernel(model, few_NT)
    again = Candidate(source=logits_of(model, few_NT, batch), runtime="", simulated=True)
    noise = evaluate_many(reference, {"candidate": again}, few_NT)["candidate"]
    logits = Kept(lambda some_NT: logits_of(model, some_NT, batch), windows_NT, keep_bytes)
    noise_of += f", {len(few_NT)} window{'s' * (len(few_NT) > 1)}"
    return Original(model, logits, windows_NT, batch, noise.kl_mean_nats, noise_of)


def measuring_dtype(parameters: int, device: torch.device) -> torch.dtype:
    """float32 on a CPU, and on a GPU that has room for two such models; else bfloat16."""
    return torch.float32 if device.type == "cpu" or _fit(2, parameters, device) else torch.bfloat16


def _fit(models: int, parameters: int, device: torch.device) -> bool:
    """Whether so many float32 models of so many parameters fit on a GPU."""
    return models * parameters * torch.float32.itemsize <= MODELS_SHARE * free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, after what nobody uses any more was given back."""
    gc.collect()
    module = torch.get_device_module(device)
    module.empty_cache()
    return int(module.mem_get_info(device)[0])


def _room(model: TextModel, windows_NT: Tensor, device: torch.device) -> tuple[int, int]:
    """Number of windows that share a forward, and bytes of logits that may be kept."""
    if device.type == "cpu":
        return 1, KEEP_BYTES_CPU
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    free, length = max(0, free_bytes(device) - parameters), windows_NT.shape[1]  # the candidate is still to come
    logits_bytes = length * model.config.vocab_size * torch.float32.itemsize
    batch = min(int(BATCH_SHARE * free) // logits_bytes, BATCH_TOKENS // length)
    return max(1, batch), int(KEEP_SHARE * free)


def _by_another_kernel(model: TextModel, windows_NT: Tensor) -> list[Tensor]:
    """Logits with attention written out, which no fused kernel computes."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return list(logits_of(model, windows_NT))
    finally:
        model.set_attn_implementation(before)
