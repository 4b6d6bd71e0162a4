"""Renders chats by a checkpoint's template, in a process of its own: a template may loop for ever or fill the memory.

`packed.template` starts this file by its path. It reads one JSON request a line from stdin and answers with one JSON
line on stdout. It imports nothing of intaglio, so that it starts fast. The kernel ends the process when a request takes
longer than its limit, and refuses memory beyond its limit.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from typing import Any

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
REASONING = ("reasoning", "reasoning_content", "thinking")
SENTINEL = "\ue000\ue001"  # private use: no text of an assistant begins so


class Template:
    """One chat template with everything that it is given beside the messages."""

    def __init__(self, request: dict[str, Any]):
        from transformers.utils.chat_template_utils import render_jinja_template

        self.render_one: Any = render_jinja_template
        self.source: str = request["template"]
        self.beside = {**request["special"], **(request.get("kwargs") or {})}
        self.beside |= {name: request.get(name) for name in ("tools", "documents")}
        self.beside["add_generation_prompt"] = request["ask"]

    def render(self, messages: list[dict[str, Any]], *, tracked: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of a chat, and with `tracked` the spans of its {% generation %} blocks."""
        texts, spans = self.render_one(
            [messages], chat_template=self.source, return_assistant_tokens_mask=tracked, **self.beside
        )
        return texts[0], spans[0] if tracked else []

    def attempt(self, messages: list[dict[str, Any]]) -> str | None:
        """The text of a chat that the template may refuse: then None."""
        try:
            return self.render(messages)[0]
        except MemoryError:
            raise
        except Exception:
            return None

    def reads_parts(self) -> bool:
        """Whether content in parts comes out as the same content in one string does."""
        part = [{"type": "text", "text": SENTINEL}]
        whole, parts = (self.attempt([{"role": "user", "content": content}]) for content in (SENTINEL, part))
        return whole is not None and whole == parts


def answer(request: dict[str, Any], limit: int) -> dict[str, Any]:
    """The text of a request's chat; with `spans` also the parts of it that its assistant wrote."""
    template = Template(request)
    messages = request["messages"]
    if any(isinstance(message.get("content"), list) for message in messages) and not template.reads_parts():
        messages = [message | {"content": joined(message.get("content"))} for message in messages]
    wanted, first = request.get("spans", False), request.get("first", 0)
    tracked = bool(wanted and GENERATION.search(template.source))
    text, spans = template.render(messages, tracked=tracked)
    if len(text) > limit:
        raise ValueError(f"it wrote {len(text):,} characters, and {limit:,} are allowed")
    unclear = 0
    if wanted and not tracked:
        found = list(assistant_spans(template, messages, text))
        spans, unclear = [span for span in found if span is not None], found.count(None)
    if first:  # the messages before are a prompt, which does not count
        begin = common(template.attempt(messages[:first]) or "", text)
        spans = [span for span in spans if span[0] >= begin]
    return {"text": text, "spans": spans, "unclear": unclear}


def joined(content: Any) -> Any:
    """Content in one string, for templates that do not read a list of parts."""
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content


def assistant_spans(template: Template, messages: list[Any], text: str) -> Iterator[tuple[int, int] | None]:
    """Text of each assistant turn, as a span of `text` with the token that ends the turn; None where it is unclear.

    Templates without {% generation %} do not say it, so the chat is rendered again: with a sentinel in the turn's
    place, which shows where its own words begin, and cut off behind the turn, which shows where they end.
    """
    for at, message in enumerate(messages):
        if message.get("role") == "assistant":
            begin = turn_begin(template, messages, at, text)
            end = None if begin is None else turn_end(template, messages, at, text, begin)
            if begin is None or end is None:
                yield None
            else:
                yield begin, begin + len(text[begin:end].rstrip())


def turn_begin(template: Template, messages: list[Any], at: int, text: str) -> int | None:
    """The position where the words of turn `at` begin, behind its header."""
    marked = with_sentinel(template, messages, at)
    if marked is None:
        return None
    header = marked.index(SENTINEL)
    begin = common(marked[:header], text)
    if begin == header:
        return begin
    # The header itself depends on the turn, as an empty thought does. It must begin where the turn before ended.
    before = template.attempt(messages[:at]) if at else ""
    return begin if before is not None and text.startswith(before) and begin >= len(before) else None


def turn_end(template: Template, messages: list[Any], at: int, text: str, begin: int) -> int | None:
    """The position where turn `at` ends, its end token included."""
    plain = [{key: value for key, value in message.items() if key not in REASONING} for message in messages]
    for variant in (messages, plain):  # templates leave thoughts out of turns that are not the last
        cut = template.attempt(variant[: at + 1])
        if cut is not None and text.startswith(cut) and len(cut) >= begin:
            return len(cut)
    alone = with_sentinel(template, messages[: at + 1], at)
    footer = "" if alone is None else alone.partition(SENTINEL)[2]
    following = with_sentinel(template, messages, at + 1) if at + 1 < len(messages) else None
    if following is not None and footer:
        stop = common(following.partition(SENTINEL)[0], text)
        end = text.rfind(footer, begin, stop)
        if end >= 0:
            return end + len(footer)
    if cut is None:
        return None
    end = common(cut, text)  # the turn goes on in the next, or a footer that ends the chat is missing
    opened = text.rfind("<", begin, end)
    if opened >= 0 and ">" not in text[opened:end]:  # two tags that begin alike
        end = opened
    return end if end > begin and footer.endswith(cut[end:]) else None


def with_sentinel(template: Template, messages: list[Any], at: int) -> str | None:
    """The chat with a sentinel as the words of turn `at`; None if the template does not write it."""
    changed = [*messages[:at], {"role": messages[at]["role"], "content": SENTINEL}, *messages[at + 1 :]]
    marked = template.attempt(changed)
    return marked if marked is not None and SENTINEL in marked else None


def common(one: str, other: str) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def bound_memory(megabytes: int) -> None:
    """Let the process have so much more memory than it has now."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        bound = now + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    except (ImportError, OSError, ValueError):
        return  # a system that cannot bound it; the time limit is still there


def main(seconds: int, megabytes: int, limit: int) -> None:
    """Answer requests until stdin ends. The default action of SIGALRM ends the process, whatever it is doing."""
    import transformers.utils.chat_template_utils  # noqa: F401

    bound_memory(megabytes)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        signal.alarm(seconds)
        try:
            reply = json.dumps(answer(json.loads(line), limit))
        except MemoryError:
            reply = json.dumps({"error": f"it needs more than {megabytes} MB of memory"})
        except Exception as error:
            reply = json.dumps({"error": " ".join(str(error).split())[:400] or type(error).__name__})
        signal.alarm(0)
        print(reply, flush=True)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
