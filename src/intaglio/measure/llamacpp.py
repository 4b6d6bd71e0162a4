"""Logits and greedy text of a GGUF file from llama.cpp itself, through llama-cpp-python's C bindings.

Shape suffixes: T tokens, V vocabulary.

The settings leave the weights' own arithmetic and switch off what would blur a comparison: the KV
cache is float32 (llama.cpp's default is float16) and flash attention is off. What remains of
llama.cpp's own rounding, mainly activations rounded to 8 bits in front of each quantized matrix,
is part of what its users get, and so of the measurement.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import ConfigError, InputError

GGML_LOG_LEVEL_ERROR = 4  # ggml.h, enum ggml_log_level
BATCH_TOKENS = 512  # llama.cpp's default physical batch; its compute buffer holds this many rows of logits

# llama.cpp has one log callback a process, which must outlive every model, so its lines go here.
_error_lines: deque[str] = deque(maxlen=8)
_log_callback: Any = None


class LlamaCpp:
    """A GGUF file loaded in llama.cpp; a context manager. One context serves every call.

    path: the file. context_tokens: longest window, prompt and continuation included.
    threads: None for one a core.

    Raises InputError without llama-cpp-python, and ConfigError, with llama.cpp's last words, for a
    file that it does not load.
    """

    def __init__(self, path: str | Path, *, context_tokens: int = 2048, threads: int | None = None):
        self._lib = _library()
        self._context: Any = None
        self._model = self._load(Path(path))
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.vocabulary: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self.context_tokens = context_tokens
        params = self._lib.llama_context_default_params()
        params.n_ctx = context_tokens
        params.n_batch = params.n_ubatch = min(BATCH_TOKENS, context_tokens)
        params.n_threads = params.n_threads_batch = threads or os.cpu_count() or 1
        params.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = params.type_v = self._lib.GGML_TYPE_F32
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise ConfigError(f"{path}: llama.cpp cannot make a context of {context_tokens} tokens: {_last_words()}")

    def _load(self, path: Path) -> Any:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file: expected a GGUF model")
        _error_lines.clear()
        model = self._lib.llama_model_load_from_file(os.fsencode(path), self._lib.llama_model_default_params())
        if not model:
            raise ConfigError(f"{path}: llama.cpp cannot load this model: {_last_words()}")
        return model

    @property
    def version(self) -> str:
        """For `Comparison.runtime`."""
        import llama_cpp

        return f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"

    def logits(self, tokens_T: Tensor | Sequence[int]) -> Tensor:
        """float32 [T, V], on the CPU, of one window without any history.

        Raises InputError for a window that is empty or longer than the context, and for token ids
        outside the vocabulary.
        """
        tokens = self._start(tokens_T)
        logits_TV = torch.empty(len(tokens), self.vocabulary)
        for start in range(0, len(tokens), BATCH_TOKENS):
            piece = tokens[start : start + BATCH_TOKENS]
            logits_TV[start : start + len(piece)] = self._decode(piece, start, outputs=len(piece))
        return logits_TV

    def greedy(self, tokens: Tensor | Sequence[int], n: int) -> list[int]:
        """At most `n` tokens that continue the prompt, each the likeliest; ends before an end-of-text token."""
        prompt = self._start(tokens, room=n)
        for start in range(0, len(prompt), BATCH_TOKENS):
            logits_V = self._decode(prompt[start : start + BATCH_TOKENS], start, outputs=1)[0]
        continuation: list[int] = []
        while len(continuation) < n:
            token = int(logits_V.argmax())
            if self._lib.llama_vocab_is_eog(self._vocab, token):
                break
            continuation.append(token)
            logits_V = self._decode([token], len(prompt) + len(continuation) - 1, outputs=1)[0]
        return continuation

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The file's own tokenizer. add_special: <bos> as the file asks for it; parse_special: read
        the text's control tokens as such."""
        data = text.encode()
        arguments = (self._vocab, data, len(data))
        size = -self._lib.llama_tokenize(*arguments, None, 0, add_special, parse_special)
        buffer = (self._lib.llama_token * size)()
        self._lib.llama_tokenize(*arguments, buffer, size, add_special, parse_special)
        return list(buffer)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of the tokens, control tokens left out."""
        array = (self._lib.llama_token * len(tokens))(*tokens)
        arguments = (self._vocab, array, len(tokens))
        size = -self._lib.llama_detokenize(*arguments, None, 0, True, False)
        buffer = ctypes.create_string_buffer(max(size, 1))
        self._lib.llama_detokenize(*arguments, buffer, size, True, False)
        return buffer.raw[:size].decode("utf-8", "replace")

    def _start(self, tokens_T: Tensor | Sequence[int], room: int = 0) -> list[int]:
        """Forget the window before, and check the new one."""
        if self._context is None:
            raise ValueError("this LlamaCpp is closed")
        tokens = torch.as_tensor(tokens_T).tolist()
        if not tokens or len(tokens) + room > self.context_tokens:
            raise InputError(
                f"{len(tokens)} tokens and {room} to come: expected 1 to {self.context_tokens} in all: "
                "shorten the window or pass a larger context_tokens"
            )
        if not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
            raise InputError(
                f"token ids from {min(tokens)} to {max(tokens)}: expected 0 to {self.vocabulary - 1}: "
                "the windows come from another tokenizer than the model"
            )
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        return tokens

    def _decode(self, tokens: list[int], position: int, *, outputs: int) -> Tensor:
        """Logits [outputs, V] of the last `outputs` tokens, in llama.cpp's memory until the next call."""
        count = len(tokens)
        batch = self._lib.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, position + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = i >= count - outputs
            status = self._lib.llama_decode(self._context, batch)
        finally:
            self._lib.llama_batch_free(batch)
        if status != 0:
            raise ConfigError(f"llama_decode of {count} tokens failed with status {status}: {_last_words()}")
        values = ctypes.cast(
            self._lib.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float * (outputs * self.vocabulary))
        )
        return torch.frombuffer(values.contents, dtype=torch.float32).view(outputs, self.vocabulary)

    def close(self) -> None:
        """Free the model's memory. Calling it twice is fine."""
        if self._context is not None:
            self._lib.llama_free(self._context)
        if self._model is not None:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _library() -> Any:
    """llama-cpp-python's C bindings, silenced."""
    global _log_callback
    try:
        import llama_cpp.llama_cpp as lib
    except ImportError as error:
        raise InputError(f"llama-cpp-python is not usable ({error}): pip install 'intaglio[llama]'") from error
    if _log_callback is None:

        def keep_errors(level: int, text: bytes, _: Any) -> None:
            if level == GGML_LOG_LEVEL_ERROR:
                _error_lines.append(text.decode("utf-8", "replace").strip())

        _log_callback = lib.llama_log_callback(keep_errors)
        lib.llama_log_set(_log_callback, ctypes.c_void_p(0))
        lib.llama_backend_init()
    return lib


def _last_words() -> str:
    return "; ".join(_error_lines) or "it gave no reason"
