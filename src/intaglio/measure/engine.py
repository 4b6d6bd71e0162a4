"""Engines run a model for chats and tasks: text to tokens, logits, and tokens to text.

Shape suffixes: T tokens, V vocabulary.

`LlamaCpp` is an engine for a .gguf, and `Transformers` one for a folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from intaglio.errors import ConfigError, WeightError
from intaglio.measure.metrics import label_nll
from intaglio.packed.template import Renderer


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
    def logits(self, tokens_T: Sequence[int], last: int | None = None) -> Tensor: ...
    def following(self, tokens: Sequence[int]) -> Tensor: ...


class Prompter(Renderer):
    """Chats as a model reads them, by its own template. A context manager, as `Renderer` is.

    where: the model, for messages. Raises ConfigError for a model without a template.
    """

    def __init__(self, engine: Engine, where: str | Path):
        self.template, self.where = engine.chat_format.template, where
        if not self.template:
            raise ConfigError(f"{where}: has no chat template: give it text instead of chats")
        special: Any = SimpleNamespace(special_tokens_map=engine.chat_format.special)
        super().__init__(special)

    def prompt(self, messages: list[dict[str, Any]], *, ask: bool = True) -> str:
        """The text of a chat. ask: with the header of the answer. ConfigError where the template refuses it."""
        reply = self.reply(self.template, messages, ask=ask)
        if "error" in reply:
            raise ConfigError(f"{self.where}: its chat template refuses this conversation: {reply['error']}")
        return str(reply["text"])


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


def scored(engine: Engine, read: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
    """Log-probability in nats of tokens, and whether each is the likeliest one, for each continuation of a text.

    read: the text with all but the last token of a continuation behind it, which is the same for all of them.
    """
    most = max(map(len, continuations))
    log_p_TV = engine.logits(read, most).log_softmax(-1)
    found = []
    for tokens in continuations:
        rows_TV, labels_T = log_p_TV[most - len(tokens) :], torch.tensor(tokens)
        likeliest = bool((rows_TV.argmax(-1) == labels_T).all())
        found.append((-float(label_nll(rows_TV, labels_T).sum()), likeliest))
    return found


class Transformers:
    """A transformers model with its tokenizer. where, chat_format: its folder, and what that says.

    `logits` and `following` raise WeightError for NaN or Inf.
    """

    def __init__(
        self,
        where: Path,
        model: Any,
        tokenizer: Any,
        *,
        chat_format: ChatFormat,
        version: str,
        context_tokens: int,
    ):
        self.where, self.model, self.tokenizer, self.chat_format = where, model, tokenizer, chat_format
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
    def logits(self, tokens_T: Sequence[int], last: int | None = None) -> Tensor:
        """float32 [T, V], on the CPU, of one window without any history; of its `last` tokens alone if that is set."""
        output = self.model(input_ids=self._input(tokens_T), use_cache=False, logits_to_keep=last or 0)
        return self._finite(output.logits[0])

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
        return self._finite(output.logits[0, -1])

    def _finite(self, logits: Tensor) -> Tensor:
        if not logits.isfinite().all():
            raise WeightError(f"{self.where}: NaN or Inf in the logits: look for NaN, Inf or overflow in its weights")
        return logits.float().cpu()

    def _input(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self.model.device)
