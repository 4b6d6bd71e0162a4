"""SHA-256 of a safetensors file's tensors and of its header, as `SafetensorsWriter` puts them into the metadata.

They tell damage, such as a flipped bit on a disk, from what was written. They do not stop anyone who means to
deceive: whoever changes a tensor can change its hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from intaglio.errors import ConfigError
from intaglio.packed.store import DIGESTS, NO_DIGEST, SEAL, open_safetensors, sealed
from intaglio.plan.files import reading

HEADER_LIMIT = 100_000_000  # bytes; safetensors' own
CHUNK_BYTES = 1 << 24
THREADS = 4  # hashlib lets go of the interpreter, so that threads hash at several times one core's speed
ADVICE = "restore the file from a copy, or make it again"


class Hashes:
    """Index of a file's tensors: SHA-256 and place of each, checked against the bytes one by one.

    Raises ConfigError for a header that is not the one that was written, and for hashes that are missing.
    """

    def __init__(self, path: Path):
        self.path = path
        with open_safetensors(path) as file:  # which has looked at the header's syntax and at all offsets
            metadata = file.metadata() or {}
        with reading(path, "damaged header", ADVICE):
            self.digests: dict[str, str] = json.loads(metadata[DIGESTS])
            with open(path, "rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
                raw.seek(0)
                header = raw.read(8 + min(length, HEADER_LIMIT))
            seal = metadata[SEAL]
            blank = header.replace(sealed(seal), sealed(NO_DIGEST))
            if hashlib.sha256(blank).hexdigest() != seal:
                raise ConfigError(f"{path}: the header is not the one that was written: {ADVICE}")
            entries = json.loads(header[8:])
            self.places = {name: entries[name]["data_offsets"] for name in self.digests}
        self.data_start = len(header)
        self.checked: set[str] = set()

    def check(self, name: str) -> None:
        """Compare one tensor's bytes with its hash, the first time that it is asked for. ConfigError names it."""
        if name in self.checked:
            return
        begin, end = self.places[name]
        found = hashlib.sha256()
        with open(self.path, "rb") as file:
            file.seek(self.data_start + begin)
            while begin < end and (data := file.read(min(CHUNK_BYTES, end - begin))):
                found.update(data)
                begin += len(data)
        if found.hexdigest() != self.digests[name]:
            raise ConfigError(f"{self.path}: tensor {name} is not what was written (its SHA-256 differs): {ADVICE}")
        self.checked.add(name)

    def check_all(self, names: Iterable[str] | None = None) -> None:
        """`check` for all tensors, or for these, on several threads."""
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(self.check, self.digests if names is None else names))
