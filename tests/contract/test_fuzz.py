"""Mutated files: `inspect` has a typed error or a right answer for each, in little time and memory."""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from intaglio.errors import IntaglioError
from intaglio.sources.inspect import Inspection, inspect
from tests.support import ggml

EACH = 1000
SECONDS, BYTES = 5.0, 256 << 20
ODD_NUMBERS = [0, 1, 31, 33, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def weights() -> dict[str, torch.Tensor]:
    codes = torch.randint(-8, 8, (8, 64), generator=torch.Generator().manual_seed(0))
    return {
        "blk.0.grid.weight": (codes * 0.5).to(torch.bfloat16),
        "blk.1.latent.weight": torch.randn(8, 64, generator=torch.Generator().manual_seed(1)),
        "norm.weight": torch.ones(64, dtype=torch.float16),
    }


def safetensors_file() -> bytes:
    return save(weights(), {"format": "pt"})


def gguf_file(folder: Path) -> bytes:
    path = folder / "base.gguf"
    writer = GGUFWriter(path, "gemma4")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b"])
    for name, tensor in weights().items():
        values = tensor.float().numpy()
        if "grid" in name:
            writer.add_tensor(name, ggml.quantize(values, "Q4_0"), raw_dtype=GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@st.composite
def mutations(draw: st.DrawFn, data: bytes, header: int) -> bytes:
    """Bytes flipped, numbers planted, pieces cut out, doubled or put in: mostly in the header."""
    mutated = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        end = min(len(mutated), header if draw(st.integers(0, 5)) else len(mutated))
        at = draw(st.integers(0, max(0, end - 1)))
        kind = draw(st.sampled_from(["byte", "number", "cut", "end", "put", "double"]))
        if kind == "byte" and mutated:
            mutated[at] = draw(st.integers(0, 255))
        elif kind == "number":
            size = draw(st.sampled_from([4, 8]))
            number = draw(st.sampled_from(ODD_NUMBERS)) % (1 << 8 * size)
            mutated[at : at + size] = number.to_bytes(size, "little")
        elif kind == "cut":
            del mutated[at : at + draw(st.integers(1, 16))]
        elif kind == "end":
            del mutated[at:]
        elif kind == "put":
            mutated[at:at] = draw(st.binary(min_size=1, max_size=12))
        else:
            mutated[at:at] = mutated[at : at + draw(st.integers(1, 64))]
    return bytes(mutated)


DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "", None]


@st.composite
def headers(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file whose header is JSON still, but says other things of one of its tensors."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = header[draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))]
    kind = draw(st.sampled_from(["dtype", "shape", "order", "offsets", "name", "metadata"]))
    number = draw(st.sampled_from([*ODD_NUMBERS, -1, 1.5, None]))
    if kind == "dtype":
        entry["dtype"] = draw(st.sampled_from(DTYPES))
    elif kind == "shape":
        entry["shape"][draw(st.integers(0, len(entry["shape"]) - 1))] = number
    elif kind == "order":
        entry["shape"] = draw(st.permutations([*entry["shape"], 1, 1]))
    elif kind == "offsets":
        entry["data_offsets"][draw(st.integers(0, 1))] = number
    elif kind == "name":
        header[draw(st.text(max_size=8))] = header.pop("norm.weight")
    else:
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.none() | st.text(max_size=3), max_size=2))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def survives(data: bytes, path: Path) -> Inspection | None:
    """What is found in such a file; None for a typed error. Anything else fails the test."""
    path.write_bytes(data)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        found = inspect(path)
    except IntaglioError as error:
        assert path.name in str(error)
        found = None
    assert time.process_time() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
    return found


def check(found: Inspection, size: int) -> None:
    for verdict in found.verdicts:
        assert math.prod(verdict.shape) >= 0 and 0 <= verdict.size_bytes <= size
        tally = verdict.tally
        assert 0 <= tally.stock <= tally.ships <= tally.recovered <= tally.all
        assert tally.all in (0, math.prod(verdict.shape) // 32) or verdict.stored == "Q6_K" or verdict.hypothesis
    json.dumps(found.to_dict())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return {"safetensors": safetensors_file(), "gguf": gguf_file(tmp_path_factory.mktemp("fuzz"))}


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_mutated_files(kind: str, base: dict[str, bytes], tmp_path: Path) -> None:
    data, path = base[kind], tmp_path / f"x.{kind}"
    right = survives(data, path)
    assert right is not None and right.verdicts[0].grid in ("Q4_0", "int4", "extremum-8", "absmax-8")
    header = 8 + int.from_bytes(data[:8], "little") if kind == "safetensors" else 480
    outcomes: list[bool] = []

    @settings(max_examples=EACH, suppress_health_check=list(HealthCheck))
    @given(mutations(data, header) | headers(data) if kind == "safetensors" else mutations(data, header))
    def run(mutated: bytes) -> None:
        found = survives(mutated, path)
        outcomes.append(found is not None)
        if found is not None:
            check(found, len(mutated))

    run()
    assert len(outcomes) >= EACH
    # both happen often, so the mutations are neither harmless nor all alike
    assert np.mean(outcomes) > 0.02 and np.mean(outcomes) < 0.9
