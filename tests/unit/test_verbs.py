"""Every verb is a public function, and docs/python.md says which; their parameters are named alike."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import intaglio
from intaglio.cli import app

DOCS = Path(__file__).parents[2] / "docs"
TABLE = {
    verb: re.findall(r"api\.md#intaglio\.(\w+)", functions)
    for verb, functions in re.findall(r"^\| `([\w-]+)` \| (.*) \|$", (DOCS / "python.md").read_text("utf-8"), re.M)
}
COMMANDS: dict[str, typing.Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

PRINTED = {"as_json", "html", "tensors", "every"}  # how the command line shows what the function returns
GIVEN = {  # options that Python gives otherwise, or by another name
    "overrides": "recipe",  # Recipe.load takes both
    "eval_tokens": "tokens",
    "written_tokens": "tokens",
    "prompt": "prompts",
    "budget": "budget_bytes",
    "source": "path",
    "everything": "metadata_bytes",  # survey_family
}
OF_VERB = {  # the same, of one verb
    ("chat", "context"): "context_tokens",
    ("eval", "context"): "context_tokens",
    ("report", "context"): "context_tokens",
    ("data", "model"): "tokenizer",
    ("data", "tokens"): "max_tokens",
    ("demo", "drafter"): "out",  # run_demo_drafter
    ("export", "text_only"): "packed",  # PackedModel.text_only
    ("plan", "replace"): "model",  # of the page
} | {("export", name): "options" for name in ("draft", "python", "context", "transformers_js")}
ONLY_PYTHON = {
    "progress",
    "on_tensor",
    "on_start",
    "on_text",
    "device",
    "samples",
    "sample_tokens",
    "window",
    "top_clusters",
    "folder",
}
ONLY_PYTHON |= {
    "asking",
    "evaluation",
    "options",
    "wishes",
    "texts",
    "shape",
    "packed",
}  # "packed" of finetune is the model
SETTINGS = {
    intaglio.Asking,
    intaglio.Evaluation,
    intaglio.Options,
    intaglio.Wishes,
    intaglio.Texts,
    intaglio.Shape,
    intaglio.Source,
}


def kinds(hint: typing.Any) -> Iterator[typing.Any]:
    """The types of a union."""
    arguments = typing.get_args(hint)
    yield from (kind for argument in arguments if not isinstance(argument, list) for kind in kinds(argument))
    if not arguments:
        yield hint


def fields(hint: typing.Any) -> set[str]:
    """Names of the fields of settings, and of settings in them."""
    found = set()
    for group in {kind for kind in kinds(hint) if isinstance(kind, type)} & SETTINGS:
        hints = typing.get_type_hints(group)
        found |= {name for field in dataclasses.fields(group) for name in {field.name} | fields(hints[field.name])}
    return found


def parameters(name: str) -> dict[str, set[str]]:
    """The parameters of a function, each with the fields that it has where it is settings."""
    function = getattr(intaglio, name)
    hints = typing.get_type_hints(function, localns={"Tokenizer": object})
    return {parameter: fields(hints[parameter]) for parameter in inspect.signature(function).parameters}


def test_the_table_has_every_verb_and_only_public_functions() -> None:
    assert set(TABLE) == set(COMMANDS)
    assert {name for functions in TABLE.values() for name in functions} <= set(intaglio.__all__)


@pytest.mark.parametrize("verb", TABLE)
def test_parameters_of_verb_and_function_are_named_alike(verb: str) -> None:
    functions = [parameters(name) for name in TABLE[verb]]
    own = {parameter.removesuffix("_dir") for function in functions for parameter in function}
    known = own | {field for function in functions for fields in function.values() for field in fields}
    options = {option.name for option in COMMANDS[verb].params} - PRINTED - {"help"}
    options = {option.removesuffix("_dir") for option in options}
    said = {option if option in known else OF_VERB.get((verb, option), GIVEN.get(option, option)) for option in options}
    assert said <= known, "options without a parameter"
    assert own <= said | ONLY_PYTHON, "parameters without an option"


@pytest.mark.parametrize("name", [name for name in intaglio.__all__ if name[0].islower()])
def test_a_path_may_be_text(name: str) -> None:
    hints = typing.get_type_hints(getattr(intaglio, name), localns={"Tokenizer": object, "PreTrainedModel": object})
    hints.pop("return", None)
    assert not [parameter for parameter, hint in hints.items() if Path in kinds(hint) and str not in kinds(hint)]


def test_the_reference_has_every_public_name() -> None:
    listed = re.findall(r"^::: intaglio\.(\w+)$", (DOCS / "api.md").read_text("utf-8"), re.M)
    assert sorted(listed) == sorted(intaglio.__all__)
