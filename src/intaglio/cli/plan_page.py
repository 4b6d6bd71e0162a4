"""`intaglio plan --html`: the survey as one page with bar charts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from intaglio.cli.terminal_plan import context_text, file_kind, towers_note, training_title
from intaglio.measure.charts import rosette
from intaglio.measure.render import render_page
from intaglio.packed.store import new_path
from intaglio.plan.memory import LABELS
from intaglio.plan.units import tokens_text
from intaglio.sizing.components import TOWERS, kv_cache_bytes
from intaglio.sizing.footprint import KV_BITS, Part
from intaglio.sizing.planning import Survey

CONTEXTS = tuple(1024 << n for n in range(2, 9))  # 4k to 256k
Row = tuple[str, str, dict[str, int], int]  # label, note, bytes by kind, and together


def write_page(survey: Survey, path: Path, *, replace: bool = False) -> None:
    """Write the page; OutputError if the file is there or cannot be written."""
    with new_path(path, replace=replace) as temporary:
        temporary.write_text(render_page("plan", page_values(survey)), "utf-8")


def page_values(survey: Survey) -> dict[str, Any]:
    """Values that the template prints."""
    plan, total = survey.plan, survey.footprint.total
    training = survey.training
    return {
        "name": survey.name,
        "recipe": plan.recipe.name,
        "summary": plan.recipe.summary,
        "digest": plan.digest,
        "rosette": rosette(plan.digest),
        "parameters": total("parameters"),
        "file_bytes": survey.footprint.file.total,
        "file_kind": file_kind(survey),
        "file_note": _file_note(survey),
        "resident_bytes": survey.file_resident_bytes,
        "towers_note": towers_note(survey),
        "mapped_bytes": total("mapped_bytes"),
        "context": tokens_text(survey.wishes.context),
        "batch": survey.wishes.batch,
        "kv_bytes": survey.kv[KV_BITS[0]]["total"],
        "part_rows": _part_rows(survey),
        "unused": any(part.component == "unused" for part in survey.footprint.parts),
        "kv_rows": _kv_rows(survey),
        "budget_bytes": survey.wishes.budget_bytes,
        "fit_rows": _fit_rows(survey),
        "training_note": training_title(training) + "." if training else "",
        "training_rows": _training_rows(survey),
        "training_bytes": training.total if training else 0,
        "other_bytes": survey.checkpointed.total if training and not training.gradient_checkpointing else 0,
    }


def _part_rows(survey: Survey) -> list[Row]:
    drafter = survey.drafter
    rows = [_part_row(part, "beside the text" if part.component in TOWERS else "") for part in survey.footprint.parts]
    if drafter is not None:
        resident, mapped = drafter[1].total("resident_bytes"), drafter[1].total("mapped_bytes")
        rows.append((f"drafter {drafter[0]}", "", {"resident": resident, "mapped": mapped}, resident + mapped))
    return rows


def _part_row(part: Part, beside: str) -> Row:
    unused = part.disk_bytes - part.resident_bytes - part.mapped_bytes
    sizes = {"resident": part.resident_bytes, "mapped": part.mapped_bytes, "unused": unused}
    return part.label, ", ".join(part.grids) or beside, sizes, part.disk_bytes


def _file_note(survey: Survey) -> str:
    file = survey.footprint.file
    pieces = [f"{file.data:,} bytes of tensors", f"{file.header:,} of header"]
    pieces += [f"{file.metadata:,} of metadata, taken as given"] if file.metadata else []
    pieces += [f"{file.padding:,} of padding"] if file.padding else []
    return f"The file: {', '.join(pieces)}; together {file.total:,}."


def _kv_rows(survey: Survey) -> list[Row]:
    limit = int(survey.plan.model.layer_config.max_position_embeddings)
    contexts = sorted({*(tokens for tokens in CONTEXTS if tokens <= limit), survey.wishes.context})
    rows = []
    for tokens in contexts:
        sizes = kv_cache_bytes(survey.plan.model, tokens, survey.wishes.batch)
        rows.append((f"{tokens_text(tokens)} tokens", "", sizes, sizes["total"]))
    return rows if survey.kv[KV_BITS[0]]["total"] else []


def _fit_rows(survey: Survey) -> list[dict[str, Any]]:
    return [
        {
            "recipe": fit.recipe,
            "disk_bytes": fit.disk_bytes,
            "resident_bytes": fit.resident_bytes,
            "mapped_bytes": fit.mapped_bytes,
            "contexts": [context_text(fit.longest[bits], survey.plan) for bits in KV_BITS],
        }
        for fit in survey.fits
    ]


def _training_rows(survey: Survey) -> list[Row]:
    rows = survey.training.rows if survey.training else {}
    return [(LABELS[name], "", {"bytes": value}, value) for name, value in rows.items() if value]
