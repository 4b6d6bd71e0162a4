"""Documents out of records: text, a prompt with its completion, or a chat that goes through the template.

{"text": ...}                          plain text
{"prompt": ..., "completion": ...}     two strings, or two lists of messages
{"messages": [...]}                    a chat; with tools, documents, chat_template_kwargs
{"conversations": [...]}               a chat as ShareGPT writes it; with system
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from reprlib import Repr
from typing import Any, NamedTuple

from intaglio.errors import ConfigError, CorpusError
from intaglio.packed.template import CHARACTERS, Renderer
from intaglio.plan.files import once
from intaglio.train.data.reading import Reading
from intaglio.train.data.sources import ROLES

Spans = list[tuple[int, int]]

CHATS = ("messages", "conversations", "conversation")
BESIDE_CHAT = ("tools", "documents", "chat_template_kwargs", "system")
KEYS = (*CHATS, *BESIDE_CHAT, "prompt", "completion", "text")
EXPECTED = "text, messages, conversations, or prompt and completion"
SPEAKERS = ("system", "developer", "user", "assistant", "tool")
# Names that ShareGPT and others give them.
OTHER_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant"}
OTHER_NAMES |= {"function_call": "assistant", "function_response": "tool", "function": "tool", "observation": "tool"}
BESIDE_CONTENT = ("tool_calls", "tool_responses", "reasoning", "reasoning_content", "thinking")
RENDERERS_OWN = ("messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message")
# Columns that others keep such things in, for advice.
LIKE_TEXT = ("content", "body", "article", "document", "passage", "story", "page_content", "code")
LIKE_CHATS = ("chat", "dialog", "dialogue", "turns", "history", "conversation_history")
LIKE_PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input")
LIKE_COMPLETIONS = ("completion", "response", "output", "answer", "chosen", "solution", "target")

brief = Repr()
brief.maxstring = brief.maxother = 60


class Document(NamedTuple):
    """One document.

    spans: parts of it that count in the loss where only an assistant's words do. ends: whether eos belongs behind it.
    """

    text: str
    spans: Spans
    ends: bool


class Reader:
    """Turns records into documents and keeps the record of it.

    columns: of the source, by role. spans: whether to find out what an assistant wrote.
    """

    def __init__(self, renderer: Renderer, columns: Mapping[str, str], reading: Reading, *, spans: bool):
        self.renderer, self.reading, self.spans = renderer, reading, spans
        self.role_of = {column: role for role, column in columns.items()}

    def columns(self, names: list[str], where: str) -> list[str]:
        """The columns to read of those that there are. CorpusError if none has text."""
        known = [name for name in names if self.role_of.get(name, name) in KEYS]
        if not usable({self.role_of.get(name, name) for name in known}):
            raise CorpusError(f"{where}: got the columns {_listed(names)}: {advice(names)}")
        self.reading.unused.update(name for name in names if name not in known)
        return known

    def document(self, record: Any, where: str) -> Document | None:
        """The document of a record; None if it has no text."""
        if not isinstance(record, dict):
            raise CorpusError(f"{where}: got {type(record).__name__}: expected an object with {EXPECTED}")
        record = {self.role_of.get(key, key): value for key, value in record.items()}
        if not usable(record):
            raise CorpusError(f"{where}: got the keys {_listed(record)}: {advice(list(record))}")
        there = {key for key, value in record.items() if value is not None and value != "" and value != []}
        chat = next((key for key in CHATS if key in there), None)
        used: tuple[str, ...] = ("text",)
        document = None
        if chat is not None:
            used = (chat, *BESIDE_CHAT)
            document = self._chat(_messages(record[chat], where), record, where)
        elif {"prompt", "completion"} <= there:
            used = ("prompt", "completion", *BESIDE_CHAT)
            document = self._completion(record, where)
        elif "text" in there:
            text = checked(record["text"], "text", where)
            document = Document(text, [], ends=True) if text.strip() else None
        self.reading.unused.update(key for key in there if key not in used)
        if document is None:
            self.reading.empty.append(where)
        return document

    def _completion(self, record: dict[str, Any], where: str) -> Document | None:
        prompt, completion = record["prompt"], record["completion"]
        head, tail = _parsed(prompt), _parsed(completion)
        # strings that are JSON by chance, such as numbers to be added, stay strings
        if isinstance(prompt, list) or (_is_chat(head) and _is_chat(tail)):
            head = _messages(head, where)
            return self._chat(head + _messages(tail, where), record, where, first=len(head))
        prompt, completion = checked(prompt, "prompt", where), checked(completion, "completion", where)
        text = prompt + completion
        return Document(text, [(len(prompt), len(text))], ends=True) if text.strip() else None

    def _chat(self, messages: list[Any], record: dict[str, Any], where: str, first: int = 0) -> Document | None:
        if record.get("system"):
            messages = [{"role": "system", "content": record["system"]}, *messages]
            first += bool(first)
        messages = [_message(message, where) for message in messages]
        if any(_is_empty(message) for message in messages):
            return None
        beside = {key: _parsed(record.get(key)) or None for key in ("tools", "documents", "chat_template_kwargs")}
        tools, documents, kwargs = beside.values()
        for key, value in (("tools", tools), ("documents", documents)):
            if value is not None and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
                raise CorpusError(f"{where}: {key} is {brief.repr(value)}: expected a list of objects")
        if kwargs is not None and (not isinstance(kwargs, dict) or set(kwargs) & set(RENDERERS_OWN)):
            raise CorpusError(
                f"{where}: chat_template_kwargs is {brief.repr(kwargs)}: expected an object of the template's own "
                f"variables, without {', '.join(RENDERERS_OWN)}"
            )
        try:
            source = self.renderer.source(tools)
        except ConfigError as error:
            advice = "give text or prompt and completion, or add a chat_template.jinja to the model's folder"
            raise CorpusError(f"{where}: messages, but {error}: {advice}") from None
        _check_speakers(messages, source, where)
        self.reading.unused.update(_unread(source, messages, beside))
        try:
            rendered = self.renderer.render(
                messages, tools=tools, documents=documents, kwargs=kwargs, spans=self.spans, first=first
            )
        except ConfigError as error:
            raise CorpusError(f"{where}: {error}") from None
        self.reading.unclear += rendered.unclear
        self.reading.chats += bool(rendered.text.strip())
        text = checked(rendered.text, "the chat", where)
        return Document(text, rendered.spans, ends=False) if text.strip() else None


def usable(names: Iterable[str]) -> bool:
    """Whether a record with these keys may have text."""
    names = set(names)
    return "text" in names or not names.isdisjoint(CHATS) or {"prompt", "completion"} <= names


def advice(names: list[Any]) -> str:
    """Advice for a source whose columns have other names."""
    lower = {str(name).lower(): str(name) for name in names}  # only names in the lists below are shown

    def first(likely: tuple[str, ...]) -> str | None:
        return next((lower[name] for name in likely if name in lower), None)

    chat, text = first(LIKE_CHATS), first(LIKE_TEXT)
    prompt, completion = first(LIKE_PROMPTS), first(LIKE_COMPLETIONS)
    options = []
    if chat:
        options.append(f"--column messages={chat}")
    if prompt and completion:
        pair = (("prompt", prompt), ("completion", completion))
        options.append(" ".join(f"--column {role}={name}" for role, name in pair if role != name))
    if text:
        options.append(f"--column text={text}")
    name_it = " or ".join(options) or f"--column ROLE=NAME, with a ROLE of {', '.join(ROLES)}"
    return f"expected {EXPECTED}: name what to read, with {name_it}"


def _listed(names: Iterable[Any]) -> str:
    """Names of columns on one line; a damaged file may have anything there."""
    return " ".join(", ".join(str(name) for name in names).split())[:300] or "none"


def checked(text: Any, name: str, where: str) -> str:
    """A string of valid Unicode, and not too long; CorpusError for everything else."""
    if not isinstance(text, str):
        raise CorpusError(f"{where}: {name} is of type {type(text).__name__}: expected a string")
    if len(text) > CHARACTERS:
        raise CorpusError(f"{where}: {name} has {len(text):,} characters: expected {CHARACTERS:,} at most: divide it")
    if re.search("[\ud800-\udfff]", text):
        raise CorpusError(f"{where}: the text has half of a surrogate pair: expected valid Unicode: remove it")
    return text


def _parsed(value: Any) -> Any:
    """Lists and objects that a column holds as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value, object_pairs_hook=once)
        except (ValueError, RecursionError):
            return value
    return value


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) and one.keys() & {"role", "from"} for one in value)


def _messages(value: Any, where: str) -> list[Any]:
    value = _parsed(value)
    if not isinstance(value, list) or not value:
        raise CorpusError(f"{where}: messages is {brief.repr(value)}: expected a list of messages")
    return value


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message as templates read it: role, content, tool calls with their arguments as objects."""
    if not isinstance(message, dict):
        raise CorpusError(f"{where}: got message {brief.repr(message)}: expected an object with role and content")
    for name, other in (("role", "from"), ("content", "value")):
        said = [OTHER_NAMES.get(str(value), value) for key in (name, other) if (value := message.get(key)) is not None]
        if len(said) == 2 and said[0] != said[1]:
            raise CorpusError(f"{where}: got message {brief.repr(message)}: {name} and {other} differ: leave one out")
    found = {key: value for key, value in message.items() if value is not None and key not in ("from", "value")}
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str):
        raise CorpusError(f"{where}: got message {brief.repr(message)}: expected strings role and content in it")
    found |= {"role": OTHER_NAMES.get(role, role), "content": content}
    if role == "function_call" and isinstance(content, str):
        calls = _parsed(content)
        calls = calls if isinstance(calls, list) else [calls]
        found |= {"content": None, "tool_calls": [{"type": "function", "function": call} for call in calls]}
    if calls := _parsed(found.pop("tool_calls", None)):
        found["tool_calls"] = [_tool_call(call, where) for call in _list(calls, where)]
    if not {"content", "value"} & message.keys() and (odd := found.keys() - {"role", "content", *BESIDE_CONTENT}):
        named = ", ".join(sorted(map(str, odd)))
        raise CorpusError(f"{where}: got message {brief.repr(message)}: it has {named} and no content: rename that")
    if isinstance(content, list):
        _check_parts(content, where)
    elif not (content is None or isinstance(content, str) or (role == "tool" and isinstance(content, dict))):
        raise CorpusError(
            f"{where}: got message {brief.repr(message)}: expected strings role and content in it, or content in parts"
        )
    return found


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise CorpusError(f"{where}: tool_calls is {brief.repr(value)}: expected a list")
    return value


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object: OpenAI's format has them as JSON text, templates read the object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise CorpusError(f"{where}: got tool call {brief.repr(call)}: expected a function with a name and arguments")
    named = function | {"arguments": _parsed(function.get("arguments") or {})}
    return {**call, "function": named} if "function" in call else {"type": "function", "function": named}


def _check_parts(parts: list[Any], where: str) -> None:
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            continue
        if kind is not None and kind != "text":
            raise CorpusError(f"{where}: content has a part of type {kind!r}: only text is learned: remove such rows")
        raise CorpusError(f"{where}: got part {brief.repr(part)}: expected {{'type': 'text', 'text': ...}}")


def _is_empty(message: dict[str, Any]) -> bool:
    """Whether nobody says anything here."""
    return message["content"] is None and not any(message.get(key) for key in BESIDE_CONTENT)


def _check_speakers(messages: list[dict[str, Any]], source: str, where: str) -> None:
    for message in messages:
        role = message["role"]
        if role not in SPEAKERS and not re.search(rf"['\"]{re.escape(role)}['\"]", source):
            raise CorpusError(
                f"{where}: a message is by {role[:60]!r}, whom the chat template does not know: expected one of "
                f"{', '.join(SPEAKERS)}: rename it"
            )


def _unread(source: str, messages: list[dict[str, Any]], beside: dict[str, Any]) -> set[str]:
    """Keys of a chat that the template never mentions."""
    keys = {key for message in messages for key, value in message.items() if value is not None and key != "content"}
    keys |= {key for key in ("tools", "documents") if beside[key]} | set(beside["chat_template_kwargs"] or {})
    unread = {key for key in keys if not re.search(rf"\b{re.escape(key)}\b", source)}
    return {f"{key} (not in the chat template)" for key in unread}
