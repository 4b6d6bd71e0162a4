"""A drafter by commands: packed, exported, read back; and what is not for drafters says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import intaglio
from tests.support.tiny import ASSISTANT, GEMMA4, make_checkpoint


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of a drafter with a clustered head, and what `quantize` made of it."""
    folder = tmp_path_factory.mktemp("drafter")
    make_checkpoint(folder / "checkpoint", ASSISTANT)
    outcome = intaglio("quantize", folder / "checkpoint", "--recipe=drafter-q4_0", "--out", folder / "packed")
    assert outcome.code == 0, outcome.err
    return folder


def test_a_drafter_is_packed_exported_and_read_back(drafter: Path, tmp_path: Path) -> None:
    packed = drafter / "packed"
    outcome = intaglio("export", packed, "gguf", "--out", tmp_path / "drafter.gguf")
    assert outcome.code == 0, outcome.err
    assert "drafter.gguf: exact: 49 tensors" in outcome.out
    assert "is without the clusters of the head: llama.cpp computes all of it" in outcome.out
    assert intaglio("verify", packed, tmp_path / "drafter.gguf").code == 0
    outcome = intaglio("export", packed, "hf", "--out", tmp_path / "hf")
    assert outcome.code == 0 and "exact: 50 tensors" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train", "DRAFTER/checkpoint", "--out=OUT"), "use `intaglio train-drafter`"),
        (("train", "DRAFTER/packed", "--data=TEXT", "--out=OUT"), "use `intaglio train-drafter`"),
        (
            ("eval", "DRAFTER/packed", "--original=MODEL", "--text=TEXT"),
            "DRAFTER/packed: gemma4_assistant: a drafter is trained",
        ),
        (
            ("eval", "MODEL", "--original=DRAFTER/checkpoint", "--text=TEXT"),
            "DRAFTER/checkpoint: gemma4_assistant: a drafter",
        ),
        (("export", "DRAFTER/packed", "--to=all", "--out=OUT"), "a drafter does not run by itself: export it to gguf"),
        (("export", "DRAFTER/packed", "ollama", "--out=OUT"), "a drafter does not run by itself: export it to gguf"),
        (
            ("export", "DRAFTER/packed", "mlx", "--out=OUT"),
            "this model is gemma4_assistant: export it to gguf or hf",
        ),
    ],
)
def test_what_is_for_models_alone_says_so(
    drafter: Path, tmp_path: Path, text: Path, arguments: tuple[str, ...], says: str
) -> None:
    if any("MODEL" in argument for argument in arguments):
        make_checkpoint(tmp_path / "model", GEMMA4)
    places = {
        "DRAFTER": str(drafter),
        "OUT": str(tmp_path / "out"),
        "TEXT": str(text),
        "MODEL": str(tmp_path / "model"),
    }

    def place(argument: str) -> str:
        for name, path in places.items():
            argument = argument.replace(name, path)
        return argument

    outcome = intaglio(*map(place, arguments))
    assert outcome.code == 2, outcome.err
    assert place(says) in outcome.error, outcome.error
    assert not (tmp_path / "out").exists()
