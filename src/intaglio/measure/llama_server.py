"""Greedy and sampled text from llama.cpp's own server, with a drafter or without, and what it counted.

The server is a program of its own, since llama-cpp-python's bindings have no drafting. `make test-runtimes` builds
it; any other of the same age does too. Its settings are llama.cpp's, but for one request at a time.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from intaglio.errors import ConfigError, InputError, RuntimeFailureError
from intaglio.measure.process import ending, hanging, has_amx, last_words, read_log, read_patience, work_seconds

PROGRAM = "llama-server"
STOP_SECONDS = 10
POLL_SECONDS = 0.05
CHECKS = "llamacpp:spec_decode_num_drafts_total"
CANNOT_START = 127  # the guard's exit code, as a shell has it
# Linux ends the server with the thread that started it, and so leaves none behind (prctl(2), PR_SET_PDEATHSIG is 1).
GUARD = """
import ctypes, os, signal, sys
prctl = getattr(ctypes.CDLL(None), "prctl", None)
if prctl:
    prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        os._exit(1)
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    print(f"{sys.argv[2]}: {error.strerror}")
    sys.exit(127)
"""


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
    program: the server's; None to look for it on the PATH. patience: a factor for the time limits; None for
    INTAGLIO_PATIENCE in the environment, or 1.

    Raises InputError if there is no such program, ConfigError, with the server's last words, for files that it
    does not load, and RuntimeFailureError, also from every method, if it dies, hangs or is killed.
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
        patience: float | None = None,
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
        if has_amx():
            command += ["--no-repack"]  # AMX kernels die where gcc 12 built them
        self._patience = read_patience() if patience is None else patience
        self._bytes = sum(Path(path).stat().st_size for path in (model, draft) if path is not None)
        guarded = [sys.executable, "-S", "-E", "-c", GUARD, os.getpid(), *command]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
        self._web = build_opener(ProxyHandler({}))  # a proxy would not find this machine
        try:
            self._process = subprocess.Popen(
                [str(part) for part in guarded], stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT
            )
        except OSError as error:  # no memory or no processes left
            raise RuntimeFailureError(f"{PROGRAM} cannot be started: {error.strerror or error}") from None
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
            work_seconds(self._bytes, len(prompt) + new_tokens),
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
        try:
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
        except (ValueError, TypeError, KeyError):
            self._fail(f"{PROGRAM} answered {answer[:200]!r}, which is no completion")

    def log(self) -> str:
        """The end of what the server has printed."""
        return read_log(self._log)

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
        where, seconds = f"while it loaded {Path(model).name}", work_seconds(self._bytes) * self._patience
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            code = self._process.poll()
            if code == CANNOT_START:
                raise InputError(f"{PROGRAM} cannot be started: {last_words(self.log())}")
            if code is not None and code >= 0:
                said = last_words(self.log()) or "it gave no reason"
                raise ConfigError(f"{model}: {PROGRAM} does not run this model: {said}")
            if code is not None:
                raise RuntimeFailureError(ending(PROGRAM, code, where, self.log()))
            try:
                with self._web.open(f"{self.url}/health", timeout=min(5, seconds)):
                    return
            except (OSError, HTTPException):  # nobody listens yet, or 503: it is loading
                time.sleep(POLL_SECONDS)
        raise RuntimeFailureError(hanging(PROGRAM, seconds, where))

    def _checks(self) -> int:
        """Checks of drafts since the server began."""
        lines = self._ask("/metrics", work_seconds(self._bytes)).decode("utf-8", "replace").splitlines()
        return next((int(float(line.split()[1])) for line in lines if line.startswith(CHECKS + " ")), 0)

    def _ask(self, path: str, seconds: float, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        seconds, where = seconds * self._patience, f"at {path}"
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        if self._log.closed:
            raise RuntimeFailureError(f"{PROGRAM} was stopped before {path}: start it again")
        try:
            with self._web.open(request, timeout=seconds) as answer:
                read: bytes = answer.read()
                return read
        except HTTPError as error:
            raise InputError(f"{PROGRAM}: {error.read().decode('utf-8', 'replace')[:400]}") from None
        except (OSError, HTTPException) as error:
            if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
                self._fail(hanging(PROGRAM, seconds, where))
            try:
                code = self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._fail(f"{PROGRAM} does not answer {where} ({error}) and was stopped: {last_words(self.log())}")
            self._fail(ending(PROGRAM, code, where, self.log()))

    def _fail(self, message: str) -> NoReturn:
        self._process.kill()
        self.close()
        raise RuntimeFailureError(message) from None


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
        return int(listener.getsockname()[1])
