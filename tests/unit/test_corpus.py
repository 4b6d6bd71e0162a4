"""Corpora: packing loses nothing but the tail, documents stay apart, bad text is refused by name and place."""

import gzip
import itertools
import json
import lzma
import tempfile
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from intaglio.errors import ConfigError, CorpusError
from intaglio.progress import Progress
from intaglio.train.corpus import Corpus, batch_indices, held_out_windows, sample_corpus
from intaglio.train.data import pieces as module
from intaglio.train.data import tokens as tokenizing
from intaglio.train.data.pieces import Piece
from intaglio.train.data.reading import Reading
from intaglio.train.data.sources import as_source
from tests.support.corpora import BOS, EOS, PAD, TEMPLATE, TOKENIZER, VOCAB, byte_tokenizer, ids, load, write_jsonl


def read_pieces(path: Path) -> list[Piece]:
    return list(module.read_pieces(as_source(path), TOKENIZER, Reading(str(path))))


def naive_positions(tokens: np.ndarray) -> list[list[int]]:
    """Count up along a row, from 0 at each bos: with this tokenizer only a document's start is a bos."""
    rows = []
    for row in tokens.tolist():
        count, out = -1, []
        for token in row:
            count = 0 if token == BOS else count + 1
            out.append(count)
        rows.append(out)
    return rows


documents = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\f<\0"), max_size=12), max_size=6
)


@pytest.fixture(scope="module")
def teacher() -> Gemma4ForCausalLM:
    config = Gemma4TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, global_head_dim=32, sliding_window=8, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB, max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"] * 2, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma4ForCausalLM(config).eval()
    with torch.no_grad():  # sharp enough that contexts and truncated distributions show
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


# Packing


@settings(deadline=None, max_examples=80)
@given(documents, st.integers(2, 9), st.integers(0, 40))
def test_packing_loses_only_the_tail(texts: list[str], length: int, extra: int) -> None:
    stream = [token for text in texts if text.strip() for token in [BOS, *ids(text), EOS]]
    for max_tokens in (None, length + extra):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.txt"
            path.write_bytes("\f".join(texts).encode())
            if len(stream) < length:
                with pytest.raises(CorpusError, match=r"empty|or more"):
                    load(path, length, max_tokens=max_tokens)
                continue
            corpus = load(path, length, max_tokens=max_tokens)
        kept = min(len(stream), max_tokens or len(stream)) // length * length
        assert corpus.tokens.reshape(-1).tolist() == stream[:kept]
        assert corpus.positions.tolist() == naive_positions(corpus.tokens)
        assert corpus.tokens.dtype == corpus.positions.dtype == np.int32
        assert corpus.tokens.shape == corpus.positions.shape == (kept // length, length)


def test_packed_documents_do_not_see_each_other(tmp_path: Path, teacher: Gemma4ForCausalLM) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdef\fghijklmno")
    corpus = load(path, 19)
    assert corpus.positions.tolist() == [[*range(8), *range(11)]]
    tokens, positions = torch.from_numpy(corpus.tokens).long(), torch.from_numpy(corpus.positions).long()
    with torch.no_grad():
        packed = teacher(tokens, position_ids=positions, use_cache=False).logits[0]
        alone = torch.cat([teacher(tokens[:, :8]).logits[0], teacher(tokens[:, 8:]).logits[0]])
        together = teacher(tokens, use_cache=False).logits[0]
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
    assert (together[8:] - alone[8:]).abs().max() > 1e-2


@settings(deadline=None, max_examples=80)
@given(st.text("ab \n", min_size=1, max_size=60), st.integers(1, 12), st.integers(1, 3))
def test_pieces_change_no_token(text: str, piece_characters: int, batch_pieces: int) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(module, "PIECE_CHARACTERS", piece_characters)
        patch.setattr(module, "LONGEST_PIECES", 100)
        patch.setattr(tokenizing, "BATCH_PIECES", batch_pieces)
        for path in (Path(folder) / "a.txt", Path(folder) / "a.jsonl"):
            path.write_text(text if path.suffix == ".txt" else json.dumps({"text": text}))
            expected = [BOS, *ids(text), EOS] if text.strip() else []
            if not expected:
                continue
            assert load(path, len(expected)).tokens.tolist() == [expected]
            pieces = read_pieces(path)
            assert "".join(piece.text for piece in pieces) == text
            assert [piece.starts for piece in pieces] == [i == 0 for i in range(len(pieces))]
            assert all(len(piece.text) < piece_characters + 60 for piece in pieces)


def test_a_long_text_is_cut_into_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 4)
    path = tmp_path / "a.txt"
    path.write_text("abc\n\nde\nf\ngh\f\n\fij")
    assert [tuple(piece)[:3] for piece in read_pieces(path)] == [
        ("abc\n\n", True, False),
        ("de\nf\n", False, False),
        ("gh", False, True),
        ("ij", True, True),
    ]


def test_a_tokenizer_without_bos_and_eos(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc\fdef")
    plain = byte_tokenizer(bos_token=None, eos_token=None)
    corpus = load(tmp_path / "a.txt", 6, plain)
    assert corpus.tokens.tolist() == [ids("abcdef")] and corpus.positions.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert held_out_windows(tmp_path / "a.txt", plain, length=3, vocab_size=VOCAB).tolist() == [ids("abc"), ids("def")]


def test_digest_sees_tokens_positions_and_shape() -> None:
    tokens, positions = np.arange(8, dtype=np.int32).reshape(2, 4), np.zeros((2, 4), dtype=np.int32)
    base = Corpus(tokens, positions, "a").digest
    assert base == Corpus(tokens.copy(), positions, "b").digest and len(base) == 64
    others = [(tokens + 1, positions), (tokens, positions + 1), (tokens.reshape(4, 2), positions.reshape(4, 2))]
    assert len({base, *(Corpus(t, p, "a").digest for t, p in others)}) == 4


# Sources


def test_every_kind_of_file_holds_the_same_corpus(tmp_path: Path) -> None:
    texts = ["first\nline\n", "zwei \u00e4\u00f6\u00fc \u2028 x", "\u4e09", "the end"]
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n\n" for i, text in enumerate(texts)).encode()
    plain = "\f".join(texts).encode()
    (tmp_path / "a.txt").write_bytes(plain)
    (tmp_path / "bom.TXT").write_bytes(b"\xef\xbb\xbf" + plain)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines))
    table = pa.table({"text": texts, "id": list(range(4))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("not text for training")
    (folder / ".hidden.txt").write_text("nor this")
    write_jsonl(folder / "a.jsonl", [{"text": text} for text in texts[:2]])
    (folder / "b.txt").write_text("\f".join(texts[2:]), "utf-8")
    sources = sorted(tmp_path.iterdir())
    assert len(sources) == 8
    assert len({load(source).digest for source in sources}) == 1
    assert load(str(folder)).tokens.reshape(-1).tolist()[:12] == [BOS, *ids(texts[0])][:12]


def test_a_form_feed_in_a_record_parts_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a\fb"}])
    assert load(path, 5).tokens.tolist() == [[BOS, *ids("a\fb"), EOS]]


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.removeprefix("{{ bos_token }}")])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_messages_go_through_the_chat_template(tmp_path: Path, template: str, kind: str) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(path, [{"messages": chat, "text": "ignored"}, {"text": "<bos>plain", "messages": None}])
    else:
        pyarrow.parquet.write_table(pa.table({"messages": [chat, None], "text": [None, "<bos>plain"]}), path)
    expected = [BOS, *ids("[user]hi[assistant]yes"), BOS, *ids("plain"), EOS]
    assert load(path, len(expected), byte_tokenizer(template)).tokens.tolist() == [expected]


def test_reading_stops_at_max_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "BATCH_PIECES", 2)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "abcdefgh"}] * 4)
    with path.open("a") as file:
        file.write("{broken\n")
    assert load(path, 10, max_tokens=39).tokens.shape == (3, 10)
    assert len(held_out_windows(path, TOKENIZER, length=10, vocab_size=VOCAB, max_tokens=36)) == 3
    with pytest.raises(CorpusError, match=r"a\.jsonl:5"):
        load(path, 10, max_tokens=41)


def bad(name: str, content: bytes, message: str):  # type: ignore[no-untyped-def]
    return pytest.param(name, content, message, id=message[:24])


PARQUET = pa.BufferOutputStream()
pyarrow.parquet.write_table(pa.table({"text": ["some text"] * 1000}), PARQUET)
NO_COLUMN = pa.BufferOutputStream()
pyarrow.parquet.write_table(pa.table({"prompt": ["some text"]}), NO_COLUMN)
NUMBERS = pa.BufferOutputStream()
pyarrow.parquet.write_table(pa.table({"text": [1, 2]}), NUMBERS)
RANDOM = np.random.default_rng(0).bytes(5000)
TEXT = b'{"text": "some text"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        bad("a.txt", b"", "empty: expected text"),
        bad("a.txt", b" \n\f\n ", "empty: expected text"),
        bad("a.jsonl", b'{"text": ""}\n{"text": " "}', r"no text in any of 2 rows, the first is .*a\.jsonl:1"),
        bad("a.txt", b"abc", "got 5 tokens: expected 8 or more"),
        bad("a.txt", b"good\nb\xe4d\n", r"a\.txt:2: not valid UTF-8: byte 0xe4 at offset 1"),
        bad("a.jsonl", TEXT + b'{"text": "b\xe4d"}', r"a\.jsonl:2: not valid UTF-8"),
        bad("a.txt", "text".encode("utf-16"), r"a\.txt:1: not valid UTF-8"),
        bad("a.jsonl", TEXT + b'\n{"text": ', r"a\.jsonl:3: not valid JSON"),
        bad("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not valid JSON"),
        bad("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"a\.jsonl:1: not valid JSON"),
        bad("a.jsonl", b'"text"', r"a\.jsonl:1: got str: expected an object"),
        bad("a.jsonl", b'{"prompt": "a", "id": 1}', "got the keys prompt, id: expected text, messages,"),
        bad("a.jsonl", b"{}", "got the keys none"),
        bad("a.jsonl", TEXT + b'{"text": 3}', r"a\.jsonl:2: text is of type int: expected a string"),
        bad("a.jsonl", b'{"text": null}', "no text in any of 1 rows"),
        bad("a.jsonl", b'{"text": "\\ud800"}', "half of a surrogate pair"),
        bad("a.jsonl", b'{"messages": "hi"}', "messages is 'hi': expected a list"),
        bad("a.jsonl", b'{"messages": []}', "no text in any of 1 rows"),
        bad("a.jsonl", b'{"messages": {}}', r"messages is \{\}: expected a list"),
        bad("a.jsonl", b'{"messages": ["hi"]}', "got message 'hi': expected an object with role and"),
        bad("a.jsonl", b'{"messages": [{"role": "user"}]}', "no text in any of 1 rows"),
        bad("a.jsonl", b'{"messages": [{"content": "a"}]}', "expected strings role and content"),
        bad("a.jsonl", b'{"messages": [{"role": "user", "content": 3}]}', "expected strings role and content"),
        bad("a.jsonl", b'{"messages": [{"role": "user", "content": ["hi"]}]}', "got part 'hi': expected .'type'"),
        bad("a.jsonl.gz", gzip.compress(TEXT * 999)[:-20], r"a\.jsonl\.gz: cannot be read: .*ended"),
        bad("a.txt.gz", b"not gzip", r"a\.txt\.gz: cannot be read: Not a gzipped file"),
        bad("a.txt.gz", gzip.compress(b"text" * 99)[:10] + RANDOM, r"a\.txt\.gz: cannot be read"),
        bad("a.txt.xz", lzma.compress(b"text " * 999)[:-20], r"a\.txt\.xz: cannot be read: .*ended"),
        bad("a.jsonl.xz", b"not xz", r"a\.jsonl\.xz: cannot be read"),
        bad("a.parquet", PARQUET.getvalue().to_pybytes()[:-40], r"a\.parquet: cannot be read"),
        bad("a.parquet", b"", r"a\.parquet: cannot be read"),
        bad("a.parquet", NO_COLUMN.getvalue().to_pybytes(), "got the columns prompt: expected text, messages,"),
        bad("a.parquet", NUMBERS.getvalue().to_pybytes(), "row 0: text is of type int"),
        bad("a.pdf", b"text\n", r"a\.pdf: unknown kind of file: .*\.parquet"),
        bad("a.csv", b"text\n", "empty: expected text"),
    ],
)  # fmt: skip
def test_bad_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message) as caught:
        load(tmp_path / name, 8)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_damage_inside_a_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": [f"some text {i}" for i in range(999)]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[60:400] = b"\xff" * 340
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"a\.parquet: cannot be read"):
        load(path)


@pytest.mark.parametrize("source", ["gone.txt", "./gone", "/gone/folder", Path("gone")])
def test_a_missing_file_is_named(source: str | Path) -> None:
    with pytest.raises(CorpusError, match=r"gone.*: no such file or folder"):
        load(source)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("a")
    with pytest.raises(CorpusError, match=r"no text in this folder: expected files that end in \.txt"):
        load(tmp_path)


def test_a_tokenizer_without_or_with_a_strict_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(CorpusError, match=r"a\.jsonl:1: messages, but the tokenizer has no chat template"):
        load(path, tokenizer=byte_tokenizer(None))
    with pytest.raises(CorpusError, match=r"a\.jsonl:1: .*template refuses these messages: no user"):
        load(path, tokenizer=byte_tokenizer("{{ raise_exception('no user') }}"))


@pytest.mark.parametrize("read", [load, lambda path, **kwargs: held_out_windows(path, TOKENIZER, length=4, **kwargs)])
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path, read) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "a.txt").write_text("abcde")
    largest = max(ids("abcde"))
    read(tmp_path / "a.txt", vocab_size=largest + 1)
    with pytest.raises(ConfigError, match=f"of {VOCAB} tokens, gives token {largest}, .*vocabulary of {largest} "):
        read(tmp_path / "a.txt", vocab_size=largest)


@pytest.mark.parametrize(("length", "max_tokens"), [(1, None), (8, 7)])
def test_impossible_sizes_are_refused(tmp_path: Path, length: int, max_tokens: int | None) -> None:
    (tmp_path / "a.txt").write_text("abcdefghijkl")
    with pytest.raises(CorpusError, match="expected"):
        load(tmp_path / "a.txt", length, max_tokens=max_tokens)
    with pytest.raises(CorpusError, match="expected"):
        held_out_windows(tmp_path / "a.txt", TOKENIZER, length=length, vocab_size=VOCAB, max_tokens=max_tokens)


# Datasets


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("org/name", ("org/name", None, "train")),
        ("name:config", ("name", "config", "train")),
        ("name:config@test", ("name", "config", "test")),
        ("name@test", ("name", None, "test")),
    ],
)
def test_a_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[str | None, ...]) -> None:
    calls = []

    def load_dataset(path: str, name: str | None, **kwargs: object) -> datasets.IterableDataset:
        calls.append((path, name, kwargs))
        return datasets.Dataset.from_dict({"text": ["abc", "def"], "id": [1, 2]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda *_, **__: None)
    assert load(source, 10).tokens.tolist() == [[BOS, *ids("abc"), EOS, BOS, *ids("def"), EOS]]
    assert calls == [(*asked[:2], {"split": asked[2], "streaming": True})]


def test_a_dataset_that_does_not_load_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CorpusError, match=r"^no-org/no-name: no such file or folder, and no dataset of this name can be read.*network"
    ) as caught:
        load("no-org/no-name")
    assert "\n" not in str(caught.value)
    with pytest.raises(CorpusError, match="expected name, name:config"):
        load("a:b:c")


def test_a_dataset_that_breaks_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda *_, **__: None)

    def broken(record: object) -> object:
        raise OSError("reset by peer\nmore")

    def streamed(texts: list[object]) -> datasets.IterableDataset:
        return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: streamed(["abc"]).map(broken))
    with pytest.raises(CorpusError, match=r"reset by peer more: check path"):
        load("name")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: streamed([1]))
    with pytest.raises(CorpusError, match=r"^name: record 0: text is of type int"):
        load("name")


# Evaluation windows


@settings(deadline=None, max_examples=80)
@given(documents, st.integers(2, 9), st.one_of(st.none(), st.integers(9, 60)))
def test_windows_hold_every_token_in_order(texts: list[str], length: int, max_tokens: int | None) -> None:
    texts = [text for text in texts if text.strip()]
    stream = [token for text in texts for token in [BOS, *ids(text)]]
    if len(stream) < length:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.txt"
        path.write_bytes("\f".join(texts).encode())
        windows = held_out_windows(path, TOKENIZER, length=length, vocab_size=VOCAB, max_tokens=max_tokens)
    assert windows.dtype == np.int32 and windows.shape[1] == length
    assert (windows[:, 0] == BOS).all() and (windows[:, 1] != BOS).all()
    at = 0
    for body in windows[:, 1:].tolist():
        at += stream[at] == BOS
        assert body == stream[at : at + length - 1]
        at += length - 1
    if max_tokens is None:
        assert len(stream) - at < length
    else:
        assert windows.size <= max_tokens
        assert len(stream) - at < length or windows.size + length > max_tokens


def test_windows_by_example(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcd\fefghi")
    a, b, c, d, e, f, g, h, _ = ids("abcdefghi")
    windows = held_out_windows(tmp_path / "a.txt", TOKENIZER, length=4, vocab_size=VOCAB)
    assert windows.tolist() == [[BOS, a, b, c], [BOS, d, BOS, e], [BOS, f, g, h]]


# Sampling


def sample(teacher: Gemma4ForCausalLM, **kwargs: object) -> Corpus:
    return sample_corpus(teacher, TOKENIZER, **{"tokens": 300, "sequence_length": 16, "seed": 5} | kwargs)


def test_sampling_is_deterministic_and_leaves_the_random_state(teacher: Gemma4ForCausalLM) -> None:
    before = torch.random.get_rng_state()
    heard = Mock()
    first = sample(teacher, progress=Progress(heard))
    progress = [call.args[0] for call in heard.part.call_args_list]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.tokens.shape == (19, 16) and progress[-1] == 19 * 16 and progress == sorted(set(progress))
    torch.rand(3)
    assert sample(teacher).digest == first.digest != sample(teacher, seed=6).digest


def test_sampled_documents_go_from_bos_to_eos(teacher: Gemma4ForCausalLM) -> None:
    def likelier_eos(_model: object, _inputs: object, output) -> None:  # type: ignore[no-untyped-def]
        output.logits[..., EOS] = output.logits.logsumexp(-1) - 2  # one token in eight
        output.logits[..., [BOS, PAD]] = -torch.inf  # so that a bos is a document's start

    hook = teacher.register_forward_hook(likelier_eos)
    corpus = sample(teacher, tokens=2000)
    hook.remove()
    stream = corpus.tokens.reshape(-1).tolist()
    assert stream[0] == BOS and PAD not in stream
    assert stream.count(EOS) > 20
    starts = [i for i, token in enumerate(stream) if token == BOS]
    for start, following in itertools.pairwise(starts):
        document = stream[start:following]
        assert document.index(EOS) == len(document) - 1 if EOS in document else len(document) == 16
    assert corpus.positions.tolist() == naive_positions(corpus.tokens)


def test_sampling_is_from_the_full_distribution(teacher: Gemma4ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"top_k": 1, "top_p": 0.1, "temperature": 0.01, "repetition_penalty": 1e-6}.items():
        monkeypatch.setattr(teacher.generation_config, name, value)
    corpus = sample(teacher, tokens=8000, sequence_length=2, batch_size=4000)
    assert (corpus.tokens[:, 0] == BOS).all()
    with torch.no_grad():
        expected = teacher(torch.tensor([[BOS]])).logits[0, 0].double().softmax(-1).numpy() * 4000
    counts = np.bincount(corpus.tokens[:, 1], minlength=VOCAB)
    assert ((counts - expected) ** 2 / expected).sum() < VOCAB + 6 * (2 * VOCAB) ** 0.5


def test_sampling_needs_bos_and_eos(teacher: Gemma4ForCausalLM) -> None:
    with pytest.raises(ConfigError, match="has bos None and eos 1"):
        sample_corpus(teacher, byte_tokenizer(bos_token=None), tokens=8, sequence_length=4, seed=0)


# Batches


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 30), st.integers(1, 70), st.integers(0, 3), st.integers(1, 12))
def test_batches_cover_each_epoch_once(n_sequences: int, batch_size: int, seed: int, steps: int) -> None:
    batches = [batch_indices(n_sequences, batch_size, seed, step) for step in range(steps)]
    assert all(batch.shape == (batch_size,) and batch.dtype == np.int64 for batch in batches)
    order = np.concatenate(batches)
    for start in range(0, len(order), n_sequences):
        epoch = order[start : start + n_sequences].tolist()
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(n_sequences))
    resumed = [batch_indices(n_sequences, batch_size, seed, step) for step in reversed(range(steps))]
    assert np.array_equal(np.concatenate(resumed[::-1]), order)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(batch_indices(50, 50, seed, step)) for seed in (0, 1) for step in (0, 1, 2)}
    assert len(orders) == 6
    straddling = batch_indices(50, 20, 0, 2)
    assert straddling[:10].tolist() == batch_indices(50, 50, 0, 0)[40:].tolist()
    assert straddling[10:].tolist() == batch_indices(50, 50, 0, 1)[:10].tolist()
