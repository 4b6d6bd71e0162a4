"""Files that appear whole or not at all, and safetensors written a tensor at a time."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from intaglio.errors import ConfigError, OutputError
from intaglio.packed.outputs import PARTIAL, clear_leftovers, mark, remove, temporary_path, why_kept
from intaglio.plan.files import POINTER, pointer

CHUNK_ELEMENTS = 1 << 24  # of a large tensor that is read, and worked on, a few rows at a time
REMAP_BYTES = 1 << 28
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

# In the order in which safetensors' own writer puts tensors: wider types first, so that each is aligned.
SAFETENSORS_DTYPES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
FLOATS = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items() if dtype.is_floating_point}


@contextmanager
def new_path(path: Path, *, replace: bool = False, internal: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it otherwise.

    Works for a file and for a folder (which the caller makes, and which gets a marker). Raises OutputError if
    `path` exists and may not be replaced, and for a full disk or a folder that cannot be written. With `replace`,
    what is not known to be intaglio's is kept all the same: a wrong path shall not cost anyone a home.
    internal: a part of a run folder, or of an output that is being written, which are ours altogether.
    """
    if path.exists() and not replace:
        raise OutputError(f"{path}: already exists: choose another output or remove it")
    kept = why_kept(path) if path.exists() and not internal else ""
    if kept:
        raise OutputError(f"{path}: {kept}, so it is not replaced: choose another output or remove it")
    clear_leftovers(path.parent)
    temporary = temporary_path(path)
    inside = internal or any(PARTIAL.fullmatch(parent.name) for parent in path.absolute().parents)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.exists() and path.is_dir() != temporary.is_dir():
            kind = "folder" if path.is_dir() else "file"
            raise OutputError(f"{path}: is a {kind}, and the output is not: choose another path")
        if temporary.is_dir() and not inside:
            mark(temporary)
        if replace and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        if _of_another_file(error, path, temporary):
            raise
        raise write_error(path, error) from error
    finally:
        remove(temporary)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` for temporary files; it is removed at the end."""
    folder = temporary_path(path)
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        remove(folder)


def _of_another_file(error: OSError, path: Path, temporary: Path) -> bool:
    """Whether an error names a file that was read, not one of the output or a folder above it."""
    if not isinstance(error.filename, str) or error.errno in NO_ROOM:  # a copy that has no room names its source
        return False
    named = Path(error.filename).absolute()
    return not (named.is_relative_to(temporary.absolute()) or path.absolute().is_relative_to(named))


def write_error(path: Path, error: OSError) -> OutputError:
    """The OutputError for a path that could not be written."""
    reason = "the disk is full: free some space" if error.errno == errno.ENOSPC else (error.strerror or str(error))
    return OutputError(f"{path}: cannot be written: {reason}")


Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of each tensor of a file, in its order


DIGESTS, SEAL = "sha256", "seal"  # metadata: SHA-256 of each tensor's bytes as JSON, and of the header without it
NO_DIGEST = "0" * 64


def safetensors_header(specs: Specs, metadata: dict[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Header of a file, and the offset of each tensor's data behind it."""
    header: dict[str, object] = {"__metadata__": metadata}
    offsets: dict[str, tuple[int, int]] = {}
    position = 0
    for name, (dtype, shape) in specs.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        offsets[name] = (position, end)
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return len(text).to_bytes(8, "little") + text, offsets


def in_file_order(specs: Specs) -> Specs:
    """These tensors as safetensors' own writer puts them: by type, then by name."""
    order = list(SAFETENSORS_DTYPES)
    return dict(sorted(specs.items(), key=lambda item: (order.index(item[1][0]), item[0])))


def sealed(digest: str) -> bytes:
    """The piece of a header that holds its own hash. Quotes in other values are escaped, so it is there once."""
    return f'"{SEAL}":"{digest}"'.encode()


class SafetensorsWriter:
    """A safetensors file of known names, dtypes and shapes, filled in any order.

    Only the tensor at hand is in memory. `close` raises if a tensor was not written.
    hashed: whether the metadata get the SHA-256 of every tensor and of the header, for `check_hashes`.
    """

    def __init__(self, path: Path, specs: Specs, metadata: dict[str, str], *, hashed: bool = False):
        self.specs, self.metadata = specs, metadata
        self.hashes = {name: hashlib.sha256() for name in specs} if hashed else None
        header, self.offsets = safetensors_header(specs, metadata | self._digests())
        self.pending = set(specs)
        self.next_row: dict[str, int] = {}
        self.data_start = len(header)
        self.file = open(path, "wb")  # noqa: SIM115 - closed by close() or by the context manager
        self.file.write(header)
        self.file.truncate(self.data_start + max((end for _, end in self.offsets.values()), default=0))

    def write(self, name: str, tensor: Tensor, rows: slice | None = None) -> None:
        """Put a tensor of the announced size into its place, or its next rows: these come in order."""
        start, end = self.offsets[name]
        data = bytes_of(tensor)
        if rows is None:
            if data.nbytes != end - start:
                raise ValueError(f"{name}: {data.nbytes} bytes, announced {end - start}")
            if self.hashes is not None:
                self.hashes[name] = hashlib.sha256()
        else:
            start += rows.start * (data.nbytes // len(tensor))
            row = self.next_row.get(name, 0)
            if rows.start != row or start + data.nbytes > end:
                raise ValueError(f"{name}: rows {rows.start} to {rows.stop}, expected those from {row}")
            self.next_row[name] = rows.stop
        self.file.seek(self.data_start + start)
        self.file.write(data)
        if self.hashes is not None:
            self.hashes[name].update(data)
        if start + data.nbytes == end:
            self.pending.discard(name)

    def _digests(self) -> dict[str, str]:
        """The metadata's entries with the hashes so far; those of the whole header are still zeros."""
        if self.hashes is None:
            return {}
        return {DIGESTS: json.dumps({name: found.hexdigest() for name, found in self.hashes.items()}), SEAL: NO_DIGEST}

    def close(self) -> None:
        """Write the hashes into the header. ValueError for tensors that are missing."""
        if self.hashes is not None and not self.pending:
            header, _ = safetensors_header(self.specs, self.metadata | self._digests())
            self.file.seek(0)
            self.file.write(header.replace(sealed(NO_DIGEST), sealed(hashlib.sha256(header).hexdigest())))
        self.file.close()
        if self.pending:
            raise ValueError(f"tensors never written: {sorted(self.pending)[:3]}")

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.file.close()


def bytes_of(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, without a copy when it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    array: np.ndarray = flat.numpy()
    return array.data


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """safe_open with our errors: ConfigError for a missing, truncated or hostile file."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        with open(path, "rb") as start:
            if start.read(len(POINTER)) == POINTER:
                raise pointer(path) from error
        raise ConfigError(f"{path}: not a valid safetensors file ({error}): download or export it again") from error


class SafetensorsReader:
    """Tensors of a safetensors file, whole or a few rows at a time.

    The file is mapped anew now and then: the pages of a mapping count as memory of the process until it
    is closed, those too that are done with. ConfigError as from `open_safetensors`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.stack = ExitStack()
        self.file: Any = None
        self.read_bytes = 0

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor of the file, or these of its rows."""
        if self.file is None or self.read_bytes > REMAP_BYTES:
            self.close()
            self.file = self.stack.enter_context(open_safetensors(self.path))
        tensor: Tensor = self.file.get_tensor(name) if rows is None else self.file.get_slice(name)[rows]
        self.read_bytes += tensor.nbytes
        return tensor

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Names of all tensors of the file."""
        return frozenset(headers(self.path))

    def close(self) -> None:
        self.stack.close()
        self.file, self.read_bytes = None, 0

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def row_slices(shape: tuple[int, ...]) -> list[slice | None]:
    """The rows of a matrix, or of three dimensions the first, about `CHUNK_ELEMENTS` at a time; None, which is all,
    for a small tensor or anything else."""
    if len(shape) not in (2, 3) or math.prod(shape) <= CHUNK_ELEMENTS:
        return [None]
    step = max(1, CHUNK_ELEMENTS // math.prod(shape[1:]))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def headers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype, as safetensors spells it, and shape of each tensor of a file. ConfigError as `open_safetensors`."""
    with open_safetensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - safe_open does not iterate
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
