"""Text from llama.cpp's own server, with a drafter or without, and what the server counted.

The server is a program of its own, since llama-cpp-python's bindings have no drafting. `make test-runtimes` builds
it; any other of the same age does too. Its settings are llama.cpp's, but for one request at a time.
"""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from intaglio.errors import ConfigError, InputError
from intaglio.measure.process import has_amx, last_words, read_log, read_patience, work_seconds

CHECKS = "llamacpp:spec_decode_num_drafts_total"


@dataclass(frozen=True)
class Completion:
    """The server's text after a prompt, and its statistics.

    tokens: ids, those of the prompt not among them. seconds: of generating, without the prompt. drafted, accepted:
    tokens that the drafter proposed, and those of them that the model would have written. checks: forwards of the
    model in which proposals were checked.
    """

    text: str
    tokens: tuple[int, ...]
    seconds: float
    drafted: int
    accepted: int
    checks: int


class LlamaServer:
    """A running server; a context manager.

    model, draft: GGUF files; a draft is that of a `gemma4-assistant`. draft_tokens: how many are proposed before the
    model checks them. Raises ConfigError, with the server's last words, for files that it does not load, and
    InputError for a request that it refuses. A server that dies or hangs raises OSError.
    """

    def __init__(
        self, model: Path, *, program: Path, draft: Path | None = None, draft_tokens: int = 3, threads: int = 1
    ):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = [program, "-m", model, "-c", 2048, "-np", 1, "--metrics", "--no-ui", "--offline"]
        command += ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2], "-t", threads, "-tb", threads]
        if draft is not None:
            command += ["-md", draft, "--spec-type", "draft-mtp", "--spec-draft-n-max", draft_tokens]
            command += ["-td", threads, "-tbd", threads]
        if has_amx():
            command += ["--no-repack"]  # AMX kernels die where gcc 12 built them
        self._bytes = sum(path.stat().st_size for path in (model, draft) if path is not None)
        self._web = build_opener(ProxyHandler({}))  # a proxy would not find this machine
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
        self._process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT
        )
        try:
            self._wait(model)
        except BaseException:
            self.close()
            raise

    def complete(
        self,
        prompt: str | Sequence[int],
        new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        past_end: bool = False,
    ) -> Completion:
        """Continue a prompt, text or token ids: greedily, or by a temperature from the whole distribution.

        past_end: go on where the text ends.
        """
        checks = self._checks()
        asked = {
            "prompt": prompt if isinstance(prompt, str) else [int(token) for token in prompt],
            "n_predict": new_tokens,
            "temperature": temperature,
            "seed": seed,
            "ignore_eos": past_end,
            "cache_prompt": False,
            "return_tokens": True,
            **({"samplers": ["temperature"]} if temperature else {}),
        }
        said: dict[str, Any] = json.loads(self._ask("/completion", len(prompt) + new_tokens, asked))
        timings = said["timings"]
        return Completion(
            text=said["content"],
            tokens=tuple(said["tokens"]),
            seconds=timings["predicted_ms"] / 1000,
            drafted=timings.get("draft_n", 0),
            accepted=timings.get("draft_n_accepted", 0),
            checks=self._checks() - checks,
        )

    def close(self) -> None:
        """Stop the server."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def __enter__(self) -> LlamaServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _wait(self, model: Path) -> None:
        """Return once the server has loaded its files."""
        end = time.monotonic() + work_seconds(self._bytes) * read_patience()
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with self._web.open(f"{self.url}/health", timeout=5):
                    return
            except (OSError, HTTPException):  # nobody listens yet, or 503: it is loading
                time.sleep(0.05)
        raise ConfigError(f"{model}: llama-server does not run this model: {last_words(read_log(self._log))}")

    def _checks(self) -> int:
        """Checks of drafts since the server began."""
        lines = self._ask("/metrics").decode("utf-8", "replace").splitlines()
        return next((int(float(line.split()[1])) for line in lines if line.startswith(CHECKS + " ")), 0)

    def _ask(self, path: str, tokens: int = 0, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with self._web.open(request, timeout=work_seconds(self._bytes, tokens) * read_patience()) as answer:
                read: bytes = answer.read()
                return read
        except HTTPError as error:
            raise InputError(f"llama-server: {error.read().decode('utf-8', 'replace')[:400]}") from None
