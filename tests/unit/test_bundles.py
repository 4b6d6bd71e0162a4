"""Folders around a GGUF file: Ollama's and LM Studio's. Neither program is run: what is written is parsed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from intaglio.errors import ConfigError, OutputError
from intaglio.export.bundles import export_lmstudio, export_ollama, modelfile
from intaglio.packed.model import PackedModel
from intaglio.packed.verify import verify
from intaglio.packed.verify_bundles import parse_modelfile
from tests.support.cases import Case


def test_a_modelfile_names_all_that_ollama_needs(gemma4: Case, tmp_path: Path) -> None:
    export_ollama(gemma4.packed, tmp_path / "ollama", gguf=gemma4.gguf)
    assert parse_modelfile(tmp_path / "ollama" / "Modelfile") == {
        "FROM": "./model.gguf",
        "RENDERER": "gemma4",
        "PARSER": "gemma4",
        "stop": "<turn|>",
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


def test_gemma3_goes_by_its_own_template(cases: dict[str, Case]) -> None:
    text = modelfile(cases["gemma3"].packed)
    assert "RENDERER" not in text and "PARAMETER stop <end_of_turn>" in text


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
    (file,) = (path for path in (tmp_path / "models").rglob("*") if path.is_file())
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
