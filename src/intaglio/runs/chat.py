"""A chat with a model in its runtime, and with the original beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intaglio.errors import InputError
from intaglio.measure.candidates import open_engine
from intaglio.measure.engine import Engine, Prompter, with_first, written
from intaglio.numerics.device import Device, device_for
from intaglio.packed.origin import model_name
from intaglio.plan.hub import ARTIFACT, find_model

CONTEXT_TOKENS = 4096


@dataclass(frozen=True)
class Answer:
    """An answer of a model, by name, in a runtime. tokens: how many it has.

    first_seconds: until its first token was there, with the prompt that was read. tokens_per_second: of the others;
    None where there is none.
    """

    model: str
    runtime: str
    text: str
    tokens: int
    first_seconds: float
    tokens_per_second: float | None


def chat(
    artifact: str | Path,
    prompts: str | Iterable[str],
    *,
    beside: str | Path | None = None,
    tokens: int = 512,
    temperature: float = 0.0,
    raw: bool = False,
    context_tokens: int = CONTEXT_TOKENS,
    device: Device = None,
    on_text: Callable[[str, str], bool] = lambda model, text: True,
) -> Iterator[Answer]:
    """Answers of a model to a prompt, or to several in one conversation; with `beside`, two to each.

    artifact: a .gguf, which llama.cpp runs, or a packed model or transformers folder. beside: the original, whose own
    conversation has the same prompts. tokens: most of an answer. temperature: 0 takes the likeliest token. raw:
    continue each prompt itself, without chat template and conversation. on_text: hears which model has written which
    text, as it comes, and says whether it may go on. Raises InputError where a conversation does not fit the context,
    and ConfigError for a model without a chat template.
    """
    with ExitStack() as stack:
        paths = [find_model(path, files=ARTIFACT) for path in (artifact, beside) if path is not None]
        place = device_for(device)
        speakers = []
        for path in paths:
            engine = open_engine(path, stack, context_tokens=context_tokens, device=place)
            prompter = None if raw else stack.enter_context(Prompter(engine, path))
            speakers.append(_Speaker(path, engine, prompter))
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            for speaker in speakers:
                yield speaker.answer(prompt, tokens, temperature, on_text)


@dataclass
class _Speaker:
    """A model and its conversation so far; prompter: None to continue each prompt by itself."""

    path: Path
    engine: Engine
    prompter: Prompter | None
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.name if self.path.is_file() else model_name(self.path)

    def answer(self, prompt: str, most: int, temperature: float, on_text: Callable[[str, str], bool]) -> Answer:
        """The answer to a prompt, which joins the conversation with it."""
        prompt = prompt.encode("utf-8", "replace").decode()  # a terminal may give halves of characters
        messages = [*self.messages, {"role": "user", "content": prompt}]
        said = prompt if self.prompter is None else self.prompter.prompt(messages)
        tokens = with_first(self.engine, self.engine.encode(said))
        if len(tokens) >= self.engine.context_tokens:
            raise InputError(
                f"{self.path}: the conversation has {len(tokens)} tokens: expected fewer than the "
                f"{self.engine.context_tokens} of the context: begin a new one, or choose a larger --context"
            )
        text, shown, times = "", 0, [time.perf_counter()]
        for text in written(self.engine, tokens, most, temperature=temperature):
            times.append(time.perf_counter())
            ready = len(text.rstrip("\ufffd"))  # what stands for bytes of a character that is not whole yet
            if not on_text(self.name, text[shown:ready]):
                break
            shown = max(shown, ready)
        on_text(self.name, text[shown:])
        self.messages = [*messages, {"role": "assistant", "content": text}]
        count = len(times) - 1
        rate = (count - 1) / (times[-1] - times[1]) if count > 1 else None
        return Answer(self.name, self.engine.version, text, count, times[min(1, count)] - times[0], rate)
