"""A model's tokenizer, template and generation settings as facts, from a folder that transformers opens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.errors import ConfigError
from intaglio.formats.facts import CODE, GENERATION, TEMPLATE, TOKENIZER, Facts, compare_facts
from intaglio.formats.tally import Tally
from intaglio.formats.texts import CHATS, fixed_texts, with_specials
from intaglio.packed.assets import SETTINGS, load_tokenizer
from intaglio.packed.template import Renderer
from intaglio.plan.files import read_json

SPECIAL = ("bos", "eos", "unk", "pad")
SETTINGS_LEFT_OUT = ("transformers_version", "_from_model_config")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Speech:
    """The tokenizer, template and settings that stand between a model and text.

    tokenizer: transformers' own. templates: by name, a single one as "default". settings: of
    generation_config.json. end_ids: every token that ends an answer, by the settings, the config and the tokenizer.
    size: of the model's vocabulary; 0 where it does not matter. No text reaches placeholders beyond it.
    """

    folder: Path
    tokenizer: Any
    templates: dict[str, str]
    settings: Facts
    end_ids: tuple[int, ...]
    size: int = 0

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts its first token before a text."""
        return list(self.tokenizer("a")["input_ids"][:1]) == [self.tokenizer.bos_token_id]

    def texts(self) -> list[str]:
        """The fixed texts, and some with this tokenizer's special tokens."""
        pairs = zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True)
        known = [text for text, index in pairs if index < (self.size or len(self.tokenizer))]
        return [*fixed_texts(), *with_specials(known[:24])]

    def facts(self) -> Facts:
        """Ids of special tokens, and the tokens of each fixed text by its place."""
        ids = {f"{kind}_token_id": getattr(self.tokenizer, f"{kind}_token_id") for kind in SPECIAL}
        return ids | {"end tokens": sorted(self.end_ids), "a first token before each text": self.adds_bos}

    def tokens(self, texts: list[str], *, add_special: bool = True) -> list[list[int]]:
        """Token ids of each text."""
        encoded: list[list[int]] = self.tokenizer(texts, add_special_tokens=add_special)["input_ids"]
        return encoded


def read_speech(folder: Path, config: dict[str, Any]) -> Speech | None:
    """The tokenizer of a folder and what goes with it; None where it has no tokenizer.

    config: of the text model, whose end tokens hold where generation_config.json names none. Raises ConfigError for
    files that cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    tokenizer = load_tokenizer(folder)
    settings = read_settings(folder)
    said = settings.get("eos_token_id", config.get("eos_token_id"))
    ends = [*(said if isinstance(said, list) else [said]), tokenizer.eos_token_id]
    ids = tuple(dict.fromkeys(end for end in ends if end is not None))
    return Speech(folder, tokenizer, _templates(tokenizer), settings, ids, config.get("vocab_size") or 0)


def _templates(tokenizer: Any) -> dict[str, str]:
    found = tokenizer.chat_template
    if isinstance(found, list):
        found = {named["name"]: named["template"] for named in found}
    return found if isinstance(found, dict) else {"default": found} if found else {}


def read_settings(folder: Path) -> Facts:
    """Settings of generation_config.json, without its author; empty where there is none."""
    path = folder / SETTINGS
    said = read_json(path) if path.is_file() else {}
    return {key: value for key, value in said.items() if key not in SETTINGS_LEFT_OUT}


def plain_tokens(path: Path, texts: list[str], *, add_special: bool = True) -> list[list[int]]:
    """Tokens of each text by tokenizer.json alone, as runtimes read it that do not know transformers' classes."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=add_special)]


def compare_tokens(expected: list[list[int]], found: list[list[int]], texts: list[str], tally: Tally) -> None:
    """Count the texts, and note how many of them have other tokens."""
    tally.facts["texts"] += len(texts)
    wrong = [place for place, (mine, theirs) in enumerate(zip(expected, found, strict=True)) if mine != theirs]
    if wrong:
        first = wrong[0]
        tally.unlike_facts.append(
            f"{TOKENIZER}: {len(wrong)} of {len(texts)} fixed texts have other tokens, the first is "
            f"{texts[first][:40]!r}: {found[first][:8]}, the model's are {expected[first][:8]}"
        )


def compare_templates(expected: Speech, found: dict[str, str], tally: Tally) -> None:
    """Note each template that is missing, unknown, or writes one of the fixed chats otherwise."""
    for name in sorted(expected.templates.keys() | found.keys()):
        mine, theirs = expected.templates.get(name), found.get(name)
        tally.facts[TEMPLATE] += 1
        if mine is None or theirs is None:
            state = "is missing" if theirs is None else "is not the model's"
            tally.unlike_facts.append(f"{TEMPLATE}: the chat template {name!r} {state}")
        elif mine != theirs:
            tally.unlike_facts += _other_chats(expected, name, mine, theirs)


def _other_chats(speech: Speech, name: str, mine: str, theirs: str) -> list[str]:
    """A line that counts the fixed chats which two templates write differently; none if they agree."""
    try:
        with Renderer(speech.tokenizer) as renderer:
            wrong = sum(renderer.reply(mine, *chat) != renderer.reply(theirs, *chat) for chat in CHATS)
    except ConfigError as error:
        return [f"{TEMPLATE}: the chat template {name!r} is not the model's, word for word, and {error}"]
    said = f"{wrong} of {len(CHATS)} fixed chats are written otherwise"
    return [f"{TEMPLATE}: by the chat template {name!r} {said}"] if wrong else []


def compare_folder_speech(expected: Speech | None, folder: Path, config: dict[str, Any], tally: Tally) -> None:
    """Compare a folder's tokenizer, templates and settings, as transformers opens them, with the packed model's."""
    if expected is None:
        return
    for name in ("config.json", "tokenizer_config.json", SETTINGS, "processor_config.json"):
        found_code = [key for key in CODE if (folder / name).is_file() and key in read_json(folder / name)]
        tally.unlike_facts += [f"{name} has {key}, which runs code from this folder" for key in found_code]
    try:
        found = read_speech(folder, config)
    except ConfigError as error:
        tally.unlike_facts.append(f"{TOKENIZER}: {error}")
        return
    if found is None:
        tally.unlike_facts.append(f"{TOKENIZER}: missing")
        return
    compare_facts(TOKENIZER, expected.facts(), found.facts(), tally)
    texts = expected.texts()
    compare_tokens(expected.tokens(texts), found.tokens(texts), texts, tally)
    name = "vocabulary, merges and steps"
    compare_facts(TOKENIZER, {name: _backend(expected)}, {name: _backend(found)}, tally)
    compare_templates(expected, found.templates, tally)
    settings = {key: found.settings.get(key) for key in expected.settings.keys() | found.settings.keys()}
    compare_facts(GENERATION, {key: expected.settings.get(key) for key in settings}, settings, tally)


def _backend(speech: Speech) -> Facts:
    """Steps of the tokenizer as transformers has it, in the words of tokenizer.json."""
    found: Facts = json.loads(speech.tokenizer.backend_tokenizer.to_str())
    return {name: value for name, value in found.items() if name not in ("version", "truncation", "padding")}
