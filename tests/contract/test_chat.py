"""Chats with models in their runtimes: the same tokens, templates and logits in each, and the verb on a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.cli.talk import _Terminal
from intaglio.errors import ConfigError, InputError, WeightError
from intaglio.formats.mobile.write import export_mobile
from intaglio.formats.texts import fixed_texts
from intaglio.measure.candidates import open_engine
from intaglio.measure.engine import Engine, with_first, written
from intaglio.measure.evaluate import greedy
from intaglio.measure.llamacpp import LlamaCpp
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import load_model
from intaglio.packed.model import PackedModel
from intaglio.runs import chat as chat_module
from intaglio.runs.chat import chat
from tests.support.cases import Case
from tests.support.cli import intaglio

pytestmark = pytest.mark.runtime
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engines(cases: dict[str, Case]) -> Iterator[dict[str, Engine]]:
    """The same weights in llama.cpp, in transformers, and simulated."""
    case = cases["gemma4"]
    paths = {"gguf": case.gguf, "hf": case.hf, "packed": case.packed.path}
    with ExitStack() as stack:
        yield {name: open_engine(path, stack, context_tokens=64, device=CPU) for name, path in paths.items()}


def test_engines_read_and_write_the_same_text(engines: dict[str, Engine]) -> None:
    llama, hf = engines["gguf"], engines["hf"]
    for text in fixed_texts():
        tokens = hf.encode(text)
        assert llama.encode(text) == tokens, text
        if tokens:
            assert llama.text(tokens) == hf.text(tokens)
    for token in range(4096):  # of special ones, llama.cpp shows those that mark thoughts
        assert llama.text([token]) == hf.text([token]) or not hf.text([token]), token
    first = hf.encode("A whale")
    assert with_first(llama, first) == with_first(hf, first) == with_first(hf, [2, *first]) == [2, *first]


def test_a_gguf_has_the_folder_s_chat_format(engines: dict[str, Engine]) -> None:
    llama, hf = engines["gguf"].chat_format, engines["hf"].chat_format
    assert (llama.template, llama.first) == (hf.template, hf.first)
    assert {key: hf.special[key] for key in llama.special} == llama.special
    assert hf.ends <= llama.ends
    assert engines["packed"].chat_format == hf


@pytest.mark.parametrize("name", ["gguf", "hf", "packed"])
def test_what_follows_is_the_last_row_whatever_was_read_before(engines: dict[str, Engine], name: str) -> None:
    engine = engines[name]
    text = [2, *range(50, 1050, 20)]  # longer than the sliding window of 32
    reads = (text[:3], text[:4], text[:40], text, text[:2], text[:2], [2, 51, *text[2:]], text)
    found, atol = [engine.following(tokens) for tokens in reads], 1e-3 if name == "gguf" else 2e-5
    for row, tokens in zip(found, reads, strict=True):
        torch.testing.assert_close(row, engine.logits(tokens)[-1], atol=atol, rtol=0)
    torch.testing.assert_close(engine.logits(text, 3), engine.logits(text)[-3:], atol=atol, rtol=0)


def test_nan_is_no_answer(engines: dict[str, Engine]) -> None:
    engine = engines["hf"]
    norm = engine.model.model.norm.weight.data  # type: ignore[attr-defined]
    before = norm.clone()
    norm.fill_(torch.nan)
    try:
        for read in (engine.logits, engine.following):
            with pytest.raises(WeightError, match="NaN or Inf in the logits"):
                read([2, 50])
    finally:
        norm.copy_(before)


def test_engines_agree_within_llama_cpp_s_rounding(engines: dict[str, Engine]) -> None:
    tokens = [2, *torch.randint(16, 4000, (40,), generator=torch.Generator().manual_seed(0)).tolist()]
    hf, packed, llama = (engines[name].logits(tokens).log_softmax(-1) for name in ("hf", "packed", "gguf"))
    torch.testing.assert_close(packed, hf, atol=2e-5, rtol=0)
    assert 0 < (llama - hf).abs().max() < 1


def test_the_likeliest_tokens_are_those_of_transformers_own_loop(engines: dict[str, Engine], gemma4: Case) -> None:
    prompt = "The whale swam"
    expected = greedy(load_model(gemma4.hf), load_tokenizer(gemma4.hf), [prompt], 12)[0]
    tokens = with_first(engines["hf"], engines["hf"].encode(prompt))
    texts = list(written(engines["hf"], tokens, 12))
    assert texts[-1] == expected and len(texts) == 12


def test_a_temperature_samples_and_repeats(engines: dict[str, Engine]) -> None:
    def end(temperature: float, seed: int) -> str:
        return list(written(engines["hf"], [2, 50], 8, temperature=temperature, seed=seed))[-1]

    assert end(50.0, 0) == end(50.0, 0) != end(50.0, 1)
    assert end(1e-4, 0) == end(1e-4, 1) == end(0.0, 5)


def test_it_ends_at_an_end_and_where_the_context_is_full(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines["gguf"]
    assert len(list(written(engine, [2, 50], 500))) == engine.context_tokens - 2
    ends = iter([5, 5, 1])
    monkeypatch.setattr(LlamaCpp, "following", lambda self, tokens: torch.eye(4096)[next(ends)])
    assert len(list(written(engine, [2, 50], 500))) == 2


# The conversation


def test_a_conversation_goes_on_and_the_original_has_its_own(gemma4: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answers(engine: Engine, prompt: list[int], most: int, temperature: float) -> Iterator[str]:
        asked.append(load_tokenizer(gemma4.hf).decode(prompt))
        yield from ("no\ufffd", f"noö {len(asked)}")

    monkeypatch.setattr(chat_module, "written", answers)
    heard: list[tuple[str, str]] = []
    prompts = ["Who swam?", "And then?"]
    found = list(
        chat(gemma4.gguf, prompts, beside=gemma4.hf, device=CPU, on_text=lambda *said: heard.append(said) or True)
    )
    names = ["model.gguf", gemma4.hf.parent.name]
    assert [answer.model for answer in found] == names * 2
    assert ["llama.cpp" in answer.runtime for answer in found] == [True, False] * 2
    assert [answer.text for answer in found] == [f"noö {number}" for number in (1, 2, 3, 4)]
    turn = "<bos><|turn>user\n{}<turn|>\n<|turn>model\n"
    assert asked[:2] == [turn.format("Who swam?")] * 2
    assert asked[2:] == [
        asked[0] + f"noö {number}<turn|>\n" + turn.format("And then?").removeprefix("<bos>") for number in (1, 2)
    ]
    assert heard[:3] == [(names[0], "no"), (names[0], "ö 1"), (names[0], "")]


def test_an_answer_stops_when_it_is_told_to(gemma4: Case) -> None:
    count = iter(range(100))
    answer = next(chat(gemma4.hf, ["Hi"], tokens=50, device=CPU, on_text=lambda model, text: next(count) < 3))
    assert answer.tokens == 4 and answer.tokens_per_second and answer.first_seconds > 0


def test_raw_text_needs_no_template(gemma4: Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gemma4.hf, tmp_path / "hf"))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template: give it text"):
        next(chat(folder, ["Hi"], device=CPU))
    answers = list(chat(folder, ["Hi\udcff", "Hi?"], tokens=4, raw=True, device=CPU))
    assert answers[0].text == answers[1].text
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        next(chat(folder, ["Hi"], raw=True, device=CPU))


def test_a_template_that_refuses_and_a_context_that_is_full_say_so(gemma4: Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gemma4.hf, tmp_path / "hf"))
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no chats') }}")
    with pytest.raises(ConfigError, match=r"refuses this conversation.*no chats"):
        next(chat(folder, ["Hi"], device=CPU))
    with pytest.raises(InputError, match="expected fewer than the 8 of the context"):
        next(chat(gemma4.gguf, "word " * 20, context_tokens=8, device=CPU))


def test_a_mobile_folder_answers(mobile_packed: PackedModel, tmp_path: Path) -> None:
    export_mobile(mobile_packed, tmp_path / "mobile")
    answers = [next(chat(p, ["Hi"], tokens=3, device=CPU)) for p in (tmp_path / "mobile", mobile_packed.path)]
    assert [answer.tokens for answer in answers] == [3, 3]


# The verb


def test_the_verb_prints_answers_and_speeds(gemma4: Case) -> None:
    command = ["chat", gemma4.gguf, "--prompt=Who swam?", "--prompt=Why?", "--tokens=5"]
    found = json.loads(intaglio(*command, "--json").out)
    assert [row["tokens"] for row in found] == [5, 5]
    outcome = intaglio(*command)
    assert outcome.code == 0 and outcome.out == "".join(f"{row['text']}\n" for row in found)
    assert len(re.findall(r"\[llama.cpp .*: 5 tokens, [\d.]+ tokens/s, the first after", outcome.err)) == 2
    outcome = intaglio(*command[:3], "--tokens=5", f"--beside={gemma4.checkpoint}")
    assert [line for line in outcome.out.splitlines() if line.endswith(":")] == [
        "model.gguf:",
        f"{gemma4.checkpoint.parent.name}:",
    ]
    assert intaglio("chat", gemma4.gguf, "--json").code == 2


def test_what_a_model_writes_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    _Terminal(named=False, silent=False).show("model", "a\x1b[2Jb\x9bc\td\n")
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffdc\td\n"


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
@pytest.mark.parametrize(("lines", "prompts"), [(["Who?", "Why?"], 2), (["Who?", "", "Why?"], 1), ([], 0)])
def test_lines_are_prompts_until_their_end(
    lines: list[str], prompts: int, end: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[Any] = [*lines, end]

    def read(asked: str) -> str:
        line = left.pop(0)
        if line is end:
            raise end
        return str(line)

    monkeypatch.setattr("builtins.input", read)
    before = signal.getsignal(signal.SIGINT)
    assert list(_Terminal(named=False, silent=False).prompts()) == lines[:prompts]
    assert signal.getsignal(signal.SIGINT) is before


def test_on_a_terminal_ctrl_c_ends_an_answer_and_ctrl_d_the_chat(gemma4: Case) -> None:
    """The random model would write the same token until its context is full."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from intaglio.cli import main; main()"]
    command += ["chat", str(gemma4.gguf), "--tokens=100000", "--context=100000"]
    with subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,  # so that Ctrl-C reaches it
    ) as process:
        try:
            os.close(theirs)
            read_until(ours, b"> ")
            os.write(ours, b"Who swam?\n")
            read_until(ours, b"\n\r\n\r\n")
            os.write(ours, b"\x03")
            said = read_until(ours, b"> ")
            tokens = re.search(rb"(\d+) tokens, .* the first after", said)
            assert tokens and int(tokens[1]) < 99_000 and b"Traceback" not in said
            os.write(ours, b"\x04")
            assert process.wait(60) == 0
        finally:
            process.kill()
            os.close(ours)


def read_until(terminal: int, wanted: bytes) -> bytes:
    """What is written to a terminal until something wanted has come."""
    found = b""
    while wanted not in found:
        assert select.select([terminal], [], [], 60)[0], found
        found += os.read(terminal, 1 << 12)
    return found
