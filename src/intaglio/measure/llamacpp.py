"""Logits of a GGUF file from llama.cpp itself, in a process of its own.

Shape suffixes: T tokens, V vocabulary.

llama.cpp is native code that is not ours. It may crash, hang, or be killed for its memory, so it runs in a child
(`llama_child.py`, through llama-cpp-python's C bindings), and its end is a RuntimeFailureError here.

The settings leave the weights' own arithmetic and switch off what would blur a comparison: the KV
cache is float32 (llama.cpp's default is float16) and flash attention is off. What remains of
llama.cpp's own rounding, mainly activations rounded to 8 bits in front of each quantized matrix,
is part of what its users get, and so of the measurement.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import ConfigError, InputError, IntaglioError, RuntimeFailureError
from intaglio.measure import llama_child
from intaglio.measure.engine import ChatFormat
from intaglio.measure.llama_child import BATCH_TOKENS
from intaglio.measure.process import START_SECONDS, Child, has_amx, work_seconds

SCRIPT = Path(llama_child.__file__)
SHARED_BYTES = 1 << 26  # of logits that pass from process to process at once
MOST_TOKENS = 1 << 24  # of a vocabulary that is not nonsense
ANSWER_SECONDS = 60.0  # limit for requests that compute next to nothing
NEWER_TYPE = "invalid ggml type"  # as llama.cpp says it of a type that it has no number for
OUT_OF_MEMORY = ("bad_alloc", "insufficient memory", "Cannot allocate memory")  # as llama.cpp says it
EXTRA_BUFFERS_OFF = ", extra buffers off: the processor has AMX"


class LlamaCpp:
    """A GGUF file loaded in llama.cpp; a context manager. One context serves every call.

    path: the file. context_tokens: longest window.
    threads: None for as many as torch takes. patience: a factor for the time limits; None for INTAGLIO_PATIENCE in the
    environment, or 1.

    Raises InputError without llama-cpp-python, ConfigError, with llama.cpp's last words, for a file that it does
    not load, and RuntimeFailureError, also from every method, if its process dies, hangs, is killed or gets no memory.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        context_tokens: int = 2048,
        threads: int | None = None,
        patience: float | None = None,
    ):
        self._path, self.context_tokens, self._windows, self._read = Path(path), context_tokens, 0, list[int]()
        if not self._path.is_file():
            raise ConfigError(f"{path}: no such file: expected a GGUF model")
        self._bytes = self._path.stat().st_size
        extra_buffers = not has_amx()  # AMX kernels are among them, and die where gcc 12 built them
        self._child, version = _start(patience)
        self.version = f"llama.cpp (llama-cpp-python {version}{'' if extra_buffers else EXTRA_BUFFERS_OFF})"
        try:
            found = self._ask(
                "load",
                {"vocabulary": int},
                seconds=work_seconds(self._bytes),
                where=f"while it loaded {self._path.name}",
                path=str(self._path.absolute()),
                context_tokens=context_tokens,
                threads=threads or torch.get_num_threads(),
                extra_buffers=extra_buffers,
            )
            self.vocabulary: int = found["vocabulary"]
            if not 0 < self.vocabulary <= MOST_TOKENS:
                raise ConfigError(f"{path}: llama.cpp reads a vocabulary of {self.vocabulary} tokens from it")
            self._shared_rows = max(1, SHARED_BYTES // (4 * self.vocabulary))
            memory = self._child.share(4 * self._shared_rows * self.vocabulary)
            self._shared_RV = torch.frombuffer(memory, dtype=torch.float32).view(self._shared_rows, self.vocabulary)
        except BaseException:
            self.close()
            raise

    def logits(self, tokens_T: Tensor | Sequence[int], last: int | None = None) -> Tensor:
        """float32 [T, V], on the CPU, of one window without any history; of its `last` tokens alone if that is given.

        Raises InputError for a window that is empty or longer than the context, and for token ids
        outside the vocabulary; RuntimeFailureError also for NaN or Inf.
        """
        tokens = self._check(tokens_T)
        self._windows += 1
        where = "at the first window" if self._windows == 1 else f"at window {self._windows}"
        return self._logits(tokens, 0, last or len(tokens), where)

    def following(self, tokens: Sequence[int]) -> Tensor:
        """float32 [V]: logits of what follows these tokens. If they continue the last ones, only the rest is read.

        Raises as `logits`.
        """
        checked, read = self._check(tokens), self._read
        start = len(read) if read == checked[: len(read)] and len(read) < len(checked) else 0
        row_V = self._logits(checked, start, 1, f"at token {len(checked)}")[0]
        self._read = checked
        return row_V

    @cached_property
    def chat_format(self) -> ChatFormat:
        """The file's own chat template and special tokens."""
        kinds = {"template": str, "first": int, "special": dict, "ends": list}
        said = self._ask("chat_format", kinds, where="while its tokenizer was read")
        return ChatFormat(said["template"], said["special"], said["first"], frozenset(said["ends"]))

    def encode(self, text: str) -> list[int]:
        """Tokens of a text by llama.cpp's tokenizer; none is put before it."""
        return list(self._ask("encode", {"tokens": list}, where="at a text", text=text)["tokens"])

    def text(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        return str(self._ask("text", {"text": str}, where="at an answer", tokens=list(tokens))["text"])

    def close(self) -> None:
        """End the process, and free the model's memory with it. Calling it twice is fine."""
        self._child.close()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _logits(self, tokens: list[int], start: int, last: int, where: str) -> Tensor:
        """Logits [last, V] of the last tokens. Those before `start` are read already."""
        self._read = []  # whatever happens now
        logits_TV, skipped = torch.empty(last, self.vocabulary), len(tokens) - last
        for at in range(start, len(tokens), BATCH_TOKENS):
            piece = tokens[at : at + BATCH_TOKENS]
            end = at + len(piece) - skipped  # in logits_TV
            count = min(len(piece), max(0, end))
            seconds = work_seconds(self._bytes, len(piece))
            self._ask("decode", {}, seconds=seconds, where=where, tokens=piece, position=at, rows=count)
            for first in range(0, count, self._shared_rows):
                stop = min(first + self._shared_rows, count)
                self._ask("rows", {}, where=where, start=first, stop=stop)
                rows = self._shared_RV[: stop - first]
                if not math.isfinite(float(rows.sum())):
                    raise RuntimeFailureError(f"{self._path}: llama.cpp computed NaN or Inf {where}")
                logits_TV[end - count + first : end - count + stop] = rows
        return logits_TV

    def _check(self, tokens_T: Tensor | Sequence[int]) -> list[int]:
        """The window's tokens, which llama.cpp can take."""
        tokens = torch.as_tensor(tokens_T).tolist()
        if not tokens or len(tokens) > self.context_tokens:
            raise InputError(
                f"{len(tokens)} tokens: expected 1 to {self.context_tokens}: "
                "shorten the window or pass a larger context_tokens"
            )
        if not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
            raise InputError(
                f"token ids from {min(tokens)} to {max(tokens)}: expected 0 to {self.vocabulary - 1}: "
                "the windows come from another tokenizer than the model"
            )
        return tokens

    def _ask(
        self, do: str, answers: dict[str, type], *, seconds: float | None = None, where: str, **arguments: Any
    ) -> dict[str, Any]:
        try:
            return self._child.ask(do, answers, seconds=seconds or ANSWER_SECONDS, where=where, **arguments)
        except InputError as error:
            if do == "load" and not any(words in str(error) for words in OUT_OF_MEMORY):
                newer = ": the file needs a newer llama.cpp: install llama-cpp-python 0.3.36 or later"
                raise ConfigError(f"{self._path}: {error}{newer if NEWER_TYPE in str(error) else ''}") from None
            raise RuntimeFailureError(f"{self._path}: {error}, {where}") from None


def installed() -> bool:
    """Whether there is a llama-cpp-python; `why_unusable` says more."""
    return importlib.util.find_spec("llama_cpp") is not None


def why_unusable() -> str | None:
    """The reason why llama.cpp cannot run here; None if it can. Starts its process and ends it."""
    try:
        child, _ = _start(None)
    except IntaglioError as error:
        return str(error)
    child.close()
    return None


def _start(patience: float | None) -> tuple[Child, str]:
    """A process with the library in it, and the version of llama-cpp-python."""
    if not installed():
        raise InputError("llama-cpp-python is not installed: pip install 'intaglio[llama]'")
    child = Child("llama.cpp", SCRIPT, patience=patience)
    try:
        answer = child.ask("start", {"version": str}, seconds=START_SECONDS, where="while its library was loaded")
    except InputError as error:
        child.close()
        raise InputError(
            f"llama-cpp-python is installed but cannot be loaded ({error}): build it again, with "
            "CFLAGS=-U__AMX_INT8__ CXXFLAGS=-U__AMX_INT8__ pip install --force-reinstall --no-cache-dir --no-deps "
            "llama-cpp-python==0.3.36"
        ) from None
    return child, answer["version"]
