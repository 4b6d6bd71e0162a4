"""Output of `intaglio plan` on a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from intaglio.cli.streams import Printer
from intaglio.measure.render import count, size
from intaglio.plan.memory import LABELS, TrainingMemory
from intaglio.plan.plan import Plan
from intaglio.plan.units import tokens_text
from intaglio.sizing.components import TOWERS
from intaglio.sizing.footprint import KV_BITS, Footprint, Part, bits_per_weight
from intaglio.sizing.planning import FamilyRow, Survey
from intaglio.sizing.published import LEFT_OUT

console = Printer(highlight=False)
BAR_WIDTH = 20
WIDE = 100  # columns of a terminal that has room for grids and bits too
STAGE_LABELS = {
    "layers": "layers, one after the other",
    "scales": "scales, with frozen codes",
    "model": "model, everything",
}


def print_survey(survey: Survey) -> None:
    """The answer in three lines, then the parts, the KV cache, training, and what fits."""
    plan, total = survey.plan, survey.footprint.total
    console.print()
    console.print(
        Text.assemble((survey.name, "bold"), f"   {count(total('parameters'))} parameters, recipe {plan.recipe.name}")
    )
    console.print(Text(plan.recipe.summary, style="dim"))
    console.print()
    for label, value, note in (
        ("on disk", survey.footprint.file.total, file_kind(survey)),
        ("resident", survey.file_resident_bytes, "weights that every token reads" + towers_note(survey)),
        ("mapped", total("mapped_bytes"), "tables that are looked up, left on disk"),
    ):
        console.print(Text.assemble(f"  {label:<9}", (f"{_or_none(value):>8}", "bold cyan"), (f"   {note}", "dim")))
    _show("", parts_table(survey))
    _print_kv(survey)
    if survey.training is not None:
        _print_training(survey)
    if survey.wishes.budget_bytes is not None:
        _show(f"What fits {size(survey.wishes.budget_bytes)}", fits_table(survey))
        if survey.stages:
            _show(f"Stages of training in {size(survey.wishes.budget_bytes)}", stages_table(survey))
    console.print()


def file_kind(survey: Survey) -> str:
    """Kind of the file, and where towers go."""
    if survey.plan.mobile:
        return "Gemma mobile folder" + ", towers included" * survey.footprint.towers
    return "GGUF with its tokenizer" + "; towers in an mmproj beside it" * survey.footprint.towers


def towers_note(survey: Survey) -> str:
    """Share of the resident bytes that towers take, or their bytes beside it."""
    if not survey.tower_bytes:
        return ""
    return (
        f"; {size(survey.tower_bytes)} of it towers"
        if survey.plan.mobile
        else f"; towers {size(survey.tower_bytes)} more"
    )


def _wide() -> bool:
    return console.width >= WIDE


def parts_table(survey: Survey) -> Table:
    """One row a component, with a bar of its share where there is room, and sums with and without towers."""
    details = ("grid", "bits") if _wide() else ()
    bars = ("",) if _wide() else ()
    table = _table("part", "parameters", *details, "on disk", "resident", "mapped", *bars)
    largest = max(part.disk_bytes for part in survey.footprint.parts)
    text = [part for part in survey.footprint.parts if part.component not in TOWERS]
    towers = [part for part in survey.footprint.parts if part.component in TOWERS]
    for part in text:
        table.add_row(*_part_row(part, largest))
    if towers:
        table.add_section()
        table.add_row(*_total_row("text only", survey.footprint, text_only=True))
        table.add_section()
        for part in towers:
            table.add_row(*_part_row(part, largest))
    table.add_section()
    table.add_row(*_total_row("with towers" if towers else "all", survey.footprint))
    if survey.drafter is not None:
        table.add_row(*_total_row(survey.drafter[0].removeprefix("gemma-4-"), survey.drafter[1], style=""))
    return table


def _part_row(part: Part, largest: int) -> tuple[str | Text, ...]:
    bits = bits_per_weight(part)
    details = (", ".join(part.grids), f"{bits:.2f}" if bits else "") if _wide() else ()
    return (
        part.label,
        count(part.parameters) if part.parameters else "",
        *details,
        size(part.disk_bytes),
        _or_none(part.resident_bytes),
        _or_none(part.mapped_bytes),
        *([_bar(part.disk_bytes / largest, "cyan" if part.resident_bytes else "dim cyan")] if _wide() else []),
    )


def _bar(share: float, style: str = "cyan") -> Text:
    width = share * BAR_WIDTH
    return Text("━" * round(width) or "╸" * (width > 0.1), style=style)


def _total_row(label: str, footprint: Footprint, *, text_only: bool = False, style: str = "bold") -> list[Text]:
    parameters, disk, resident, mapped = (
        footprint.total(field, text_only=text_only)
        for field in ("parameters", "disk_bytes", "resident_bytes", "mapped_bytes")
    )
    details = ("", f"{8 * disk / parameters:.2f}") if _wide() else ()
    row = (label, count(parameters), *details, size(disk), size(resident), _or_none(mapped))
    return [Text(cell, style=style) for cell in row]


def _print_kv(survey: Survey) -> None:
    wishes = survey.wishes
    sequences = f" in each of {wishes.batch} sequences" if wishes.batch > 1 else ""
    title = f"KV cache, {tokens_text(wishes.context)} tokens{sequences}"
    if not survey.kv[KV_BITS[0]]["total"]:
        console.print(Text("\nno KV cache: it reads keys and values of the model that it drafts for", style="dim"))
        return
    table = _table("", "sliding layers", "full layers", "together", "with all that is resident")
    for bits, kv in survey.kv.items():
        sizes = (kv["sliding"], kv["full"], kv["total"], survey.needed_bytes(bits))
        table.add_row(f"{bits} bits", *map(size, sizes))
    _show(title, table)


def _print_training(survey: Survey) -> None:
    """Memory of a training step on each GPU, and what checkpointing would save."""
    training = survey.training
    assert training is not None
    table = _table("", "", "")
    largest = max(training.rows.values())
    for name, value in training.rows.items():
        if value:
            table.add_row(LABELS[name], size(value), _bar(value / largest))
    table.add_section()
    table.add_row(Text("at the peak", style="bold"), Text(size(training.total), style="bold"), "")
    table.columns[1].justify = "right"
    _show(training_title(training), table)
    if not training.gradient_checkpointing:
        other = survey.checkpointed
        saved = f"with --gradient-checkpointing: activations {size(other.activations)}, all {size(other.total)}"
        console.print(Text(saved, style="dim"))


def training_title(training: TrainingMemory) -> str:
    """On what, and with how much at once."""
    gpus = f"on each of {training.gpus} GPUs" if training.gpus > 1 else "on one GPU"
    checkpointing = ", activations checkpointed" if training.gradient_checkpointing else ""
    return f"Training {gpus}, {training.micro_tokens:,} tokens a forward{checkpointing}"


def fits_table(survey: Survey) -> Table:
    """Print the recipes that fit the budget, with the longest context of each."""
    contexts = (f"with {bits}-bit KV" for bits in KV_BITS)
    table = _table("recipe", "on disk", "resident", "mapped", *contexts)
    for fit in survey.fits:
        table.add_row(
            fit.recipe,
            size(fit.disk_bytes),
            size(fit.resident_bytes),
            _or_none(fit.mapped_bytes),
            *(_context(fit.longest[bits], survey.plan) for bits in KV_BITS),
        )
    return table


def stages_table(survey: Survey) -> Table:
    """The peak of each stage on each GPU, and whether it is within the budget."""
    budget = survey.wishes.budget_bytes
    assert budget is not None
    table = _table("stage", "at the peak", "fits")
    for name, peak in survey.stages.items():
        fits = Text("yes", style="green") if peak <= budget else Text("no", style="red")
        table.add_row(STAGE_LABELS[name], size(peak), fits)
    return table


def context_text(tokens: int, plan: Plan) -> str:
    """A context length that fits, rounded down."""
    if tokens == 0:
        return "does not fit"
    if tokens >= plan.model.layer_config.max_position_embeddings:
        return f"{tokens_text(tokens)}, its limit"
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


def _context(tokens: int, plan: Plan) -> Text:
    text = context_text(tokens, plan)
    return Text(text, style="red" if tokens == 0 else "green" if "limit" in text else "yellow")


def print_tensors(plan: Plan) -> None:
    """A table of every tensor, and the sum."""
    table = _table("tensor", "shape", "grid", "bytes", "rule")
    for tensor in plan.everything:
        shape = " x ".join(map(str, tensor.spec.shape))
        table.add_row(tensor.name, shape, tensor.grid.name, f"{tensor.size_bytes:,}", tensor.rule.name)
    for column in (table.columns[0], table.columns[4]):
        column.no_wrap, column.overflow = False, "fold"
    table.columns[2].justify = table.columns[4].justify = "left"
    console.print(table)
    total = f"{plan.size_bytes:,} bytes ({size(plan.size_bytes)})"
    static = f", {len(plan.static_scales)} static scales" if plan.static_scales else ""
    console.print(f"{len(plan.everything)} tensors, {total}{static}, plan {plan.digest[:12]}")


def print_family(rows: list[FamilyRow]) -> None:
    """The family, computed beside published, and what the published figures leave out."""
    table = _table("Gemma 4", "params", "BF16", "Q4_0 GGUF", "W4A16", "mobile", "drafter")
    for row in rows:
        published = row.published_gb
        table.add_row(
            Text(row.name.removeprefix("gemma-4-"), style="bold"),
            count(row.parameters),
            _beside(row.bf16_bytes, published["bf16"]),
            _beside(row.gguf_bytes, published["q4_0"]),
            size(row.w4a16_bytes),
            size(row.mobile["file"]) if row.mobile else "-",
            size(row.drafter_bytes),
        )
    _show("Files", table, note="   in brackets, GB as Google publishes it")
    table = _table("", "Q4_0 resident", "mapped", "mobile resident", "text only", "mapped")
    for row in rows:
        mobile, published = row.mobile, row.published_gb
        cells = (
            [
                _beside(mobile["resident"], published["mobile"]),
                _beside(mobile["resident_text"], published["mobile_text"]),
                size(mobile["mapped"]),
            ]
            if mobile
            else ["-"] * 3
        )
        resident, mapped = size(row.gguf_resident_bytes), _or_none(row.gguf_mapped_bytes)
        table.add_row(Text(row.name.removeprefix("gemma-4-"), style="bold"), resident, mapped, *cells)
    _show("Memory", table)
    console.print(Text("\nWhat the published figures leave out", style="bold"))
    for note in LEFT_OUT:
        console.print(Padding(Text(note, style="dim"), (0, 0, 0, 2)))
    console.print()


def _beside(computed: int, published: float) -> Text:
    return Text.assemble(size(computed), (f" ({published:g})", "dim"))


def _show(title: str, table: Table, note: str = "") -> None:
    """A table under its title, with air above it."""
    console.print()
    if title:
        console.print(Text.assemble((title, "bold"), (note, "dim")))
    console.print(table)


def _or_none(size_bytes: int) -> str:
    return size(size_bytes) if size_bytes else "-"


def _table(*headers: str) -> Table:
    """Text in the first column, bars in one without a heading, numbers elsewhere."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, show_header=any(headers))
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i == 0 or not header else "right", no_wrap=True)
    return table
