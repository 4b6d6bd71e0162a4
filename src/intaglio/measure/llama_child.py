"""The process that llama.cpp runs in. `measure.llamacpp` starts it as a script and asks it.

    python llama_child.py SOCKET MEMORY PARENT

SOCKET and MEMORY are file descriptors, PARENT is the process that asks. A request is a line of JSON on the socket
with its "number", the name of a method of `Runtime` as "do", and that method's arguments; the answer is a line of
JSON with the same number. Logits are no part of an answer: `rows` copies them into the memory. "refused" is the reason
why llama.cpp does not do what it was asked to.

The file imports neither intaglio nor torch, so that the process starts fast and holds nothing but the model.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import mmap
import os
import queue
import resource
import select
import signal
import socket
import sys
import threading
from collections import deque
from typing import Any

GGML_LOG_LEVEL_ERROR = 4  # ggml.h, enum ggml_log_level
BATCH_TOKENS = 512  # llama.cpp's default physical batch; its buffer holds this many rows of logits
OOM_SCORE = "500"  # proc(5), oom_score_adj: when memory runs out, the kernel ends this process before its parent
PARENT_SECONDS = 2.0  # between two looks whether the parent still lives


class RefusedError(Exception):
    """llama.cpp or the system said no, in words; the process can go on."""


class Runtime:
    """llama.cpp with one model and one context."""

    def __init__(self, memory: int):
        self._memory_file = memory
        self._memory: Any = None
        self._errors: deque[str] = deque(maxlen=8)
        self._context: Any = None

    def start(self) -> dict[str, Any]:
        """Load the library."""
        try:
            package = importlib.import_module("llama_cpp")
            self._lib = importlib.import_module("llama_cpp.llama_cpp")
        except Exception as error:  # its loader raises RuntimeError and FileNotFoundError beside ImportError
            raise RefusedError(f"{type(error).__name__}: {error}") from None

        def keep_errors(level: int, text: bytes, _: Any) -> None:
            if level == GGML_LOG_LEVEL_ERROR:
                self._errors.append(text.decode("utf-8", "replace").strip())

        self._log = self._lib.llama_log_callback(keep_errors)  # llama.cpp keeps the pointer, so it must outlive it
        self._lib.llama_log_set(self._log, ctypes.c_void_p(0))
        self._lib.llama_backend_init()
        return {"version": package.__version__}

    def load(self, path: str, context_tokens: int, threads: int, extra_buffers: bool) -> dict[str, Any]:
        """Read a GGUF file and make its context: a float32 KV cache and no flash attention."""
        lib = self._lib
        params = lib.llama_model_default_params()
        params.use_extra_bufts = extra_buffers
        self._model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise RefusedError(f"llama.cpp cannot load this model: {self._last_words()}")
        params = lib.llama_context_default_params()
        params.n_ctx = context_tokens
        params.n_batch = params.n_ubatch = min(BATCH_TOKENS, context_tokens)
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = params.type_v = lib.GGML_TYPE_F32
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RefusedError(f"llama.cpp cannot make a context of {context_tokens} tokens: {self._last_words()}")
        self._words = lib.llama_model_get_vocab(self._model)
        self._vocabulary = lib.llama_vocab_n_tokens(self._words)
        return {"vocabulary": self._vocabulary}

    def chat_format(self) -> dict[str, Any]:
        """The file's chat template, its first and last token with their texts, and all tokens that end an answer."""
        lib, vocab = self._lib, self._words
        tokens = {"bos_token": lib.llama_vocab_bos(vocab), "eos_token": lib.llama_vocab_eos(vocab)}
        found = {name: lib.llama_vocab_get_text(vocab, token) for name, token in tokens.items() if token >= 0}
        template = lib.llama_model_chat_template(self._model, None) or b""
        return {
            "template": template.decode("utf-8", "replace"),
            "first": tokens["bos_token"],
            "special": {name: (text or b"").decode("utf-8", "replace") for name, text in found.items()},
            "ends": [token for token in range(self._vocabulary) if lib.llama_vocab_is_eog(vocab, token)],
        }

    def encode(self, text: str) -> dict[str, Any]:
        """Tokens of a text. Special tokens that stand in it are recognised, and none is added."""
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        tokens = (ctypes.c_int * room)()
        count = self._lib.llama_tokenize(self._words, data, len(data), tokens, room, False, True)
        if count < 0:
            raise RefusedError(f"llama.cpp cuts a text of {len(data)} bytes into {-count} tokens: expected no more")
        return {"tokens": tokens[:count]}

    def text(self, tokens: list[int]) -> dict[str, Any]:
        """Text of tokens, without special ones. Bytes that end within a character become U+FFFD."""
        pieces = []
        for token in tokens:  # one by one: llama_detokenize would take spaces away before punctuation
            room = 256
            buffer = ctypes.create_string_buffer(room)
            size = self._lib.llama_token_to_piece(self._words, token, buffer, room, 0, False)
            if size < 0:
                raise RefusedError(f"token {token} has {-size} bytes: expected at most {room}")
            pieces.append(buffer.raw[:size])
        return {"text": b"".join(pieces).decode("utf-8", "replace")}

    def decode(self, tokens: list[int], position: int, rows: int) -> dict[str, Any]:
        """Read tokens, with rows of logits for the last ones. Position 0 begins a text without history."""
        lib, count = self._lib, len(tokens)
        if position == 0:
            lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        batch = lib.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, position + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = i >= count - rows
            status = lib.llama_decode(self._context, batch)
        finally:
            lib.llama_batch_free(batch)
        if status != 0:
            raise RefusedError(f"llama_decode of {count} tokens failed with status {status}: {self._last_words()}")
        return {}

    def rows(self, start: int, stop: int) -> dict[str, Any]:
        """Copy rows [start, stop) of the last logits to the start of the memory, float32."""
        if self._memory is None:
            self._memory = mmap.mmap(self._memory_file, 0)
        width = 4 * self._vocabulary
        source = ctypes.cast(self._lib.llama_get_logits(self._context), ctypes.c_void_p).value
        target = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        ctypes.memmove(target, source + start * width, (stop - start) * width)
        return {}

    def _last_words(self) -> str:
        return "; ".join(self._errors) or "it gave no reason"


def main() -> None:
    """Answer requests until the parent closes the socket or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(OOM_SCORE)
    connection, memory, parent = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, parent, requests), daemon=True).start()
    runtime = Runtime(memory)
    while True:
        asked = json.loads(requests.get())
        number, do = asked.pop("number"), asked.pop("do")
        try:
            answer = getattr(runtime, do)(**asked)
        except RefusedError as error:
            answer = {"refused": str(error)}
        connection.sendall(json.dumps({"number": number, **answer}).encode() + b"\n")


def _listen(connection: socket.socket, parent: int, requests: queue.SimpleQueue[bytes]) -> None:
    """Queue the requests. End the process, whatever it is computing, once there is nobody to answer."""
    rest = b""
    while True:
        ready, _, _ = select.select([connection], [], [], PARENT_SECONDS)
        if not ready and os.getppid() == parent:  # a fork of the parent may hold the socket open after it
            continue
        got = b""
        with contextlib.suppress(OSError):
            got = connection.recv(1 << 16) if ready else b""
        if not got:
            os._exit(0)
        *lines, rest = (rest + got).split(b"\n")
        for line in lines:
            requests.put(line)


if __name__ == "__main__":
    main()
