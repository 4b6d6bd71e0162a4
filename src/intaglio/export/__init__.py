"""Exporters: a PackedModel in, a runtime's files out. None of them can fit or round."""

from collections.abc import Callable
from typing import Any

from intaglio.export.bundles import export_lmstudio, export_ollama
from intaglio.export.gguf import export_gguf
from intaglio.export.hf import export_hf
from intaglio.export.litert import export_litert
from intaglio.export.mlx import export_mlx
from intaglio.export.mobile import export_mobile
from intaglio.export.onnx import export_onnx
from intaglio.export.vllm import export_vllm
from intaglio.export.web import export_web

EXPORTERS: dict[str, Callable[..., Any]] = {
    "gguf": export_gguf,
    "hf": export_hf,
    "gemma-mobile": export_mobile,
    "vllm": export_vllm,
    "mlx": export_mlx,
    "litert": export_litert,
    "onnx": export_onnx,
    "web": export_web,
    "ollama": export_ollama,
    "lmstudio": export_lmstudio,
}
