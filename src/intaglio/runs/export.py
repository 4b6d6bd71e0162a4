"""The one way to make files of a packed model: an exporter writes, another reader compares, and a difference raises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from intaglio.errors import InputError
from intaglio.formats.table import EXPORTERS, format_of
from intaglio.formats.verify import Verification, verify_exact
from intaglio.packed.model import PackedModel
from intaglio.packed.outputs import check_output


def write_exact(
    write: Callable[..., Any],
    packed: PackedModel,
    path: str | Path,
    *,
    artifact: Path | None = None,
    read_on: torch.device | str = "cpu",
    **options: Any,
) -> Verification:
    """Write a packed model by an exporter and read the artifact back.

    artifact: what is read back; `path` by default. read_on: the device of the comparison. options: of the exporter.
    Raises the exporter's error, and MismatchError for an artifact that does not hold what was packed.
    """
    write(packed, path, **options)
    return verify_exact(packed, artifact or path, device=read_on)


def export(
    packed: PackedModel, out: str | Path, target: str, *, replace: bool = False, options: dict[str, Any] | None = None
) -> Verification:
    """Write a packed model in the format of one runtime and read it back.

    target: a key of `formats.table.EXPORTERS`. options: of its exporter, by name. Raises InputError for an unknown
    target, the exporter's error for a model that its format cannot hold, and MismatchError if the artifact differs.
    """
    if target not in EXPORTERS:
        raise InputError(f"{target!r}: expected one of {', '.join(EXPORTERS)}")
    options = options or {}
    check_places(out, packed, options)
    return write_exact(EXPORTERS[target], packed, out, replace=replace, **options)


def check_places(out: str | Path, packed: PackedModel, options: dict[str, Any]) -> None:
    """Raise OutputError where `out` would replace the packed model, or a file that an option names."""
    check_output(out, [packed.path, *(given for given in options.values() if isinstance(given, str | Path))])


def make_files(
    packed: PackedModel, out: Path, kind: str, *, replace: bool = False, device: torch.device | str = "cpu"
) -> dict[str, Verification]:
    """Write the files of a run's packed model into the run folder and read each back; by name.

    kind: of the packed model, "trained" or "stock"; other kinds have no files. Raises as `write_exact` does.
    """
    verified = {}
    for export in format_of(packed.plan).exports:
        if export.kind == kind:
            options: dict[str, Any] = {"replace": replace} | ({"device": device} if export.on_device else {})
            verified[export.name] = write_exact(export.write, packed, out / export.name, read_on=device, **options)
    return verified
