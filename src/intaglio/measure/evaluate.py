"""Run models over windows of text and compare them with a teacher.

Shape suffixes: N windows, T tokens of a window, V vocabulary.

Logits of position t predict token t + 1. The last position of a window has no label and is left
out; nothing else is. A vocabulary of 262144 makes the logits of 1024 tokens a gigabyte, so a few
windows pass at a time, and only as many of the reference's logits are kept as there is room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.errors import InputError
from intaglio.measure.metrics import Accumulator, Comparison
from intaglio.progress import Progress

# Float logits [T, V] of each window: a function of the window's tokens, such as
# `transformers_source(model)` or `LlamaCpp.logits`, or an iterable that yields them in order.
LogitSource = Callable[[Tensor], Tensor] | Iterable[Tensor]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model to compare, and whether it is the shipped file or stands in for it.

    runtime: what computes the logits, with its version. simulated: whether it is a fake-quantized
    model rather than the artifact in its runtime.
    """

    source: LogitSource
    runtime: str
    simulated: bool


def logits_of(model: nn.Module, windows_NT: Tensor, batch: int = 1) -> Iterator[Tensor]:
    """float32 logits [T, V] of each window, on the model's device.

    `batch` windows share a forward; their logits are in memory together. The model is put into
    evaluation mode for each forward and back afterwards.
    """
    for windows in windows_NT.split(batch):
        for logits_TV in _forward(model, windows):
            yield logits_TV.float()


class Kept:
    """A reference's logits, for as many candidates as come: each iteration yields float32 [T, V] of every window.

    compute: logits of windows [N, T], one window after the other, such as `logits_of` with its model.
    keep_bytes: those of the first windows are kept, as far as they fit in here; the others are computed again.
    """

    def __init__(self, compute: Callable[[Tensor], Iterable[Tensor]], windows_NT: Tensor, keep_bytes: int):
        self.compute, self.windows = compute, windows_NT
        self.room, self.kept = keep_bytes, list[Tensor]()

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.kept
        start = len(self.kept)
        if start == len(self.windows):
            return
        for index, logits_TV in enumerate(self.compute(self.windows[start:]), start):
            if index == len(self.kept) and logits_TV.nbytes <= self.room:
                self.room -= logits_TV.nbytes
                self.kept.append(logits_TV.clone())  # a copy: a view would hold the logits of the whole batch
            yield logits_TV


def transformers_source(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A logit source that runs the model on each window as it comes."""
    return lambda window_T: _forward(model, window_T.unsqueeze(0))[0].float()


def transformers_runtime() -> str:
    """The library and its version, for `Comparison.runtime`."""
    import transformers

    return f"transformers {transformers.__version__}"


@torch.no_grad()  # not inference_mode: values that training has cached must stay usable for autograd
def _forward(model: Any, windows_NT: Tensor) -> Tensor:
    """Logits [N, T, V] in the model's dtype."""
    was_training = model.training
    model.eval()
    try:
        logits: Tensor = model(input_ids=windows_NT.to(model.device), use_cache=False).logits
        return logits
    finally:
        model.train(was_training)


def evaluate_many(
    reference: LogitSource,
    candidates: dict[str, Candidate],
    windows_NT: Tensor,
    progress: Progress | None = None,
) -> dict[str, Comparison]:
    """Compare several candidates with one reference, which runs once a window.

    progress: shows the scored tokens and the mean KL so far of the last candidate.
    Raises RuntimeFailureError where a candidate's runtime fails, InputError for windows of fewer than two tokens, for
    none at all, and for a source that ends early; ConfigError and WeightError as `Accumulator.add` does.
    """
    if windows_NT.ndim != 2 or windows_NT.shape[0] < 1 or windows_NT.shape[1] < 2:
        raise InputError(f"windows of shape {list(windows_NT.shape)}: expected [windows, tokens], two tokens or more")
    tokens = windows_NT[:, 1:].numel()
    reference_stream = _stream("reference", reference, windows_NT)
    streams = {name: _stream(name, candidate.source, windows_NT) for name, candidate in candidates.items()}
    results = {name: Accumulator(runtime=c.runtime, simulated=c.simulated) for name, c in candidates.items()}
    for index, window_T in enumerate(windows_NT, start=1):
        _add_window(next(reference_stream), streams, results, window_T[1:])
        if progress is not None:
            latest = list(results.values())[-1].kl_mean_nats
            progress.part(index * (windows_NT.shape[1] - 1), tokens, f"KL {latest:.4f}")
    return {name: accumulator.result() for name, accumulator in results.items()}


def _add_window(
    reference_TV: Tensor, streams: dict[str, Iterator[Tensor]], results: dict[str, Accumulator], labels: Tensor
) -> None:
    """A function of its own, so that its logits are gone before the next window's are computed."""
    for name, accumulator in results.items():
        accumulator.add(reference_TV[:-1], next(streams[name])[:-1], labels)


def _stream(name: str, source: LogitSource, windows_NT: Tensor) -> Iterator[Tensor]:
    if callable(source):
        yield from map(source, windows_NT)
    else:
        yield from source
        raise InputError(f"logits of {name} ended early: expected {len(windows_NT)} windows")


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompts: Iterable[str], tokens: int) -> list[str]:
    """The model's continuation of each prompt, always taking the likeliest token; without the prompt.

    Ends after `tokens` tokens or at the model's end-of-text token.
    """
    was_training = model.training
    model.eval()
    try:
        return [_continue(model, tokenizer, prompt, tokens) for prompt in prompts]
    finally:
        model.train(was_training)


def _continue(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    # sampling settings of the model's generation_config would only earn a warning here
    plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    output = model.generate(**inputs, max_new_tokens=tokens, **plain)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
