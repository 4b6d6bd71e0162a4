"""Datasets by their names on the Hub, streamed by the real `datasets` from a stand-in."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from intaglio.errors import CorpusError
from intaglio.tiny import MODEL_DIR
from intaglio.train.data.sources import Source, record_of
from tests.support.cli import intaglio
from tests.support.corpora import BOS, EOS, byte_tokenizer, ids, load
from tests.support.hub import TOKEN, Hub


def parquet(**columns: list[object]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def test_a_column_is_named_and_a_split_chosen(hub: Hub) -> None:
    files = {"data/train-0.parquet": parquet(body=["abc"], n=[1]), "data/test-0.parquet": parquet(body=["xyz"], n=[1])}
    hub.add("user/texts", files, kind="datasets")
    columns = {"text": "body"}
    assert load(Source("user/texts", columns), 5).tokens.tolist() == [[BOS, *ids("abc"), EOS]]
    assert load(Source("user/texts@test", columns), 5).tokens.tolist() == [[BOS, *ids("xyz"), EOS]]
    with pytest.raises(CorpusError, match=r"^user/texts: got the columns body, n: .* with --column text=body"):
        load("user/texts")
    assert record_of("user/texts@test") == {"data": "user/texts@test", "datasets": ["user/texts"]}


def test_chats_go_through_the_template(hub: Hub) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    hub.add("user/chats", {"train.jsonl": json.dumps(chat).encode() + b"\n"}, kind="datasets")
    done = intaglio("data", "user/chats", "--model", MODEL_DIR)
    assert done.code == 0, done.err
    assert "<|turn>user\nhi<turn|>" in done.out


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"scripted.py": b"raise SystemExit"}, "scripts are no longer supported"),
        ({"train.csv": b"text\nabc\n"}, "is stored as csv: expected parquet or JSON lines"),
    ],
)
def test_nothing_else_is_read(hub: Hub, files: dict[str, bytes], said: str) -> None:
    hub.add("user/scripted", files, kind="datasets")
    with pytest.raises(CorpusError, match=rf"^user/scripted: .*{said}"):
        load("user/scripted", tokenizer=byte_tokenizer(None))


def test_refusals(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("user/gated", {"train.jsonl": b'{"text": "abc"}\n'}, kind="datasets", gated=True)
    with pytest.raises(CorpusError, match=r"^user/none: no such file or folder, and no such dataset on the Hub"):
        load("user/none")
    with pytest.raises(CorpusError, match=r"^user/gated: is gated: accept its terms"):
        load("user/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CorpusError, match=r"^user/gated: the Hub refuses the token \(401\)") as error:
        load("user/gated")
    assert "hf_wrong" not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert load("user/gated", 5).tokens.tolist() == [[BOS, *ids("abc"), EOS]]


def test_a_folder_wins_and_it_is_said(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "user" / "texts").mkdir(parents=True)
    (tmp_path / "user" / "texts" / "a.txt").write_text("The whale swam past the ship.\n")
    done = intaglio("data", "user/texts", "--model", MODEL_DIR)
    assert "user/texts: taken as the folder of this name, not as a repository of the Hub" in done.err
    assert "whale" in done.out and not hub.requests
