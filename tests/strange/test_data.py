"""Text and chats: encodings, rows, tables, turns and folders that people have."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from intaglio.errors import CorpusError
from intaglio.train.data.pieces import read_pieces
from intaglio.train.data.reading import Reading
from intaglio.train.data.sources import Source
from tests.support.corpora import byte_tokenizer, load

AB, CD = "ab cd", "efg"
USER, ASSISTANT = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
CHAT, SAID = [USER, ASSISTANT], "[user]x[assistant]y"
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
WITH_CALLS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}:{{ c.function.arguments.a }}{% endfor %}{% endfor %}"
)
ENCODING, NUL, BROKEN = (
    "not valid UTF-8: .*iconv",
    "a NUL character, which no text holds.*iconv -f UTF-16LE",
    "not valid CSV",
)
TWICE, FIELDS, DELIMITER = "is said twice", r"got \d fields: expected 2", "is one field: expected ','"


class Data(NamedTuple):
    """A file, or the files of a folder. right: the documents, or a pattern of the refusal. found: as in `Input`."""

    files: str | bytes | dict[str, str | bytes]
    right: list[str] | str
    found: str = "right"


def rows(*found: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in found)


def chat(*messages: Any, **more: Any) -> str:
    return rows({"messages": list(messages)} | more)


LINES = {"a.txt": f"{AB}\n{CD}", "a.jsonl": rows({"text": AB}, {"text": CD}), "a.csv": f"text\n{AB}\n{CD}\n"}
READ = {"a.txt": [f"{AB}\n{CD}"], "a.jsonl": [AB, CD], "a.csv": [AB, CD]}
FILES: dict[str, Data] = {
    **{f"BOM {name}": Data(LINES[name].encode("utf-8-sig"), READ[name]) for name in LINES},
    "CRLF a.jsonl": Data(LINES["a.jsonl"].replace("\n", "\r\n"), READ["a.jsonl"]),
    "CRLF a.csv": Data(LINES["a.csv"].replace("\n", "\r\n"), READ["a.csv"]),
    "CRLF a.txt": Data(LINES["a.txt"].replace("\n", "\r\n"), [f"{AB}\r\n{CD}"]),
    **{f"UTF-16 {name}": Data(LINES[name].encode("utf-16"), ENCODING) for name in LINES},
    "UTF-16 without a mark a.txt": Data(LINES["a.txt"].encode("utf-16-le"), NUL, "silent"),
    "UTF-16 without a mark a.jsonl": Data(LINES["a.jsonl"].encode("utf-16-le"), NUL, "misleading"),
    "UTF-16 without a mark a.csv": Data(LINES["a.csv"].encode("utf-16-le"), NUL, "misleading"),
    "Latin-1 a.txt": Data("caf\u00e9".encode("latin-1"), ENCODING),
    "gzip without its suffix a.jsonl": Data(gzip.compress(LINES["a.jsonl"].encode()), "add .gz to its", "misleading"),
    "no gzip a.jsonl.gz": Data(LINES["a.jsonl"], "Not a gzipped file"),
    "cut gzip a.txt.gz": Data(gzip.compress(b"ab cd efg")[:-6], "fetch it again"),
    "no last line end a.jsonl": Data(LINES["a.jsonl"].rstrip(), READ["a.jsonl"]),
    "empty lines a.jsonl": Data(LINES["a.jsonl"].replace("\n", "\n\n"), READ["a.jsonl"]),
    "a line separator in text a.jsonl": Data('{"text": "ab\u2028cd"}', ["ab\u2028cd"]),
    "JSON lines called text a.jsonl.txt": Data(LINES["a.jsonl"], READ["a.jsonl"], "silent"),
    # rows
    "text twice a.jsonl": Data('{"text": "ab", "text": "cd"}', TWICE, "silent"),
    "content twice a.jsonl": Data('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', TWICE, "silent"),
    "content twice in JSON text a.jsonl": Data(
        rows({"messages": '[{"role": "user", "content": "a", "content": "b"}]'}), "messages is", "silent"
    ),
    "text twice a.json": Data('[{"text": "ab", "text": "cd"}]', TWICE, "silent"),
    "NaN beside text a.jsonl": Data('{"text": "ab", "score": NaN}', ["ab"]),
    "NaN as text a.jsonl": Data('{"text": NaN}', "text is of type float"),
    "mixed columns a.jsonl": Data(
        rows({"text": AB}, {"messages": CHAT}, {"prompt": "p", "completion": "q"}), [AB, SAID, "pq"]
    ),
    "numbers as prompt and answer a.jsonl": Data(
        rows({"prompt": "[1, 2]", "completion": "[3]"}), ["[1, 2][3]"], "misleading"
    ),
    "objects as prompt and answer a.jsonl": Data(
        rows({"prompt": '{"a": 1}', "completion": '{"b": 2}'}), ['{"a": 1}{"b": 2}'], "misleading"
    ),
    "a list and a string a.jsonl": Data(rows({"prompt": [USER], "completion": "y"}), "messages is 'y'"),
    "a list of texts a.jsonl": Data(rows({"text": ["a", "b"]}), "text is of type list"),
    "a JSON list a.jsonl": Data('[{"text": "ab"}]', "got list: expected an object"),
    "commas behind lines a.jsonl": Data('{"text": "ab"},\n', "not valid JSON"),
    # tables
    "a quoted line end a.csv": Data('text,n\n"ab\ncd",1\n', ["ab\ncd"]),
    "doubled quotes a.csv": Data('text,n\n"ab ""cd""",1\n', ['ab "cd"']),
    "quotes within a field a.csv": Data('text,n\nab "cd" e,1\n', ['ab "cd" e']),
    "an open quote a.csv": Data('text,n\n"ab,1\ncd,2\n', BROKEN, "silent"),
    "quotes behind backslashes a.csv": Data('text,n\n"ab \\"x\\" cd",1\n', BROKEN, "silent"),
    "a quoted word a.tsv": Data('text\tn\n"ab" cd\t1\n', BROKEN, "silent"),
    "a line end without quotes a.csv": Data("n,text\n1,ab\ncd\n", FIELDS, "misleading"),
    "a short row a.csv": Data("text,n\nab\n", FIELDS, "silent"),
    "a long row a.csv": Data("text,n\nab,1,2\n", FIELDS),
    "semicolons a.csv": Data("id;text\n1;ab\n", DELIMITER, "misleading"),
    "tabs a.csv": Data("id\ttext\n1\tab\n", DELIMITER, "misleading"),
    "no header a.csv": Data("hello,1\nab,2\n", "got the columns hello, 1"),
    "empty rows a.csv": Data("text\n\nab\n\n", ["ab"]),
    "a chat as JSON text a.csv": Data(f'messages\n"{json.dumps(CHAT).replace(chr(34), chr(34) * 2)}"\n', [SAID]),
    # chats
    "a system turn in the middle a.jsonl": Data(
        chat(USER, {"role": "system", "content": "s"}, ASSISTANT), ["[user]x[system]s[assistant]y"]
    ),
    "two users a.jsonl": Data(chat(USER, USER, ASSISTANT), ["[user]x[user]x[assistant]y"]),
    "two answers a.jsonl": Data(chat(USER, ASSISTANT, ASSISTANT), ["[user]x[assistant]y[assistant]y"]),
    "an answer first a.jsonl": Data(chat(ASSISTANT, USER), ["[assistant]y[user]x"]),
    "an empty answer a.jsonl": Data(chat(USER, {"role": "assistant", "content": ""}), ["[user]x[assistant]"]),
    "a null answer a.jsonl": Data(chat(USER, {"role": "assistant", "content": None}) + chat(*CHAT), [SAID]),
    "content in parts a.jsonl": Data(chat({"role": "user", "content": [{"type": "text", "text": "x"}]}), ["[user]x"]),
    "parts without a type a.jsonl": Data(chat({"role": "user", "content": [{"text": "x"}]}), "got part .*'text'"),
    "parts as strings a.jsonl": Data(chat({"role": "user", "content": ["x"]}), "got part 'x'"),
    "a number as content a.jsonl": Data(chat({"role": "user", "content": 5}), "expected strings role and content"),
    "a capital role a.jsonl": Data(chat({"role": "User", "content": "x"}), "by 'User', whom the chat template"),
    "two roles a.jsonl": Data(chat({"role": "user", "from": "gpt", "content": "x"}), "role and from differ", "silent"),
    "one role twice a.jsonl": Data(chat({"role": "user", "from": "human", "content": "x"}), ["[user]x"]),
    "two contents a.jsonl": Data(chat(USER | {"value": "other"}), "content and value differ", "silent"),
    "content under another key a.jsonl": Data(
        chat({"role": "user", "text": "x"}) + chat(*CHAT), "it has text and no content", "silent"
    ),
    "Gemini's parts a.jsonl": Data(
        chat({"role": "model", "parts": [{"text": "x"}]}) + chat(*CHAT), "it has parts and no content", "silent"
    ),
    "a list in a list a.jsonl": Data(chat(CHAT), "expected an object with role and content"),
    "system beside and inside a.jsonl": Data(
        chat({"role": "system", "content": "s"}, USER, system="t"), ["[system]t[system]s[user]x"]
    ),
    "a tool call a.jsonl": Data(chat({"role": "assistant", "content": "", "tool_calls": [CALL]}), ["[assistant]f:1"]),
    "tool calls as JSON text a.jsonl": Data(
        chat({"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])}), ["[assistant]f:1"], "misleading"
    ),
    "no tool calls, as JSON text a.jsonl": Data(chat(USER | {"tool_calls": "[]"}), ["[user]x"], "misleading"),
    "one tool call without a list a.jsonl": Data(chat(USER | {"tool_calls": CALL}), "expected a list"),
    "tools as broken JSON text a.jsonl": Data(chat(USER, tools="[{bad"), "expected a list of objects"),
    "no tools, as JSON text a.jsonl": Data(chat(USER, tools="[]"), ["[user]x"]),
}

TR, TE = b"tr", b"te"
FOLDERS: dict[str, Data] = {
    "packed files inside": Data({"data/a.jsonl.gz": gzip.compress(b'{"text": "ab"}'), "b.txt": "cd"}, ["cd", "ab"]),
    "what macOS leaves": Data({"__MACOSX/._a.txt": b"\0", "._b.txt": b"\0", ".DS_Store": b"\0", "a.txt": "ab"}, ["ab"]),
    "an archive": Data({"a.tar.gz": b"x", "a.zip": b"PK", "b.txt": "ab"}, ["ab"]),
    "an empty file": Data({"a.txt": "", "b.txt": "ab"}, ["ab"]),
    "nothing but an empty file": Data({"a.txt": ""}, "empty: expected text"),
    "one file packed and not": Data({"a.txt": "ab", "a.txt.gz": gzip.compress(b"ab")}, "read twice", "silent"),
    "splits": Data({"train-00000.txt": TR, "test-00000.txt": TE}, ["tr"]),
    "splits in capitals": Data({"TRAIN.txt": TR, "TEST.txt": TE}, ["tr"]),
    "numbered splits": Data({"train_1.txt": TR, "test_1.txt": TE}, ["tr"]),
    "numbers behind splits": Data({"train1.txt": TR, "test2.txt": TE}, ["tr"], "silent"),
    "training and testing": Data({"training.txt": TR, "testing.txt": TE}, ["tr"], "silent"),
    "trainset and testset": Data({"trainset.txt": TR, "testset.txt": TE}, ["tr"], "silent"),
    "a held-out file beside the train split": Data({"train.txt": TR, "holdout.txt": TE}, ["tr"]),
    "a word that ends so": Data({"latest.txt": "ab", "contest.txt": "cd"}, ["cd", "ab"]),
    "requirements and robots": Data({"a.txt": "ab", "requirements.txt": "x", "robots.txt": "x"}, ["ab"], "silent"),
    "numbers about the data": Data({"a.txt": "ab", "stats.json": '{"mean": 3}'}, "got the keys mean"),
}

KINDS = {"files": FILES, "folders": FOLDERS}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, found in KINDS.items() for name in found])
def test_data(kind: str, name: str, tmp_path: Path) -> None:
    case, source = KINDS[kind][name], tmp_path / "data"
    files = case.files if isinstance(case.files, dict) else {name.split()[-1]: case.files}
    for file, content in files.items():
        path = source / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if kind == "files":
        source /= name.split()[-1]
    tokenizer = byte_tokenizer(WITH_CALLS)
    if isinstance(case.right, str):
        with pytest.raises(CorpusError, match=case.right):
            load(source, 2, tokenizer)
        return
    found: list[str] = []
    for piece in read_pieces(Source(source), tokenizer, Reading(str(source))):
        found = [*found, ""] if piece.starts else found
        found[-1] += piece.text.removeprefix("<bos>")
    assert found == case.right
