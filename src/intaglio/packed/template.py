"""Chats through a checkpoint's own template, bounded in time and memory.

A chat template is a program that came with the model. It runs in a child process that the kernel ends when it takes too
long, and that gets no more memory than it is allowed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from intaglio.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

CHILD = Path(__file__).with_name("template_child.py")
SECONDS = 20
MEGABYTES = 1024
CHARACTERS = 1 << 25


class Rendered(NamedTuple):
    """Text of a chat.

    spans: parts of it that assistant turns wrote, with the token that ends a turn; empty unless asked for.
    unclear: assistant turns whose part could not be told; they are in no span.
    """

    text: str
    spans: list[tuple[int, int]]
    unclear: int


class Renderer:
    """A tokenizer's chat template in a child process, which starts at the first chat and ends with the `with` block."""

    def __init__(self, tokenizer: Tokenizer, *, seconds: int = SECONDS, megabytes: int = MEGABYTES):
        self.tokenizer, self.seconds, self.megabytes = tokenizer, seconds, megabytes
        self.child: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child = None

    def source(self, tools: Any = None) -> str:
        """The template itself; tokenizers may have another one for chats with tools. ConfigError if there is none."""
        try:
            return str(self.tokenizer.get_chat_template(None, tools))
        except ValueError:
            raise ConfigError("the tokenizer has no chat template") from None

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        kwargs: dict[str, Any] | None = None,
        spans: bool = False,
        first: int = 0,
    ) -> Rendered:
        """The text of a chat. first: the message with which spans begin to count.

        kwargs: variables for the template. Keys of a message whose value is None are left out, as transformers does.
        Raises ConfigError where the template refuses the chat, takes too long or needs too much memory.
        """
        reply = self.reply(
            self.source(tools), messages, tools=tools, documents=documents, kwargs=kwargs, spans=spans, first=first
        )
        if "error" in reply:
            raise ConfigError(f"the tokenizer's chat template refuses these messages: {reply['error']}")
        return Rendered(reply["text"], [(begin, end) for begin, end in reply["spans"]], reply["unclear"])

    def reply(self, template: str, messages: list[dict[str, Any]], ask: bool = False, **more: Any) -> dict[str, Any]:
        """The answer of `template_child`: the text of a chat by any template, or its "error".

        ask: whether the header of an answer follows. Raises ConfigError as `render`, except for a refusal.
        """
        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        request = {"template": template, "special": self.tokenizer.special_tokens_map, "messages": present, "ask": ask}
        try:
            line = json.dumps(request | more)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"the chat is no plain JSON: {error}") from None
        child = self.child = self.child or self._start()
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(line + "\n")
            child.stdin.flush()
            reply = child.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if reply:
            return dict(json.loads(reply))
        code = child.wait()
        self.child = None
        if code == -signal.SIGALRM:
            raise ConfigError(
                f"the tokenizer's chat template took more than {self.seconds} s for one chat and was stopped: look for "
                "a loop that does not end, or shorten the chat"
            )
        raise ConfigError(f"the process that renders chats ended with code {code}: its memory may have run out")

    def _start(self) -> subprocess.Popen[str]:
        limits = (self.seconds, self.megabytes, CHARACTERS)
        return subprocess.Popen(
            [sys.executable, "-P", str(CHILD), *(str(limit) for limit in limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
