"""Exporters: a PackedModel in, a runtime's files out. None of them can fit or round."""

from collections.abc import Callable
from typing import Any

from intaglio.export.gguf import export_gguf
from intaglio.export.hf import export_hf
from intaglio.export.mobile import export_mobile

EXPORTERS: dict[str, Callable[..., Any]] = {"gguf": export_gguf, "hf": export_hf, "gemma-mobile": export_mobile}
