"""The client of llama.cpp's server, against a stand-in that speaks as it does; the real one is in tests/runtimes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.runners.llama_server import LlamaServer
from intaglio.errors import ConfigError, InputError
from intaglio.measure import process

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
def behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which must not be asked for this machine."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


@pytest.mark.usefixtures("behind_a_proxy")
def test_a_drafter_goes_along_and_is_counted(files: tuple[Path, Path], program: Path) -> None:
    model, draft = files
    with LlamaServer(model, draft=draft, draft_tokens=4, threads=2, program=program) as server:
        server.complete([2, 5], 2)
        found = server.complete([2, 5], 2, past_end=True)
        process = server._process
    asked, options = json.loads(found.text)
    assert (asked["prompt"], asked["n_predict"], asked["temperature"], asked["ignore_eos"]) == ([2, 5], 2, 0, True)
    assert asked["cache_prompt"] is False and "samplers" not in asked
    given = {"-m": str(model), "-md": str(draft), "--spec-type": "draft-mtp", "--spec-draft-n-max": "4", "-t": "2"}
    assert given.items() <= options.items()
    assert (found.tokens, found.seconds, found.drafted, found.accepted, found.checks) == ((7, 8), 0.5, 9, 5, 3)
    assert process.poll() is not None


def test_without_a_drafter_nothing_is_drafted(files: tuple[Path, Path], program: Path) -> None:
    with LlamaServer(files[0], program=program) as server:
        found = server.complete("Hello", 2, temperature=0.7, seed=3)
        with pytest.raises(InputError, match="prompt is empty"):
            server.complete("", 2)
    asked, options = json.loads(found.text)
    assert (asked["temperature"], asked["seed"], asked["samplers"]) == (0.7, 3, ["temperature"])
    assert "-md" not in options and "--spec-type" not in options
    assert (found.drafted, found.checks) == (0, 0)


def test_a_server_that_dies_says_why(files: tuple[Path, Path], tmp_path: Path) -> None:
    text = "#!/bin/sh\necho 'loading'\necho 'error: unknown architecture'\nexit 1\n"
    with pytest.raises(ConfigError, match=r"model\.gguf: llama-server does not run this model: error: unknown arch"):
        LlamaServer(files[0], program=script(tmp_path, text))


def test_on_a_processor_with_amx_its_kernels_are_off(files: tuple[Path, Path], program: Path, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu amx_tile\n")
    with LlamaServer(files[0], program=program) as server:
        assert "--no-repack" in json.loads(server.complete("Hello", 2).text)[1].values()
