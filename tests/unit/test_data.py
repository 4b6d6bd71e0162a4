"""Data as people have it: kinds of files, shapes of records, folders with splits; time and memory are bounded."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import typer

from intaglio.cli.options import source_of
from intaglio.errors import CorpusError, InputError
from intaglio.train.corpus import held_out_windows
from intaglio.train.data import files
from intaglio.train.data.preview import preview
from intaglio.train.data.sources import Source
from tests.support.corpora import BOS, EOS, TOKENIZER, VOCAB, byte_tokenizer, ids, load, write_jsonl

TEXTS = ["first\nline", 'with "quotes", commas\tand tabs', "the ende"]
ROWS = [{"id": at, "text": text} for at, text in enumerate(TEXTS)]


def documents(source: Any, **kwargs: Any) -> list[str]:
    """The texts of a source, without bos and eos."""
    corpus = load(source, 2, **kwargs)
    text = TOKENIZER.decode(corpus.tokens.reshape(-1), skip_special_tokens=False)
    return [part.removesuffix("<eos>") for part in text.split("<bos>")[1:]]


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_zst(path: Path, content: bytes) -> Path:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)
    return path


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


KINDS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_bytes(lines(ROWS)),
    "a.ndjson": lambda path: path.write_bytes(lines(ROWS)),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_bytes(lines(ROWS)),
    "pretty.json": lambda path: path.write_text("\n".join(json.dumps(row, indent=2) for row in ROWS)),
    "a.csv": lambda path: write_csv(path, ROWS),
    "a.tsv": lambda path: write_csv(path, ROWS, "\t"),
    "a.md": lambda path: path.write_text("\f".join(TEXTS)),
    "a.txt.zst": lambda path: write_zst(path, "\f".join(TEXTS).encode()),
    "a.jsonl.zst": lambda path: write_zst(path, lines(ROWS)),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "a.csv.xz": lambda path: path.write_bytes(lzma.compress(write_csv(path.with_name("b"), ROWS).read_bytes())),
    "a.md.bz2": lambda path: path.write_bytes(bz2.compress("\f".join(TEXTS).encode())),
    "a.parquet": lambda path: pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_files_hold_the_same_text(name: str, tmp_path: Path) -> None:
    KINDS[name](tmp_path / name)
    corpus = load(tmp_path / name, 2)
    assert documents(tmp_path / name) == TEXTS
    assert corpus.reading is not None and corpus.reading.documents == 3 and corpus.reading.files == [name]
    assert ("id" in corpus.reading.unused) == (not name.startswith(("a.md", "a.txt")))


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_blocks_change_nothing(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", block)
    rows = [{"text": text} for text in ["zwei äöü", "\u4e09\U0001f389 [{]}", "x\r\ny\n\n"]]
    (tmp_path / "a.json").write_text("\ufeff " + json.dumps(rows, ensure_ascii=False), "utf-8")
    assert documents(tmp_path / "a.json") == [row["text"] for row in rows]
    (tmp_path / "a.txt").write_bytes("\f".join(row["text"] for row in rows).encode())
    assert "".join(files.text_lines(tmp_path / "a.txt")) == "\f".join(row["text"] for row in rows)


# Special tokens


@pytest.mark.parametrize("text", ["<bos>ab<eos>", "ab<eos>", "ab<eos>\n", "\n <bos>ab", "<bos><bos>ab<eos><eos>", "ab"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_one_bos_and_one_eos(text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text if name == "a.txt" else json.dumps({"text": text}))
    assert load(tmp_path / name, 4).tokens.tolist() == [[BOS, *ids("ab"), EOS]]


def test_special_tokens_inside_a_text_stay(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a<eos><bos>b")
    assert load(tmp_path / "a.txt", 6).tokens.tolist() == [[BOS, *ids("a"), EOS, BOS, *ids("b"), EOS]]


def test_a_template_that_writes_bos_and_eos(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "ab"}]}])
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    assert load(path, 4, byte_tokenizer(template)).tokens.tolist() == [[BOS, *ids("ab"), EOS]]


# Rows


def test_a_null_row_is_counted_and_named(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": "ab"}] * 50
    rows[7], rows[9], rows[11], rows[20] = {"text": None}, {"messages": []}, {"messages": None}, {"text": "  "}
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {"messages": [{"role": "user", "content": None}]}])
    pyarrow.parquet.write_table(pa.table({"text": ["ab", None] * 3}), tmp_path / "a.parquet")
    write_csv(tmp_path / "a.csv", [{"text": "ab", "n": 1}, {"text": "", "n": 2}])
    for name, documents_there, empty in (("a.jsonl", 46, 5), ("a.parquet", 3, 3), ("a.csv", 1, 1)):
        reading = load(tmp_path / name, 4).reading
        assert reading is not None and (reading.documents, len(reading.empty)) == (documents_there, empty)
        assert f"left out {empty} row" in "\n".join(reading.lines()) and name in reading.empty[0]
    assert load(path, 4).reading.empty[0].endswith("a.jsonl:8")  # type: ignore[union-attr]
    pyarrow.parquet.write_table(pa.table({"text": pa.array([None, None], pa.string())}), tmp_path / "null.parquet")
    with pytest.raises(CorpusError, match=r"no text in any of 2 rows, the first is .*row 0"):
        load(tmp_path / "null.parquet", 4)


CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SHARE_GPT = [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
SAME_CHAT: list[dict[str, Any]] = [
    {"messages": CHAT},
    {"messages": json.dumps(CHAT)},
    {"messages": [{**message, "name": None, "tool_calls": None} for message in CHAT], "tools": None},
    {"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]},
    {"messages": [CHAT[0], CHAT[1], {"role": "model", "content": "yes"}]},
    {"conversations": SHARE_GPT},
    {"conversations": CHAT},
    {"conversation": SHARE_GPT[1:], "system": "s"},
    {"prompt": CHAT[:2], "completion": CHAT[2:]},
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_shapes_of_the_same_chat(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(path, [*SAME_CHAT, {"prompt": "hi", "completion": "yes"}, {"text": "plain"}])
        plain = ["hiyes", "plain"]
    else:  # Arrow has one type a column, so only what is of one type
        rows = [row for at, row in enumerate(SAME_CHAT) if at in (0, 8)]
        pyarrow.parquet.write_table(pa.Table.from_pylist([{"prompt": None, **rows[0]}, rows[1]]), path)
        plain = []
    same = len(SAME_CHAT) if kind == "jsonl" else 1
    found = documents(path)
    assert found[:same] == ["[system]s[user]hi[assistant]yes"] * same and found[same:] == plain


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
ALL_OF_IT = """{{ bos_token }}{% if tools %}<{{ tools[0].function.name }}{{ style }}>{% endif %}{% for m in messages %}\
[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}:{{ c.function.arguments.a }}\
{% endfor %}{% endfor %}"""


def test_tools_and_variables_reach_the_template(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 5}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "8"},
    ]
    share = [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 5}}'},
    ]
    rows = [
        {"messages": messages, "tools": TOOLS, "chat_template_kwargs": {"style": "!"}},
        {"messages": messages, "tools": json.dumps(TOOLS), "chat_template_kwargs": '{"style": "!"}', "score": 3},
        {"conversations": [*share, {"from": "observation", "value": "88"}], "tools": TOOLS},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    corpus = load(path, 2, byte_tokenizer(ALL_OF_IT))
    chat = "[user]hi[assistant]f:5[tool]8"
    assert documents(path, tokenizer=byte_tokenizer(ALL_OF_IT)) == [f"<f!>{chat}", f"<f!>{chat}", f"<f>{chat}8"]
    assert corpus.reading is not None and dict(corpus.reading.unused) == {"score": 1}


def test_keys_that_the_template_does_not_know_are_named(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi", "weight": 1}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages, "tools": TOOLS, "source": "x"}] * 2)
    reading = load(path, 4).reading
    assert reading is not None
    unread = {"tools (not in the chat template)": 2, "weight (not in the chat template)": 2, "source": 2}
    assert dict(reading.unused) == unread and "source (2 rows)" in reading.lines()[-1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of type 'image': only text"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "by 'narrator', whom the chat template does not know"),
        ({"messages": CHAT, "tools": "none"}, "tools is 'none': expected a list of objects"),
        ({"messages": CHAT, "tools": [3]}, r"tools is \[3\]: expected a list of objects"),
        ({"messages": CHAT, "chat_template_kwargs": {"messages": []}}, "expected an object of the template's own"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]}, "got tool call .*expected a function"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "tool_calls is 3: expected a list"),
        ({"prompt": "a", "completion": [{"role": "user"}]}, "completion is of type list: expected a string"),
        ({"prompt": 3, "completion": "a"}, "prompt is of type int"),
        ({"instruction": "a", "output": "b"}, "--column prompt=instruction --column completion=output"),
        ({"question": "a", "prompt": "b", "answer": "c"}, "with --column completion=answer"),
        ({"body": "a"}, "got the keys body: .*--column text=body"),
        ({"dialogue": []}, "--column messages=dialogue"),
        ({"x": "a"}, "--column ROLE=NAME, with a ROLE of text, messages"),
        ([1], "got list: expected an object"),
    ],
)
def test_a_bad_row_in_the_middle(record: Any, message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "ab"}, record, {"text": "ab"}])
    with pytest.raises(CorpusError, match=rf"a\.jsonl:2: .*{message}"):
        load(path, 4)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "json", "saved"])
def test_columns_by_the_name_that_an_error_advises(kind: str, tmp_path: Path) -> None:
    rows = [{"instruction": "ab", "output": "cd", "body": "ef", "n": 1}]
    path = tmp_path / f"a.{kind}"
    writers: dict[str, Callable[[], Any]] = {
        "jsonl": lambda: write_jsonl(path, rows),
        "json": lambda: path.write_text(json.dumps(rows)),
        "csv": lambda: write_csv(path, rows),
        "parquet": lambda: pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path),
        "saved": lambda: datasets.Dataset.from_list(rows).save_to_disk(path),
    }
    writers[kind]()
    with pytest.raises(CorpusError, match=r"instruction, output, body, n: .*or --column text=body") as caught:
        load(path, 4)
    advised = [word for word in str(caught.value).split() if "=" in word]
    columns = dict(word.split("=") for word in advised)
    assert documents(Source(path, {key: columns[key] for key in ("prompt", "completion")})) == ["abcd"]
    assert documents(Source(path, {"text": columns["text"]})) == ["ef"]
    with pytest.raises(InputError, match="column 'txt': expected one of text, messages"):
        Source(path, {"txt": "body"})


# Folders


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pa.table({"text": [name]}), path)
        elif name.endswith(".jsonl"):
            write_jsonl(path, [{"text": name}])
        else:
            path.write_text(name)
    return folder


HUB = ("README.md", ".gitattributes", "data/test-00000-of-00001.parquet", "data/train-00000-of-00002.parquet")


@pytest.mark.parametrize(
    ("there", "read", "held_out"),
    [
        (("train.txt", "validation.txt", "test.txt", "LICENSE.txt"), ["train.txt"], ["validation.txt"]),
        (("train.jsonl", "test.jsonl"), ["train.jsonl"], ["test.jsonl"]),
        (HUB, ["data/train-00000-of-00002.parquet"], ["data/test-00000-of-00001.parquet"]),
        (("train/a.txt", "train/b.txt", "dev/a.txt"), ["train/a.txt", "train/b.txt"], ["dev/a.txt"]),
        (("my_train.txt", "my.eval.txt", "notes.txt"), ["my_train.txt"], ["my.eval.txt"]),
        (("part1.txt", "part2.txt", "COPYING", "x.py"), ["part1.txt", "part2.txt"], ["part1.txt", "part2.txt"]),
        (("train.md", "test.md", "latest.txt", "config.json"), ["latest.txt", "test.md", "train.md"], None),
        (("chapters/1.md", "chapters/2/a.md"), ["chapters/1.md", "chapters/2/a.md"], None),
        (("test.txt", "book.txt"), ["book.txt"], ["test.txt"]),
        (("en/train.jsonl", "de/train.jsonl"), ["de/train.jsonl", "en/train.jsonl"], None),
    ],
)
def test_which_files_of_a_folder_are_read(
    there: tuple[str, ...], read: list[str], held_out: list[str] | None, tmp_path: Path
) -> None:
    reading = load(make(tmp_path, *there), 2).reading
    assert reading is not None and reading.files == read and documents(tmp_path) == read
    left_out = [name for names in reading.left_out.values() for name in names]
    hidden = [name for name in there if name.startswith(".")]
    assert sorted(left_out + read + hidden) == sorted(there)
    assert all(reason in "\n".join(reading.lines()) for reason in reading.left_out)
    windows = held_out_windows(tmp_path, TOKENIZER, length=4, vocab_size=VOCAB)
    first = (held_out or read)[0]
    assert TOKENIZER.decode(windows[0][1:]) == first[:3]


def test_a_split_by_name(tmp_path: Path) -> None:
    make(tmp_path, "validation.txt", "test.txt")
    with pytest.raises(CorpusError, match=r"no train split: give (.*@test), (.*@validation) to read what is") as caught:
        load(tmp_path, 2)
    for advised in str(caught.value).split("give ")[1].split(" to read")[0].split(", "):
        assert documents(advised) == [f"{advised.partition('@')[2]}.txt"]
    assert documents(f"{tmp_path}@all") == ["test.txt", "validation.txt"]
    with pytest.raises(CorpusError, match=r"no dev split: give .*@test"):
        load(f"{tmp_path}@dev", 2)


def test_saved_splits(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_list([{"text": f"of {name}"}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert documents(tmp_path / "saved") == ["of train"] and documents(f"{tmp_path}/saved@test") == ["of test"]
    assert load(tmp_path / "saved", 2).reading.left_out == {"test split": ["test"]}  # type: ignore[union-attr]
    (tmp_path / "saved/train/state.json").write_text("{}")
    with pytest.raises(CorpusError, match=r"state\.json: cannot be read"):
        load(tmp_path / "saved", 2)


def test_offsets_of_a_saved_dataset_are_checked(tmp_path: Path) -> None:
    """Arrow reads wherever an offset points, which would end the process."""
    datasets.Dataset.from_list([{"text": "abcdef"}] * 3).save_to_disk(tmp_path / "saved")
    shard = next((tmp_path / "saved").glob("*.arrow"))
    content, offset = shard.read_bytes(), (18).to_bytes(4, "little")
    assert content.count(offset) >= 1
    shard.write_bytes(content.replace(offset, (1 << 30).to_bytes(4, "little")))
    with pytest.raises(CorpusError, match=r"\.arrow: cannot be read"):
        load(tmp_path / "saved", 2)


def test_a_folder_of_papers_says_which_were_left_out(tmp_path: Path) -> None:
    make(tmp_path, "README.md")
    with pytest.raises(CorpusError, match=r"no text in this folder: .*one file of it \(README.md were left out\)"):
        load(tmp_path, 2)
    assert documents(tmp_path / "README.md") == ["README.md"]


# Bounds


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    for source in (tmp_path / "a.txt", tmp_path):
        with pytest.raises(CorpusError, match=r"a\.txt: is a pipe: write what it holds to a file"):
            load(source, 2)
    (tmp_path / "b.txt").symlink_to("/dev/zero")
    with pytest.raises(CorpusError, match=r"b\.txt: is a device"):
        load(tmp_path / "b.txt", 2)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.xz", "a.json.bz2", "a.csv.gz"])
@pytest.mark.parametrize("content", [b"\n", b" ", b"a", b'"'])
def test_a_bomb_is_refused(name: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "GROWTH_FLOOR", 1 << 20)
    packers: dict[str, Callable[[bytes], Any]] = {
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".bz2": bz2.compress,
        ".zst": lambda data: write_zst(tmp_path / "b", data) and (tmp_path / "b").read_bytes(),
    }
    head = b"text\n" if "csv" in name else b""
    (tmp_path / name).write_bytes(packers[Path(name).suffix](head + content * (3 << 20)))
    with pytest.raises(CorpusError, match=r"grows to more than 200 times its size|not valid JSON|got str"):
        load(tmp_path / name, 2)


def test_a_bomb_of_columns_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "GROWTH_FLOOR", 1 << 20)
    table = pa.table({"text": ["a" * (1 << 22)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(CorpusError, match="grows to more than 200 times"):
        load(tmp_path / "a.parquet", 2)


def test_long_lines_and_long_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RECORD_BYTES", 1 << 12)
    monkeypatch.setattr(files, "BLOCK_BYTES", 1 << 10)
    (tmp_path / "a.txt").write_text("word " * 5000)
    assert documents(tmp_path / "a.txt") == ["word " * 5000]
    for name, content in (("a.jsonl", '{"text": "%s"}'), ("a.json", '[{"text": "%s"}]'), ("a.csv", 'text\n"%s"')):
        (tmp_path / name).write_text(content % ("word " * 5000))
        with pytest.raises(CorpusError, match=r"a line of more than 0 MiB|not valid JSON: .*|larger than field limit"):
            load(tmp_path / name, 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[" * 100_000, "record 0: not valid JSON"),
        ("a.json", '[{"text": "ab"}, {"text": ', "record 1: not valid JSON"),
        ("a.json", '[{"text": "ab"}', "record 1: not valid JSON"),
        ("a.json", '{"data": [{"text": "ab"}]}', "record 0: got the keys data: expected text"),
        ("a.json", '{"text": ["ab", "cd"]}', "record 0: text is of type list"),
        ("a.json", "", "empty: expected text"),
        ("a.json", "[]", "empty: expected text"),
        ("a.jsonl", '{"messages": ' + "[" * 900 + "]" * 900 + "}", "a.jsonl:1: "),
        ("a.jsonl", '{"messages": [{"role": "user", "content": ' + "[" * 900 + "]" * 900 + "}]}", "got part"),
        ("a.csv", "text,text\na,b\n", "the header has a name twice"),
        ("a.csv", "text\na,b\n", "a.csv:2: got 2 fields: expected 1"),
        ("a.csv", 'text\n"' + "a\n" * 9, "a.csv:10: not valid CSV: unexpected end of data"),
        ("a.csv", "ab,cd\nef,gh\n", "got the columns ab, cd: expected"),
    ],
)
def test_damaged_data(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=message):
        load(tmp_path / name, 2)


def test_columns_on_the_command_line() -> None:
    assert source_of("a.jsonl", []) == "a.jsonl" and source_of(None, ["text=body"]) is None
    assert source_of("a.jsonl", ["text=body", "tools=a=b"]) == Source("a.jsonl", {"text": "body", "tools": "a=b"})
    for wrong in ("text", "text=", "=body"):
        with pytest.raises(typer.BadParameter, match=f"--column {wrong}: expected ROLE=NAME"):
            source_of("a.jsonl", [wrong])


# A look at it


def test_a_preview_shows_what_counts(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"messages": turns}, {"prompt": "a<bos>", "completion": "b"}, {"text": "c"}]
    )
    found = preview(path, TOKENIZER, max_tokens=1000, assistant_only=True, samples=2)
    assert found.samples == ("<bos>[user]hi[assistant][[yes]]", "<bos>a")
    assert found.reading.documents == 3 and json.dumps(found.to_dict())
    assert "1 bos tokens lie inside documents" in found.warnings[0] and "is the chat template" in found.warnings[1]
    plain = preview(path, TOKENIZER, max_tokens=8, assistant_only=False)
    assert plain.samples == ("<bos>[user]h",) and not plain.reading.complete
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": "a" * 500}])
    assert preview(long, TOKENIZER, max_tokens=1000, assistant_only=False).samples[0].endswith("a ... 302 tokens more")
