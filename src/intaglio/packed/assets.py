"""The files beside a model's weights, checked and copied: tokenizer, chat template, generation settings.

These files state many things twice, and every runtime reads another one of them. Where two of them contradict each
other, one runtime would speak otherwise than the next, so `check_assets` refuses them before anything is made of them.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from intaglio.errors import ConfigError
from intaglio.plan.family import text_config
from intaglio.plan.files import one_line, read_json, read_text, reading
from intaglio.plan.hub import TEXTS, find_model

TOKENIZER, SETTINGS, SPECIAL_TOKENS = "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"
TEMPLATE, PROCESSOR_TEMPLATE = "chat_template.jinja", "chat_template.json"
# Copied where present.
ASSETS = (
    *("tokenizer.json", "tokenizer.model", TOKENIZER, SPECIAL_TOKENS, "added_tokens.json"),
    *(TEMPLATE, PROCESSOR_TEMPLATE, SETTINGS),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
NAMED_TEMPLATES = "additional_chat_templates"  # a folder of them, beside chat_template.jinja
NUMBERS = {"temperature": math.inf, "top_p": 1.0, "top_k": math.inf, "min_p": 1.0, "repetition_penalty": math.inf}


def load_tokenizer(model_dir: str | Path) -> Any:
    """The folder's tokenizer, with the chat template of chat_template.json if no other file has one.

    ConfigError if there is none, it cannot be read, or it contradicts the files beside it.
    """
    from transformers import AutoTokenizer

    path = find_model(model_dir, files=TEXTS)
    check_assets(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(f"{path}: no usable tokenizer: {one_line(error)}") from error
    if not tokenizer.chat_template:
        tokenizer.chat_template = _object(path / PROCESSOR_TEMPLATE).get("chat_template")
    return tokenizer


def copy_assets(source: Path, target: Path) -> None:
    """Copy what belongs to a model beside its weights, as far as it is there and makes sense together.

    A chat template that only chat_template.json has, where processors look for it, is written to chat_template.jinja
    too, where tokenizers and runtimes do. Raises ConfigError as `check_assets` does, and for a link to a file
    outside of the model's folder: such a file is somebody's own, and would be published with the model. The hub's
    cache, whose folders are links, is no stranger.
    """
    check_assets(source)
    for name in ASSETS:
        if (source / name).is_file():
            shutil.copyfile(_own_file(source, name), target / name)
    if (source / NAMED_TEMPLATES).is_dir():
        (target / NAMED_TEMPLATES).mkdir(exist_ok=True)
        for template in (source / NAMED_TEMPLATES).glob("*.jinja"):
            shutil.copyfile(
                _own_file(source, f"{NAMED_TEMPLATES}/{template.name}"), target / NAMED_TEMPLATES / template.name
            )
    found = dict(_templates(target))
    if set(found) == {PROCESSOR_TEMPLATE}:
        (target / TEMPLATE).write_text(found[PROCESSOR_TEMPLATE], "utf-8")


def check_assets(folder: Path) -> None:
    """Raise ConfigError for files that are damaged or contradict each other, and name them."""
    with reading(folder, "tokenizer files cannot be read", "take all of them from one model"):
        files = {name: _object(folder / name) for name in (*ASSETS, "config.json") if name.endswith(".json")}
        _check_templates(folder)
        _check_settings(folder / SETTINGS, files[SETTINGS])
        known, texts = _tokens(folder / "tokenizer.json", files["tokenizer.json"]), _special_texts(files)
        if known:
            _check_texts(folder, files, known, texts)
        _check_ids(folder, files, known, texts)


def _check_texts(
    folder: Path, files: dict[str, dict[str, Any]], known: dict[Any, int], texts: dict[str, tuple[str, Any]]
) -> None:
    for kind, (file, text) in texts.items():
        if text not in known:
            raise ConfigError(f"{folder / file}: {kind}_token is {text!r}, which tokenizer.json does not have")
    for file, index, text in _stated_tokens(files):
        if known.get(text) != index:
            raise ConfigError(
                f"{folder / file}: says that token {index} is {text!r}, and tokenizer.json that it is "
                f"{known.get(text, 'none')}: take both files from one model"
            )


def _check_ids(
    folder: Path, files: dict[str, dict[str, Any]], known: dict[Any, int], texts: dict[str, tuple[str, Any]]
) -> None:
    size = text_config(files["config.json"]).get("vocab_size")
    for file, kind, index in _stated_ids(files):
        if type(index) is not int:
            raise ConfigError(f"{folder / file}: {kind} = {index!r}: expected a token's number or a list of them")
        if type(size) is int and not 0 <= index < size:
            raise ConfigError(f"{folder / file}: {kind} = {index}: expected a token of the model, which has {size}")
        name, text = texts.get("bos", ("", None))
        if kind == "bos_token_id" and index != known.get(text, index):
            raise ConfigError(
                f"{folder / file}: {kind} = {index}, but {name} says {text!r}, which is {known[text]}: set both to the "
                "token that begins a text"
            )


def _own_file(source: Path, name: str) -> Path:
    """A file of the model's folder, links followed; ConfigError for a link that leads out of it."""
    folder, file = source.resolve(), (source / name).resolve()
    cache = next((up.parent / "blobs" for up in folder.parents if up.name == "snapshots"), folder)
    if not file.is_relative_to(folder) and not file.is_relative_to(cache):
        raise ConfigError(
            f"{source / name}: is a link to {file}, outside of the model's folder: put a copy in its place if it "
            "belongs to the model"
        )
    return file


def _object(path: Path) -> dict[str, Any]:
    """A JSON object of a file, empty where there is none."""
    return read_json(path) if path.is_file() else {}


def _templates(folder: Path) -> Iterator[tuple[str, str]]:
    """Each file that has the default chat template, with its text."""
    if (folder / TEMPLATE).is_file():
        yield TEMPLATE, read_text(folder / TEMPLATE)
    for name in (TOKENIZER, PROCESSOR_TEMPLATE):
        said = _object(folder / name).get("chat_template")
        if isinstance(said, list):
            if not all(isinstance(one, dict) and {"name", "template"} <= one.keys() for one in said):
                raise ConfigError(f"{folder / name}: chat_template: expected a name and a template in each entry")
            said = next((one["template"] for one in said if one["name"] == "default"), None)
        if said is not None and not isinstance(said, str):
            raise ConfigError(f"{folder / name}: chat_template is {type(said).__name__}: expected text")
        if said:
            yield name, said


def _check_templates(folder: Path) -> None:
    found = dict(_templates(folder))
    for name, text in found.items():
        if text.startswith("\ufeff"):
            raise ConfigError(
                f"{folder / name}: begins with a byte order mark, which would stand before every chat: save it as "
                "UTF-8 without"
            )
    for name, text in list(found.items())[1:]:
        first = next(iter(found))
        if text.strip() != found[first].strip():
            raise ConfigError(
                f"{folder}: {first} and {name} have different chat templates, and each is read by some runtime: remove "
                "the one that is out of date"
            )


def _check_settings(path: Path, said: dict[str, Any]) -> None:
    for name, most in NUMBERS.items():
        value = said.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            bound = f" and at most {most:g}" if most < math.inf else ""
            raise ConfigError(f"{path}: {name} = {value!r}: expected a number of at least 0{bound}")


def _tokens(path: Path, said: dict[str, Any]) -> dict[Any, int]:
    """Numbers of all tokens of a tokenizer.json by their texts; empty where there is no such file."""
    if not said:
        return {}
    try:
        return dict(said["model"]["vocab"]) | {token["content"]: token["id"] for token in said["added_tokens"]}
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a tokenizer.json: {one_line(error)}") from None


def _special_texts(files: dict[str, dict[str, Any]]) -> dict[str, tuple[str, Any]]:
    """The file that names each of the tokens bos, eos, unk and pad, and the token's text."""
    found = {}  # where two files do, transformers takes special_tokens_map.json
    for kind in ("bos", "eos", "unk", "pad"):
        for file in (TOKENIZER, SPECIAL_TOKENS):
            token = files[file].get(f"{kind}_token")
            text = token.get("content") if isinstance(token, dict) else token
            if text is not None:
                found[kind] = file, text
    return found


def _stated_tokens(files: dict[str, dict[str, Any]]) -> Iterator[tuple[str, int, Any]]:
    """Numbers and texts of tokens, as older files beside tokenizer.json have them."""
    for text, index in files["added_tokens.json"].items():
        yield "added_tokens.json", index, text
    for number, token in (files[TOKENIZER].get("added_tokens_decoder") or {}).items():
        yield TOKENIZER, int(number), token.get("content") if isinstance(token, dict) else token


def _stated_ids(files: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    """Numbers of tokens in config.json and the settings: first and last tokens of a text, and suppressed tokens."""
    for file, said in (("config.json", text_config(files["config.json"])), (SETTINGS, files[SETTINGS])):
        for kind in ("bos_token_id", "eos_token_id", "suppress_tokens"):
            value = said.get(kind)
            for index in value if isinstance(value, list) else [value]:
                if index is not None:
                    yield file, kind, index
