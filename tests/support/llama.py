"""A stand-in for llama.cpp's process that speaks as it does until it is told how to fail."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from intaglio.measure import llamacpp, process
from tests.support.tiny import VOCABULARY

STAND_IN = """
import json, os, signal, socket, sys, time
from pathlib import Path

Path(__file__).with_name(f"{os.getpid()}.pid").touch()
connection = socket.socket(fileno=int(sys.argv[1]))
answers = {"start": {"version": "0.0"}, "load": {"vocabulary": VOCABULARY}}
count = 0
for line in connection.makefile("rb"):
    asked = json.loads(line)
    Path(__file__).with_name(asked["do"]).write_bytes(line)
    count += asked["do"] == DO
    if count == TIME:
        FATE
    answer = answers.get(asked["do"], {}) | {"number": asked["number"]}
    connection.sendall(json.dumps(answer).encode() + b"\\n")
"""

FATES = {
    "SIGSEGV": "os.kill(os.getpid(), signal.SIGSEGV)",
    "SIGILL": "os.kill(os.getpid(), signal.SIGILL)",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",  # what the kernel sends when memory runs out
    "abort": "os.write(2, b'loading\\nggml.c:1: GGML_ASSERT(n > 0) failed\\n'); os.abort()",
    "exception": "raise MemoryError('no room')",
    "exit": "sys.exit()",
    "hang": "time.sleep(600)",
    "deaf": "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
    "garbage": "connection.sendall(b'\\xff\\x00 hello\\n')",
    "nesting": "connection.sendall(b'[' * 100_000 + b'\\n')",
    "other": "connection.sendall(b'[]\\n')",
    "twice": "connection.sendall(json.dumps({'number': asked['number'] - 1, 'version': ''}).encode() + b'\\n')",
    "flood": "connection.sendall(b'x' * 100_000_000)",
    "hang up": "connection.shutdown(socket.SHUT_RDWR); time.sleep(600)",
}


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, *, do: str, fate: str, time: int = 1) -> Path:
    """Put a stand-in in llama.cpp's place which fails at the given request of that name. Its folder, for `pids`.

    The processor has no AMX, whatever this machine's is: messages speak of it.
    """
    monkeypatch.setattr(process, "CPUINFO", folder / "cpuinfo")
    text = STAND_IN.replace("VOCABULARY", str(VOCABULARY)).replace("DO", repr(do)).replace("TIME", str(time))
    folder.mkdir(exist_ok=True)
    (folder / "stand_in.py").write_text(text.replace("FATE", FATES[fate]))
    monkeypatch.setattr(llamacpp, "SCRIPT", folder / "stand_in.py")
    monkeypatch.setattr(llamacpp, "installed", lambda: True)
    return folder


def tokenizer_of(gguf: Path) -> Any:
    """llama.cpp's tokenizer of a GGUF file: `llama_cpp.Llama` without weights."""
    import llama_cpp

    return llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)


def library(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    """Put a package of this text in llama-cpp-python's place, for this process and its children."""
    package = folder / "path/llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(text)
    (package / "llama_cpp.py").touch()
    monkeypatch.syspath_prepend(package.parent)
    for name in [name for name in sys.modules if name.split(".")[0] == "llama_cpp"]:
        monkeypatch.delitem(sys.modules, name)


def running(folder: Path) -> list[int]:
    """Process ids of stand-ins that are still there; at least one must have been started."""
    pids = [int(path.stem) for path in folder.glob("*.pid")]
    assert pids
    return [pid for pid in pids if is_alive(pid)]


def is_alive(pid: int) -> bool:
    """Whether there is such a process that has not ended: a zombie has, and waits for whoever reaps orphans."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
