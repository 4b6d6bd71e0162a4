"""The doctor's facts as a page of 80 columns."""

from __future__ import annotations

from itertools import groupby

from rich.table import Table
from rich.text import Text

from intaglio.cli.streams import Printer
from intaglio.runs.doctor import FAULT, FINE, MISSING, Fact

console = Printer()
MARKS = {FINE: ("+", "green"), MISSING: ("-", "dim"), FAULT: ("!", "bold red")}
LEGEND = ("+ is here   - is missing   ! is broken", "[name] is an extra: pip install 'intaglio[name]'")


def print_doctor(facts: list[Fact]) -> None:
    """A section after the other, a row each; what to do or to know stands below what was found."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for section, rows in groupby(facts, lambda fact: fact.section):
        table.add_row(Text(section, style="bold"), "")
        for fact in rows:
            mark, style = MARKS[fact.state]
            said = Text(fact.found)
            if fact.advice:
                said.append(f"\n{fact.advice}", style="" if fact.state == FAULT else "dim")
            table.add_row(Text(f"{mark} {fact.name}", style=style), said)
        table.add_row("", "")
    console.print(table)
    for line in LEGEND:
        console.print(Text(line, style="dim"))
