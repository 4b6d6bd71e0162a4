"""The models in front: a token's embedding, and its per-layer embeddings as one lookup for each layer.

They are models of their own in the bundle, so that a runtime maps these large tables and reads a few rows.
LiteRT-LM runs them for one token at a time: int32 [1, 1] in, float32 [1, 1, D] or [1, 1, L, P] out.
"""

from __future__ import annotations

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from intaglio.formats.litert.converter.graph import Model, Operator, Stored, Subgraph, Type


def lookup_model(signature: str, tables: list[Stored], factor: float, *, per_layer: bool) -> Model:
    """The token's row of each table, times `factor`: [1, 1, tables, width], or without `per_layer` [1, 1, width]."""
    model = Model.empty()
    root = schema.SubGraphT(name=signature, tensors=[], operators=[])
    model.root.subgraphs.append(root)
    graph = Subgraph(model, root)
    count, width = len(tables), tables[0].shape[1]
    tokens = graph.tensor("token_ids", (1, 1), Type.INT32)
    token = graph.tensor("token", (1,), Type.INT32)
    _reshape(graph, tokens, token)
    rows = []
    for table in tables:
        rows.append(graph.tensor(f"{table.name}.row", (1, width), Type.FLOAT32))
        graph.add(Operator.EMBEDDING_LOOKUP, [token, graph.stored(table)], [rows[-1]])
    row = rows[0]
    if count > 1:
        row = graph.tensor("rows", (count, width), Type.FLOAT32)
        graph.add(Operator.CONCATENATION, rows, [row], schema.ConcatenationOptionsT(axis=0))
    scaled = graph.tensor("scaled", graph.shape(row), Type.FLOAT32)
    factor_tensor = graph.constant("factor", np.array(factor, np.float32), Type.FLOAT32)
    graph.add(Operator.MUL, [row, factor_tensor], [scaled], schema.MulOptionsT())
    output = graph.tensor("embeddings", (1, 1, count, width) if per_layer else (1, 1, width), Type.FLOAT32)
    _reshape(graph, scaled, output)
    root.operators, root.inputs, root.outputs = graph.operators, [tokens], [output]
    model.root.signatureDefs.append(
        schema.SignatureDefT(
            signatureKey=signature,
            subgraphIndex=0,
            inputs=[schema.TensorMapT(name="token_ids", tensorIndex=tokens)],
            outputs=[schema.TensorMapT(name="embeddings", tensorIndex=output)],
        )
    )
    return model


def _reshape(graph: Subgraph, x: int, y: int) -> None:
    shape = graph.constant(f"shape_{y}", np.array(graph.shape(y), np.int32), Type.INT32)
    graph.add(Operator.RESHAPE, [x, shape], [y], schema.ReshapeOptionsT(newShape=graph.shape(y)))
