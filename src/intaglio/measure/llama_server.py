"""Greedy and sampled text from llama.cpp's own server, with a drafter or without, and what it counted.

The server is a program of its own, since llama-cpp-python's bindings have no drafting. `make test-runtimes` builds
it; any other of the same age does too. Its settings are llama.cpp's, but for one request at a time.
"""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from intaglio.errors import ConfigError, InputError

PROGRAM = "llama-server"
START_SECONDS = 300  # until a large model is read from a slow disk
STOP_SECONDS = 10
POLL_SECONDS = 0.05
CHECKS = "llamacpp:spec_decode_num_drafts_total"


@dataclass(frozen=True)
class Completion:
    """What the server wrote after a prompt, and its statistics.

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

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted; NaN if none was drafted."""
        return self.accepted / self.drafted if self.drafted else math.nan

    @property
    def mean_length(self) -> float:
        """Tokens that one check of a draft yields, the model's own next one included; NaN if none was drafted."""
        return 1 + self.accepted / self.checks if self.checks else math.nan


class LlamaServer:
    """A running server; a context manager.

    model, draft: GGUF files; a draft is that of a `gemma4-assistant`. draft_tokens: how many are proposed before
    the model checks them. context_tokens: prompt and continuation. threads: None for llama.cpp's own choice.
    program: the server's; None to look for it on the PATH.

    Raises InputError if there is no such program, and ConfigError, with the server's last words, for files that it
    does not load.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        draft: str | Path | None = None,
        draft_tokens: int = 3,
        context_tokens: int = 2048,
        threads: int | None = None,
        program: str | Path | None = None,
    ):
        if draft_tokens < 1:
            raise InputError(f"draft length {draft_tokens}: expected 1 or more tokens; leave the drafter out for none")
        found = find_program(program)
        for path in (model, *([draft] if draft is not None else [])):
            if not Path(path).is_file():
                raise ConfigError(f"{path}: no such file: expected a GGUF model")
        self.url = f"http://127.0.0.1:{_free_port()}"
        command = [found, "-m", model, "-c", context_tokens, "-np", 1, "--metrics", "--no-ui", "--offline"]
        command += ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2]]
        if threads is not None:
            command += ["-t", threads, "-tb", threads]
        if draft is not None:
            command += ["-md", draft, "--spec-type", "draft-mtp", "--spec-draft-n-max", draft_tokens]
            command += ["-td", threads, "-tbd", threads] if threads is not None else []
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
        self._web = build_opener(ProxyHandler({}))  # a proxy would not find this machine
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

        past_end: go on where the text ends. Raises InputError for a prompt that the server refuses.
        """
        checks = self._checks()
        answer = self._ask(
            "/completion",
            {
                "prompt": prompt if isinstance(prompt, str) else [int(token) for token in prompt],
                "n_predict": new_tokens,
                "temperature": temperature,
                "seed": seed,
                "ignore_eos": past_end,
                "cache_prompt": False,
                "return_tokens": True,
                **({"samplers": ["temperature"]} if temperature else {}),
            },
        )
        said = json.loads(answer)
        timings = said["timings"]
        return Completion(
            text=said["content"],
            tokens=tuple(said["tokens"]),
            seconds=timings["predicted_ms"] / 1000,
            drafted=timings.get("draft_n", 0),
            accepted=timings.get("draft_n_accepted", 0),
            checks=self._checks() - checks,
        )

    def log(self) -> str:
        """All that the server has printed."""
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace")

    def close(self) -> None:
        """Stop the server. May be called twice."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    def __enter__(self) -> LlamaServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _wait(self, model: str | Path) -> None:
        """Until the server has loaded its files."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise ConfigError(f"{model}: {PROGRAM} does not run this model: {_last_words(self.log())}")
            try:
                with self._web.open(f"{self.url}/health", timeout=5):
                    return
            except OSError:  # nobody listens yet, or 503: it is loading
                time.sleep(POLL_SECONDS)
        raise ConfigError(f"{model}: {PROGRAM} is not ready after {START_SECONDS} s: {_last_words(self.log())}")

    def _checks(self) -> int:
        """Checks of drafts since the server began."""
        lines = self._ask("/metrics").decode("utf-8").splitlines()
        return next((int(float(line.split()[1])) for line in lines if line.startswith(CHECKS + " ")), 0)

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        try:
            with self._web.open(Request(self.url + path, data, {"Content-Type": "application/json"})) as answer:
                return answer.read()
        except HTTPError as error:
            raise InputError(f"{PROGRAM}: {error.read().decode('utf-8', 'replace')[:400]}") from None
        except OSError as error:
            raise InputError(f"{PROGRAM} does not answer ({error}): {_last_words(self.log())}") from error


def find_program(program: str | Path | None = None) -> str:
    """Path of the server: this one, or the one on the PATH. InputError if there is none."""
    found = shutil.which(str(program or PROGRAM))
    if found is None:
        raise InputError(
            f"{program or PROGRAM}: no such program: build llama.cpp's server with `make .runtimes/llamacpp/.done`, "
            f"which leaves .runtimes/llamacpp/bin/{PROGRAM}, or install llama.cpp"
        )
    return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _last_words(log: str) -> str:
    """What of a log says why."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if any(word in line.lower() for word in ("error", "failed", "assert", "invalid"))]
    return " | ".join((errors or lines)[-3:])[:600] or "it gave no reason"
