"""What a chat and a task need of a runtime: text to tokens, logits, and tokens to text.

Shape suffixes: T tokens, V vocabulary.

`LlamaCpp` is an engine for a .gguf, and `Transformers` one for a folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChatFormat:
    """A model's chat template, its special tokens' texts by the names that templates use, and ids.

    template: empty if there is none. first: stands before every text; negative if there is none. ends: of an answer.
    """

    template: str
    special: dict[str, str]
    first: int
    ends: frozenset[int]


class Engine(Protocol):
    """A model in its runtime. version: of the runtime, with its name. context_tokens: what it reads at most."""

    version: str
    context_tokens: int

    @property
    def chat_format(self) -> ChatFormat: ...
    def encode(self, text: str) -> list[int]: ...
    def text(self, tokens: Sequence[int]) -> str: ...
    def logits(self, tokens_T: Sequence[int]) -> Tensor: ...
    def following(self, tokens: Sequence[int]) -> Tensor: ...


def with_first(engine: Engine, tokens: list[int]) -> list[int]:
    """Tokens of a text behind the model's first token, if they do not have it already."""
    first = engine.chat_format.first
    return tokens if first < 0 or tokens[:1] == [first] else [first, *tokens]


def written(
    engine: Engine, prompt: Sequence[int], most: int, *, temperature: float = 0.0, seed: int = 0
) -> Iterator[str]:
    """The continuation of a prompt as it grows, after each token: the likeliest one, or sampled at a temperature.

    Ends at a token that ends an answer, after `most` tokens, and where the context is full.
    """
    chance, tokens = torch.Generator().manual_seed(seed), list[int]()
    while len(tokens) < min(most, engine.context_tokens - len(prompt)):
        logits_V = engine.following([*prompt, *tokens])
        if temperature > 0:
            shares_V = (logits_V.double() / temperature).softmax(-1)
            token = int(torch.multinomial(shares_V, 1, generator=chance))
        else:
            token = int(logits_V.argmax())
        if token in engine.chat_format.ends:
            return
        tokens.append(token)
        yield engine.text(tokens)


class Transformers:
    """A transformers model with its tokenizer. chat_format: that of its folder."""

    def __init__(self, model: Any, tokenizer: Any, chat_format: ChatFormat, version: str, context_tokens: int):
        self.model, self.tokenizer, self.chat_format = model, tokenizer, chat_format
        self.version, self.context_tokens = version, context_tokens
        self._read, self._cache = list[int](), None

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; none is put before it."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def text(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    @torch.no_grad()
    def logits(self, tokens_T: Sequence[int]) -> Tensor:
        """float32 [T, V] of one window without any history."""
        logits: Tensor = self.model(input_ids=self._input(tokens_T), use_cache=False).logits
        return logits[0].float()

    @torch.no_grad()
    def following(self, tokens: Sequence[int]) -> Tensor:
        """float32 [V], on the CPU: logits of what follows these tokens. If they continue the last ones, only the rest
        is read.
        """
        tokens = list(tokens)
        if self._read != tokens[: len(self._read)] or len(self._read) == len(tokens):
            self._read, self._cache = [], None
        rest = self._input(tokens[len(self._read) :])
        output = self.model(input_ids=rest, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._read, self._cache = tokens, output.past_key_values
        row_V: Tensor = output.logits[0, -1].float().cpu()
        return row_V

    def _input(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self.model.device)
