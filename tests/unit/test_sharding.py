"""A model read row by row is the model that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from intaglio.errors import ConfigError
from intaglio.packed.checkpoint import load_model
from intaglio.plan.family import read_spec
from intaglio.train.sharding import load_own_rows
from tests.support.tiny import GEMMA2, GEMMA3, GEMMA4, GEMMA4_DENSE, MULTIMODAL, make_checkpoint

CONFIGS = {"gemma4": GEMMA4, "no PLE": GEMMA4_DENSE, "gemma3": GEMMA3, "gemma2": GEMMA2, "multimodal": MULTIMODAL}
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", CONFIGS)
def test_reading_own_rows_gives_the_model_that_transformers_loads(kind: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", CONFIGS[kind])
    expected = load_model(checkpoint)
    found = load_own_rows(checkpoint, read_spec(checkpoint), torch.float32, CPU)
    for one, other in ((dict(expected.named_parameters()), dict(found.named_parameters())),
                       (dict(expected.named_buffers()), dict(found.named_buffers()))):  # fmt: skip
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) and value.dtype == other[name].dtype for name, value in one.items())
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == found.config.tie_word_embeddings
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", GEMMA4)
    config = json.loads((checkpoint / "config.json").read_text()) | {"intermediate_size": 512}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="config and weights are of different models"):
        load_own_rows(checkpoint, read_spec(checkpoint), torch.float32, CPU)
