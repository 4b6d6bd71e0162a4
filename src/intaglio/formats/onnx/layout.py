"""A plan as ONNX files: which session holds a tensor, by which kernel of ONNX Runtime, and under which names.

Shared by whoever writes and who checks such a folder; how codes lie in bytes is not here, each knows
it by itself. The two sessions are those that Transformers.js opens for Gemma 4: one looks up
embeddings, the other is the decoder. Both are called `q4`, which is no more than the ending of a file's
name: how many bits a tensor has is said by its own node.

The kernels are MatMulNBits and GatherBlockQuantized of the domain com.microsoft. Both compute
`(stored - 2^(bits - 1)) x scale` with stored codes of 2, 4 or 8 bits and float32 scales of either sign, one
for a block of 16, 32, 64, 128 or 256 columns.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.errors import ConfigError, RecipeError
from intaglio.formats.facts import check_dense
from intaglio.numerics.grid import BlockGrid
from intaglio.plan.plan import HEAD, Plan, PlannedTensor

FOLDER = "onnx"
WEB_MODEL = "model"  # the folder of a web page that has all this in it
EMBEDDINGS, DECODER = "embed_tokens", "decoder_model_merged"
SUFFIX = "_q4.onnx"
GRAPH_KEY = "intaglio.graph"  # of a file's metadata: the digest of its graph
SMALL = 1024  # elements of a constant that belongs to the graph, and is no weight
STORED_BITS = (2, 4, 8)
BLOCKS = (256, 128, 64, 32, 16)  # MatMulNBits has no larger ones, GatherBlockQuantized no smaller ones
EMBEDDING_ROLES = ("token_embedding", "ple_embedding")
LINEAR_ROLES = ("attention", "mlp", "ple_linear", "ple_model_projection", "head")
SMALL_ROLES = ("norm", "layer_scalar")  # float32, and the names that the trace gives them


@dataclass(frozen=True)
class Kernel:
    """Layout of a block grid in the kernels.

    bits: of a stored code, at least those of the grid's. block: columns under one scale. repeats: how often
    the step of a grid's block is written, once for each block of the kernel.
    """

    bits: int
    block: int
    repeats: int


@dataclass(frozen=True)
class Matrix:
    """A linear or an embedding of one of the sessions.

    module: its name there, which is that of its node. tensor: where codes and scales come from; those of
    a head that is tied to the embedding are the embedding's.
    """

    session: str
    module: str
    tensor: PlannedTensor

    @property
    def kernel(self) -> Kernel | None:
        """None for a matrix of floats."""
        return kernel_of(self.tensor) if isinstance(self.tensor.grid, BlockGrid) else None

    @property
    def half(self) -> bool:
        """Whether floats are stored in float16, which holds them exactly, and not in float32."""
        return self.tensor.grid.ggml_type == "F16"


def matrices(plan: Plan) -> list[Matrix]:
    """Every linear and embedding of a plan's folder. RecipeError or ConfigError for what ONNX cannot say."""
    check_onnx(plan)
    found = []
    for tensor in plan:
        module = tensor.name.removesuffix(".weight")
        if tensor.spec.role in EMBEDDING_ROLES:
            found.append(Matrix(EMBEDDINGS, module, tensor))
        elif tensor.spec.role in LINEAR_ROLES:
            found.append(Matrix(DECODER, module, tensor))
        if tensor.spec.role == "token_embedding" and plan.model.tied_head:
            found.append(Matrix(DECODER, HEAD.removesuffix(".weight"), tensor))
    return found


def check_onnx(plan: Plan) -> None:
    """Raise RecipeError or ConfigError for a model or a grid that these files cannot hold."""
    check_dense(plan.model, "onnx", "the ONNX export")
    for tensor in plan:
        if tensor.spec.role not in EMBEDDING_ROLES + LINEAR_ROLES + SMALL_ROLES:
            raise ConfigError(f"{tensor.name}: the ONNX export knows no {tensor.spec.role}: export it to gguf or hf")
        if isinstance(tensor.grid, BlockGrid):
            kernel_of(tensor)


def kernel_of(tensor: PlannedTensor) -> Kernel:
    """The kernel for a tensor on a block grid. RecipeError if ONNX Runtime has none for its rows."""
    grid = tensor.grid
    assert isinstance(grid, BlockGrid)
    bits = next(bits for bits in STORED_BITS if bits >= grid.code_bits)
    block = next((block for block in BLOCKS if grid.block_size % block == 0), None)
    if block is None:
        raise RecipeError(
            f"{tensor.name}: shape {list(tensor.spec.shape)} on grid {grid.name} has one scale for {grid.block_size} "
            "columns: ONNX Runtime wants blocks of 16, 32, 64, 128 or 256 columns that divide it; give these tensors a "
            f"rule of their own with a grid of floats, for example --set weights.{tensor.rule.name}.grid=bf16"
        )
    return Kernel(bits, block, grid.block_size // block)


def is_onnx(path: Path) -> bool:
    """Whether a folder holds such files, or a web page with them."""
    return any((path / where / FOLDER / file_name(DECODER)).is_file() for where in ("", WEB_MODEL))


def file_name(session: str) -> str:
    """Name of a session's graph in the folder `onnx`; its data lie beside it in NAME_data, NAME_data_1 and so on."""
    return session + SUFFIX


def graph_digest(model: Any) -> str:
    """SHA-256 of an ONNX model without its weights: nodes, inputs, outputs, and constants of up to SMALL elements."""
    parts = [*model.graph.node, *model.graph.input, *model.graph.output, *model.opset_import]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.SerializeToString(deterministic=True))
    for tensor in model.graph.initializer:
        small = math.prod(tensor.dims) <= SMALL and not tensor.external_data
        digest.update(f"{tensor.name} {list(tensor.dims)} {tensor.data_type}".encode())
        digest.update(tensor.raw_data if small else b"")
    return digest.hexdigest()
