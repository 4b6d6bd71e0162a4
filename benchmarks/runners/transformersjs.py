"""Transformers.js as a runner: a process of node that answers requests, here and in a browser."""

from __future__ import annotations

import atexit
import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from runner import Runtime

SCRIPT = Path(__file__).with_name("transformersjs.mjs")
MODULES = Path(sys.prefix) / "node_modules"


class Process:
    """A process that reads requests from its standard input, a line each, and answers in a line."""

    def __init__(self, device: str, target: str) -> None:
        command = ["node", str(SCRIPT), str(MODULES), device, target]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def ask(self, kind: str, **body: Any) -> Any:
        """The answer to a request."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"kind": kind, **body}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "it ended without an answer"}
        if "error" in answer:
            raise SystemExit(f"{SCRIPT.name}: {answer['error']}")
        return answer["result"]


def serve(folder: Path) -> str:
    """The address at which a page's own server, started here, has it."""
    server = subprocess.Popen([sys.executable, str(folder / "serve.py"), "0"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    atexit.register(server.terminate)
    return server.stdout.readline().strip()


def loader(device: str) -> Callable[[Path], Runtime]:
    """device: "node", for an ONNX folder; "wasm" or "webgpu", for a page in Chromium."""

    def load(path: Path) -> Runtime:
        path = path.resolve()
        process = Process(device, str(path) if device == "node" else serve(path))

        def logits(ids: np.ndarray) -> np.ndarray:
            flat = np.frombuffer(base64.b64decode(process.ask("logits", ids=ids.tolist())), np.float32)
            return flat.reshape(len(ids), -1)

        def greedy(prompt: np.ndarray, count: int) -> list[int]:
            return process.ask("greedy", ids=prompt.tolist(), tokens=count)

        return Runtime(process.about, logits, greedy)

    return load
