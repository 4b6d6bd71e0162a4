"""The client of llama.cpp's server, against a stand-in that speaks as it does; the real one is in tests/runtimes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from intaglio.errors import ConfigError, InputError, RuntimeFailureError
from intaglio.measure import llama_server, process
from intaglio.measure.llama_server import LlamaServer
from tests.support.cli import wait_until
from tests.support.llama import is_alive

STAND_IN = r"""#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

options = dict(zip(sys.argv[1:], sys.argv[2:]))
loading, steps = 2, 0

class Handler(BaseHTTPRequestHandler):
    def say(self, status, text):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        global loading
        loading -= 1
        if self.path == "/health":
            self.say(503 if loading >= 0 else 200, "")
        else:
            name = "llamacpp:spec_decode_num_drafts_total"
            self.say(200, f"# HELP {{name}} checks of drafts\n{{name}} {{steps}}\n")

    def do_POST(self):
        global steps
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["prompt"] == "":
            return self.say(400, '{{"error": {{"message": "prompt is empty"}}}}')
        if asked["prompt"] == "nonsense":
            return self.say(200, "<html>")
        timings = {{"predicted_ms": 500.0}}
        if "-md" in options:
            timings |= {{"draft_n": 9, "draft_n_accepted": 5}}
            steps += 3
        self.say(200, json.dumps({{"content": json.dumps([asked, options]), "tokens": [7, 8], "timings": timings}}))

    def log_message(self, *args):
        pass

HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""


def script(folder: Path, text: str) -> Path:
    path = folder / "llama-server"
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def _no_amx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor has none, whatever this machine's is: messages speak of it."""
    monkeypatch.setattr(process, "CPUINFO", tmp_path / "cpuinfo")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("model.gguf", "draft.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    return tmp_path / "model.gguf", tmp_path / "draft.gguf"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return script(tmp_path, STAND_IN.format(python=sys.executable))


@pytest.fixture
def behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A proxy that nobody may ask for an address of this machine."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    yield


@pytest.mark.usefixtures("behind_a_proxy")
def test_a_drafter_goes_along_and_is_counted(files: tuple[Path, Path], program: Path) -> None:
    model, draft = files
    with LlamaServer(model, draft=draft, draft_tokens=4, context_tokens=99, threads=2, program=program) as server:
        server.complete([2, 5], 2)
        found = server.complete([2, 5], 2, past_end=True)
        process = server._process
    asked, options = json.loads(found.text)
    assert (asked["prompt"], asked["n_predict"], asked["temperature"], asked["ignore_eos"]) == ([2, 5], 2, 0, True)
    assert asked["cache_prompt"] is False and "samplers" not in asked
    given = {"-m": str(model), "-md": str(draft), "--spec-type": "draft-mtp", "--spec-draft-n-max": "4", "-c": "99"}
    assert given.items() <= options.items()
    assert (found.tokens, found.seconds, found.drafted, found.accepted, found.checks) == ((7, 8), 0.5, 9, 5, 3)
    assert found.acceptance == pytest.approx(5 / 9) and found.mean_length == pytest.approx(1 + 5 / 3)
    assert process.poll() is not None


def test_without_a_drafter_nothing_is_drafted(files: tuple[Path, Path], program: Path) -> None:
    with LlamaServer(files[0], program=program) as server:
        found = server.complete("Hello", 2, temperature=0.7, seed=3)
        server.close()
    asked, options = json.loads(found.text)
    assert (asked["temperature"], asked["seed"], asked["samplers"]) == (0.7, 3, ["temperature"])
    assert "-md" not in options and "--spec-type" not in options
    assert (found.drafted, found.checks) == (0, 0)
    assert math.isnan(found.acceptance) and math.isnan(found.mean_length)


def test_a_refused_prompt_says_why(files: tuple[Path, Path], program: Path) -> None:
    with LlamaServer(files[0], program=program) as server, pytest.raises(InputError, match="prompt is empty"):
        server.complete("", 2)


def test_a_server_that_dies_says_why(files: tuple[Path, Path], program: Path, tmp_path: Path) -> None:
    text = "#!/bin/sh\necho 'loading'\necho 'error: unknown architecture'\nexit 1\n"
    with pytest.raises(ConfigError, match=r"model\.gguf: llama-server does not run this model: error: unknown arch"):
        LlamaServer(files[0], program=script(tmp_path, text))


STARTS = {
    "kill -SEGV $$": (
        RuntimeFailureError,
        r"llama-server ended with signal 11 while it loaded model\.gguf; see docs",
    ),
    "kill -KILL $$": (RuntimeFailureError, r"llama-server ended with signal 9 while it .*; systems do this .* memory"),
    "echo 'GGML_ASSERT(x) failed'; kill -ABRT $$": (
        RuntimeFailureError,
        r"signal 6 .*its last words: GGML_ASSERT",
    ),
    "exec sleep 600": (RuntimeFailureError, r"llama-server gave no answer for [\d.]+ s while it loaded model\.gguf"),
    "exit 0": (ConfigError, "does not run this model: it gave no reason"),
}


@pytest.mark.parametrize("text", STARTS)
def test_a_server_that_does_not_start_says_why(files: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    error, message = STARTS[text]
    program = script(tmp_path, f"#!/bin/sh\necho $$ > {tmp_path}/pid\n{text}\n")
    with pytest.raises(error, match=message):
        LlamaServer(files[0], program=program, patience=0.05 if "sleep" in text else None)
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_program_that_the_system_does_not_run_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"llama-server cannot be started: .*/llama-server: Exec format error"):
        LlamaServer(files[0], program=script(tmp_path, "\x7fELF of another machine"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (signal.SIGKILL, r"llama-server ended with signal 9 at /metrics; systems do this"),
        (signal.SIGSEGV, r"llama-server ended with signal 11 at /metrics; see docs/gguf\.md"),
        (signal.SIGSTOP, r"llama-server gave no answer for 0\.6 s at /metrics and was stopped"),
    ],
)
def test_a_running_server_that_fails_says_why(
    files: tuple[Path, Path], program: Path, how: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_server, "STOP_SECONDS", 1)
    with LlamaServer(files[0], program=program) as server:
        server._patience = 0.01
        os.kill(server._process.pid, how)
        with pytest.raises(RuntimeFailureError, match=message) as error:
            server.complete("Hello", 2)
        assert error.value.exit_code == 1
        assert not is_alive(server._process.pid)
        with pytest.raises(RuntimeFailureError, match="start it again"):
            server.complete("Hello", 2)


def test_an_answer_that_is_none_is_shown(files: tuple[Path, Path], program: Path) -> None:
    with LlamaServer(files[0], program=program) as server, pytest.raises(RuntimeFailureError, match="no completion"):
        server.complete("nonsense", 2)


def test_on_a_processor_with_amx_its_kernels_are_off(files: tuple[Path, Path], program: Path, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu amx_tile\n")
    with LlamaServer(files[0], program=program) as server:
        assert "--no-repack" in json.loads(server.complete("Hello", 2).text)[1].values()


def test_the_server_ends_with_its_parent(files: tuple[Path, Path], program: Path) -> None:
    text = "import sys, time; from intaglio.measure.llama_server import LlamaServer as Server; "
    text += "s = Server(sys.argv[1], program=sys.argv[2]); print(s._process.pid, flush=True); time.sleep(600)"
    command = [sys.executable, "-c", text, str(files[0]), str(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        wait_until(lambda: not is_alive(pid))


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_what_is_missing_is_named(files: tuple[Path, Path], program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, draft = files
    with pytest.raises(InputError, match="draft length 0: expected 1 or more"):
        LlamaServer(model, draft=draft, draft_tokens=0, program=program)
    with pytest.raises(ConfigError, match=r"none\.gguf: no such file"):
        LlamaServer(model, draft=draft.with_name("none.gguf"), program=program)
    with pytest.raises(InputError, match=r"/nowhere/llama-server: no such program: build .* with `make"):
        LlamaServer(model, program="/nowhere/llama-server")
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(InputError, match="llama-server: no such program"):
        LlamaServer(model)
