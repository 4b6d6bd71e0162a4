"""Folders around a GGUF file: Ollama's and LM Studio's. Neither program is run: what is written is parsed."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from intaglio.errors import ConfigError, OutputError
from intaglio.formats import turns
from intaglio.formats.gguf.read_bundles import parse_modelfile
from intaglio.formats.gguf.write import export_gguf
from intaglio.formats.gguf.write_bundles import export_lmstudio, export_ollama, modelfile
from intaglio.formats.verify import verify
from intaglio.packed.model import PackedModel
from intaglio.packed.template import Renderer
from tests.support.cases import Case
from tests.support.corpora import ENDLESS


def test_a_modelfile_names_all_that_ollama_needs(gemma4: Case, tmp_path: Path) -> None:
    export_ollama(gemma4.packed, tmp_path / "ollama", gguf=gemma4.gguf)
    assert parse_modelfile(tmp_path / "ollama" / "Modelfile") == {
        "FROM": "./model.gguf",
        "RENDERER": "gemma4",
        "PARSER": "gemma4",
        "stop": ["<eos>", "<turn|>"],
        "temperature": "1.0",
        "top_p": "0.95",
        "top_k": "64",
    }
    assert verify(gemma4.packed, tmp_path / "ollama").exact


def test_the_models_own_sampling_settings_are_taken(packed_copy: PackedModel) -> None:
    path = packed_copy.path / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.7, "top_k": 20}))
    assert "temperature 0.7\nPARAMETER top_p 0.95\nPARAMETER top_k 20\n" in modelfile(packed_copy)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        modelfile(packed_copy)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA3_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(first='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.first = m.content + '\n\n' %}{% else %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ ns.first }}{% set ns.first = '' %}{{ m.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.fixture
def gemma3_copy(cases: dict[str, Case], tmp_path: Path) -> PackedModel:
    """A packed Gemma 3 that a test may change."""
    return PackedModel.open(shutil.copytree(cases["gemma3"].packed.path, tmp_path / "gemma3"))


def test_a_template_of_words_round_turns_is_written_in_ollamas_language(
    cases: dict[str, Case], gemma3_copy: PackedModel, tmp_path: Path
) -> None:
    (gemma3_copy.path / "chat_template.jinja").write_text(CHATML)
    export_ollama(gemma3_copy, tmp_path / "o", gguf=None)
    found = parse_modelfile(tmp_path / "o" / "Modelfile")
    assert (
        '{{ if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}' in found["TEMPLATE"]
    )
    assert found["TEMPLATE"].endswith("{{ end }}<|im_start|>assistant\n")
    assert found["stop"] == ["<eos>", "<|im_end|>"] and "RENDERER" not in found
    assert verify(gemma3_copy, tmp_path / "o").exact


def test_ollama_knows_gemma3s_own_template(gemma3_copy: PackedModel) -> None:
    (gemma3_copy.path / "chat_template.jinja").write_text(GEMMA3_TEMPLATE)
    text = modelfile(gemma3_copy)
    assert "RENDERER" not in text and "TEMPLATE" not in text and 'PARAMETER stop "<end_of_turn>"' in text


def test_a_template_that_ollama_would_not_use_is_refused(
    packed_copy: PackedModel, gemma3_copy: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes prompts of the architecture gemma4 in one form, and has no Jinja."""
    (packed_copy.path / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(ConfigError, match=r"in whose form alone Ollama prompts gemma4: export it to gguf"):
        export_ollama(packed_copy, tmp_path / "o")
    (gemma3_copy.path / "chat_template.jinja").write_text("{{ messages[-1].content | upper }}")
    with pytest.raises(ConfigError, match="cannot be said in Ollama's language"):
        export_ollama(gemma3_copy, tmp_path / "o")
    monkeypatch.setattr(turns, "Renderer", partial(Renderer, seconds=1))
    (gemma3_copy.path / "chat_template.jinja").write_text(ENDLESS)
    with pytest.raises(ConfigError, match="took more than 1 s for one chat and was stopped"):
        export_ollama(gemma3_copy, tmp_path / "o")
    assert not (tmp_path / "o").exists()
    export_gguf(packed_copy, tmp_path / "x.gguf")  # what the message advises
    assert verify(packed_copy, tmp_path / "x.gguf").exact


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", "true", '"hot"'])
def test_settings_that_are_no_numbers_are_refused(packed_copy: PackedModel, value: str) -> None:
    (packed_copy.path / "generation_config.json").write_text(f'{{"temperature": {value}}}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: (temperature = |not valid JSON.* is no number)"):
        modelfile(packed_copy)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("temperature 1.0", "temperature nan", "template: temperature is 'nan', the model's is 1.0"),
        ("temperature 1.0", "temperature 0.1", "template: temperature is 0.1"),
        ('PARAMETER stop "<turn|>"\n', "", "template: stop is"),
        ("RENDERER gemma4", "RENDERER qwen3-coder", "template: RENDERER is 'qwen3-coder'"),
        ("PARSER gemma4\n", 'PARSER gemma4\nTEMPLATE """{{ .Prompt }}"""\n', "template: TEMPLATE is"),
        ("PARSER gemma4\n", "PARSER gemma4\nPARAMETER num_ctx 16\n", "template: num_ctx is '16'"),
    ],
)
def test_a_modelfile_that_says_something_else_is_noticed(
    gemma4: Case, tmp_path: Path, old: str, new: str, said: str
) -> None:
    export_ollama(gemma4.packed, tmp_path / "o", gguf=gemma4.gguf)
    path = tmp_path / "o" / "Modelfile"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    found = verify(gemma4.packed, tmp_path / "o")
    assert not found.exact and said in found.summary()


@pytest.mark.parametrize("name", ["../elsewhere.gguf", "{absolute}", "link.gguf"])
def test_a_modelfile_names_files_of_its_own_folder_alone(gemma4: Case, tmp_path: Path, name: str) -> None:
    folder, elsewhere = tmp_path / "o", tmp_path / "elsewhere.gguf"
    folder.mkdir()
    shutil.copyfile(gemma4.gguf, elsewhere)
    (folder / "link.gguf").symlink_to(elsewhere)
    (folder / "Modelfile").write_text(f"FROM {name.format(absolute=elsewhere)}\n")
    with pytest.raises(ConfigError, match="which is not in this folder"):
        verify(gemma4.packed, folder)


@pytest.mark.parametrize(
    "text", ["RENDERER gemma4\n", "FROM a.gguf\nFROM b.gguf\n", "FROM a.gguf\nRUN rm\n", "FROM a b\n", ""]
)
def test_a_malformed_modelfile_is_refused(gemma4: Case, tmp_path: Path, text: str) -> None:
    (tmp_path / "Modelfile").write_text(text)
    with pytest.raises(ConfigError, match="Modelfile"):
        verify(gemma4.packed, tmp_path)


def test_a_modelfile_whose_model_is_missing(gemma4: Case, tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_text("FROM ./other.gguf\n")
    with pytest.raises(ConfigError, match=r"other\.gguf: no such file"):
        verify(gemma4.packed, tmp_path)


def test_a_drafter_that_is_no_file_is_refused(gemma4: Case, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected the GGUF of a drafter"):
        export_ollama(gemma4.packed, tmp_path / "ollama", draft=tmp_path / "none.gguf")
    assert not list(tmp_path.iterdir())


def test_lm_studio_finds_publisher_model_and_file(gemma4: Case, tmp_path: Path) -> None:
    export_lmstudio(gemma4.packed, tmp_path / "models", gguf=gemma4.gguf)
    (file,) = (path for path in (tmp_path / "models").rglob("*.gguf") if path.is_file())
    publisher, model, name = file.relative_to(tmp_path / "models").parts
    assert (publisher, name) == ("intaglio", f"{model.removesuffix('-GGUF')}.gguf")
    assert verify(gemma4.packed, tmp_path / "models").exact
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()  # the fixture's file is linked
    file.write_bytes(data)
    assert not verify(gemma4.packed, tmp_path / "models").exact


@pytest.mark.parametrize("export", [export_ollama, export_lmstudio])
def test_only_such_a_folder_is_replaced(gemma4: Case, tmp_path: Path, export) -> None:
    export(gemma4.packed, tmp_path / "out", gguf=gemma4.gguf)
    export(gemma4.packed, tmp_path / "out", gguf=gemma4.gguf, replace=True)
    home = tmp_path / "home"
    (home / "models" / "a").mkdir(parents=True)
    (home / "models" / "a" / "b.gguf").write_bytes(b"")
    (home / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="not replaced"):
        export(gemma4.packed, home, gguf=gemma4.gguf, replace=True)
    assert (home / "letter.txt").is_file()
