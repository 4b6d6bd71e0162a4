"""Tokenizer, chat template and generation settings: files that contradict each other or the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intaglio.formats.speech import read_speech
from intaglio.packed.assets import load_tokenizer
from tests.support.strange import POINTER, SAME, Base, Input, file, judge, said, text
from tests.support.tiny import GEMMA4, TOKENIZER, make_checkpoint

TOKENS, CONFIG, MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
JINJA, SETTINGS = "chat_template.jinja", "generation_config.json"
TEMPLATE = (TOKENIZER / JINJA).read_text("utf-8")
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
OTHER_TEMPLATE, OTHER_BOS = "have different chat templates", "set both to the token that begins a text"
OUTSIDE, NO_ID = "expected a token of the model, which has 4096", "expected a token's number or a list of them"
Make = Callable[[Path], None]


def tokens(change: Callable[[dict[str, Any]], Any]) -> Make:
    def changed(found: str) -> str:
        tokenizer = json.loads(found)
        change(tokenizer)
        return json.dumps(tokenizer)

    return text(TOKENS, changed)


def decoder(number: int, content: str) -> Make:
    return said(CONFIG, added_tokens_decoder={str(number): {"content": content, "special": True}})


def only_in(name: str, content: Any) -> Make:
    """The template in this file alone."""

    def make(folder: Path) -> None:
        (folder / JINJA).unlink()
        said(name, chat_template=content)(folder)

    return make


def named_template(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("x")


TOKENIZERS: dict[str, Input] = {
    "bos is the padding": Input(said(CONFIG, bos_token="<pad>"), OTHER_BOS, "silent"),
    "bos is the padding, in the map": Input(file(MAP, {"bos_token": "<pad>"}), OTHER_BOS, "silent"),
    "the map agrees": Input(file(MAP, {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}), SAME),
    "bos is no token": Input(said(CONFIG, bos_token="<nobody>"), "which tokenizer.json does not have", "silent"),
    "eos of ChatML without its tokens": Input(said(CONFIG, eos_token="<|im_end|>"), "which tokenizer.json", "silent"),
    "no bos": Input(said(CONFIG, bos_token=None), SAME),
    "another eos": Input(said(CONFIG, eos_token="<turn|>"), SAME),
    "bos twice": Input(text(CONFIG, lambda t: t.rstrip()[:-1] + ', "bos_token": "<pad>"}'), "said twice", "silent"),
    "NaN tokens at most": Input(said(CONFIG, model_max_length=float("nan")), "NaN is no number", "silent"),
    "added tokens of another number": Input(file("added_tokens.json", {"<eos>": 7}), "take both files", "silent"),
    "added tokens that nobody has": Input(file("added_tokens.json", {"<new>": 4096}), "take both files", "silent"),
    "added tokens that agree": Input(file("added_tokens.json", {"<eos>": 1}), SAME),
    "a decoder of another text": Input(decoder(1, "<end>"), "take both files", "silent"),
    "a decoder with a new token": Input(decoder(4096, "<new>"), "take both files", "silent"),
    "a decoder of another number": Input(decoder(9, "<eos>"), "take both files", "silent"),
    "a decoder that agrees": Input(decoder(1, "<eos>"), SAME),
    "cuts texts off": Input(
        tokens(
            lambda t: t.update(
                truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
            )
        ),
        SAME,
    ),
    "another class": Input(said(CONFIG, tokenizer_class="LlamaTokenizerFast"), SAME),
    "code of somebody": Input(said(CONFIG, auto_map={"AutoTokenizer": ["x.Y", None]}), SAME),
    "a hole in the vocabulary": Input(
        tokens(lambda t: t["model"]["vocab"].pop(list(t["model"]["vocab"])[4000])), "no usable tokenizer"
    ),
    "no vocabulary": Input(tokens(lambda t: t["model"].pop("vocab")), "not a tokenizer.json"),
    "a pointer of git-lfs": Input(file(TOKENS, POINTER), "git lfs pull", "misleading"),
    "a byte order mark": Input(text(CONFIG, lambda t: t.encode("utf-8-sig")), "UTF-8 BOM"),
}

TEMPLATES: dict[str, Input] = {
    "another in tokenizer_config": Input(said(CONFIG, chat_template="{{ messages }}"), OTHER_TEMPLATE, "silent"),
    "the same in tokenizer_config": Input(said(CONFIG, chat_template=TEMPLATE), SAME),
    "another in a list": Input(
        said(CONFIG, chat_template=[{"name": "default", "template": "{{ messages }}"}]), OTHER_TEMPLATE, "silent"
    ),
    "another in chat_template.json": Input(
        file("chat_template.json", {"chat_template": "{{ messages }}"}), OTHER_TEMPLATE, "silent"
    ),
    "the same in chat_template.json": Input(file("chat_template.json", {"chat_template": TEMPLATE + "\n"}), SAME),
    "only in chat_template.json": Input(only_in("chat_template.json", TEMPLATE), SAME, "misleading"),
    "only in tokenizer_config": Input(only_in(CONFIG, TEMPLATE), SAME),
    "a list without names": Input(only_in(CONFIG, [{"template": "x"}]), "a name and a template in each", "misleading"),
    "a number": Input(only_in(CONFIG, 3), "chat_template is int: expected text", "silent"),
    "a byte order mark": Input(file(JINJA, "\ufeff" + TEMPLATE), "begins with a byte order mark", "silent"),
    "UTF-16": Input(file(JINJA, TEMPLATE.encode("utf-16")), "cannot be read as UTF-8"),
    "one more by name": Input(named_template, SAME),
    "empty": Input(file(JINJA, ""), SAME),
}


def settings(**values: Any) -> Make:
    return file(SETTINGS, values)


SETTINGS_FILES: dict[str, Input] = {
    "another end": Input(settings(eos_token_id=106), SAME),
    "two ends": Input(settings(eos_token_id=[1, 106]), SAME),
    "no end": Input(settings(eos_token_id=None), SAME),
    "an end that the model lacks": Input(settings(eos_token_id=[1, 9999]), OUTSIDE, "silent"),
    "an end below 0": Input(settings(eos_token_id=-1), OUTSIDE, "silent"),
    "an end as text": Input(settings(eos_token_id="1"), NO_ID),
    "ends in a list of lists": Input(settings(eos_token_id=[[1]]), NO_ID),
    "another start": Input(settings(bos_token_id=5), OTHER_BOS, "silent"),
    "the same start": Input(settings(bos_token_id=2), SAME),
    "another padding": Input(settings(pad_token_id=7), SAME),
    "config.json ends elsewhere": Input(said("config.json", eos_token_id=[1, 9999]), OUTSIDE, "silent"),
    "config.json starts elsewhere": Input(said("config.json", bos_token_id=5), OTHER_BOS, "silent"),
    "a suppressed token that the model lacks": Input(settings(suppress_tokens=[9999]), OUTSIDE, "silent"),
    "suppressed tokens as text": Input(settings(suppress_tokens="a"), NO_ID, "silent"),
    "a temperature below 0": Input(settings(temperature=-1), "temperature = -1: expected a number", "silent"),
    "a temperature as text": Input(settings(temperature="1"), "temperature = '1': expected a number", "silent"),
    "temperature 0": Input(settings(temperature=0.0, do_sample=True), SAME),
    "a share above 1": Input(settings(top_p=5.0), "at least 0 and at most 1", "silent"),
    "temperature NaN": Input(settings(temperature=float("nan")), "NaN is no number", "silent"),
    "temperature twice": Input(file(SETTINGS, '{"temperature": 1.0, "temperature": 0.5}'), "said twice", "silent"),
    "cut off": Input(file(SETTINGS, '{"temp'), "not valid JSON"),
    "keys of a later release": Input(settings(foo=1), SAME),
    "code of somebody": Input(settings(custom_generate="x"), SAME),
}

KINDS = {"tokenizers": TOKENIZERS, "templates": TEMPLATES, "settings": SETTINGS_FILES}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base.of(make_checkpoint(tmp_path_factory.mktemp("strange") / "base", GEMMA4))


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, inputs in KINDS.items() for name in inputs])
def test_speech(kind: str, name: str, base: Base, tmp_path: Path) -> None:
    judge(KINDS[kind][name], base, tmp_path)
    if kind == "templates" and KINDS[kind][name].right == SAME and name != "empty":
        for folder in (tmp_path / "model", tmp_path / "assets"):  # where chats are read, and what is published
            assert load_tokenizer(folder).get_chat_template().strip() == TEMPLATE.strip()
    if name == "two ends":
        speech = read_speech(tmp_path / "model", {})
        assert speech is not None and speech.end_ids == (1, 106)
