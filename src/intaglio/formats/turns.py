"""A chat template that only puts fixed words round each turn, and what Ollama would make of a model's template.

Ollama does not run templates in Jinja. For the architecture gemma4 it writes prompts with code of its own, whatever
the model's template is; for others it takes a template in Go from the Modelfile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from intaglio.errors import ConfigError
from intaglio.formats.facts import Facts
from intaglio.formats.speech import Speech
from intaglio.packed.template import Renderer

MARKS = ("first\u2060mark", "second\u2060mark", "third\u2060mark")  # contents that no template writes by itself
# The words that Ollama's own code (`Family.ollama_code`) puts round turns.
TURN = {"system": "system", "user": "user", "assistant": "model"}
GEMMA4 = {role: (f"<|turn>{name}\n", "<turn|>\n") for role, name in TURN.items()}
GEMMA4_ANSWERS = ("<|turn>model\n", "<|turn>model\n<|channel>thought\n<channel|>")  # the second of large models
GEMMA3 = {role: (f"<start_of_turn>{TURN[role]}\n", "<end_of_turn>\n") for role in ("user", "assistant")}
SAMPLING = {"temperature": 1.0, "top_p": 0.95, "top_k": 64}  # Google's, for a model that says nothing else


@dataclass(frozen=True)
class Turns:
    """The words of a template: before the first turn, round each role's content, and before an answer."""

    start: str
    words: dict[str, tuple[str, str]]
    answer: str

    def write(self, chat: list[dict[str, Any]], ask: bool) -> str:
        """A chat as text."""
        turns = [self.words[turn["role"]][0] + turn["content"] + self.words[turn["role"]][1] for turn in chat]
        return self.start + "".join(turns) + (self.answer if ask else "")

    def in_go(self) -> str:
        """The template as Ollama's Modelfile takes it, which puts the first token before it by itself."""
        kinds = [
            f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ end }}}}'
            for role, (before, after) in self.words.items()
        ]
        return "{{ range .Messages }}" + "".join(kinds) + "{{ end }}" + self.answer


def turns_of(speech: Speech, template: str) -> Turns | None:
    """The words of a template; None for one that does more than to put words round turns.

    Spaces at the ends of a turn do not count: most templates cut them off, and Ollama's cannot.
    """
    first, second, third = MARKS
    user, more = ({"role": "user", "content": mark} for mark in (first, third))
    answer, system = {"role": "assistant", "content": second}, {"role": "system", "content": third}
    chats = (([user], False), ([user], True), ([user, answer], False), ([user, answer, more], True))
    with Renderer(speech.tokenizer) as renderer:
        replies = [renderer.reply(template, *chat) for chat in (*chats, ([system, user], True))]
    one, asked, two, three, ruled = (reply.get("text", "") for reply in replies)
    try:
        before, after = one.split(first)
        closing = two.split(second)[1]
        opening = three.split(second)[1].split(third)[0].removeprefix(closing)
        words = {"user": (opening, after), "assistant": (two.split(second)[0].removeprefix(one), closing)}
        found = Turns(before.removesuffix(opening), words, asked.removeprefix(one))
        if not all(found.write(*chat) == text for chat, text in zip(chats, (one, asked, two, three), strict=True)):
            return None
        if words != GEMMA3:  # Ollama knows this one, which puts the system's words into the first turn
            head, tail = ruled.split(third)
            ruling = (head.removeprefix(found.start), tail.split(first)[0].removesuffix(opening))
            found = Turns(found.start, {"system": ruling, **words}, found.answer)
            if found.write([system, user], True) != ruled:
                return None
    except (ValueError, IndexError):
        return None
    plain = not any(odd in found.in_go().replace("{{ .Content }}", "") for odd in ('"""', "{%"))
    return (
        Turns(found.start.removeprefix(speech.tokenizer.bos_token or ""), found.words, found.answer) if plain else None
    )


def modelfile_facts(speech: Speech | None, code: str | None) -> Facts:
    """Lines of a Modelfile, so that Ollama talks to a model by the model's own template, stops and settings.

    code: `Family.ollama_code`. stop: texts of all end tokens. Raises ConfigError for a template that Ollama would not
    use.
    """
    if speech is None:
        return {"RENDERER": code, "PARSER": code, "TEMPLATE": None, "stop": []} | sampling(None)
    template = speech.templates.get("default")
    turns = turns_of(speech, template) if template else None
    where = f"{speech.folder}: the chat template"
    instead = "export it to gguf or lmstudio: llama.cpp and LM Studio use the template in the file"
    if template and code and not _is_gemma4(turns):
        raise ConfigError(f"{where} is not Gemma 4's, in whose form alone Ollama prompts {code}: {instead}")
    if template and not code and turns is None:
        raise ConfigError(f"{where} cannot be said in Ollama's language of templates: {instead}")
    own = turns.in_go() if turns is not None and code is None and turns.words != GEMMA3 else None
    stops = {speech.tokenizer.convert_ids_to_tokens(index) for index in speech.end_ids}
    stops |= {turns.words["assistant"][1].strip()} if turns is not None else set()  # what ends a turn ends an answer
    return {"RENDERER": code, "PARSER": code, "TEMPLATE": own, "stop": sorted(filter(None, stops))} | sampling(speech)


def sampling(speech: Speech | None) -> Facts:
    """Temperature, top-p and top-k of the model's settings, else Google's."""
    said = {} if speech is None else {name: speech.settings.get(name) for name in SAMPLING}
    return SAMPLING | {name: value for name, value in said.items() if value is not None}


def _is_gemma4(turns: Turns | None) -> bool:
    if turns is None or turns.start or turns.answer not in GEMMA4_ANSWERS:
        return False
    return all(GEMMA4.get(role) == words for role, words in turns.words.items())
