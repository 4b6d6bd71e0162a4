"""The quality table as Markdown, from the figures that `measure.py` wrote.

python benchmarks/quality/table.py FILE PAGE        writes PAGE's tables anew, between its two marks
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
FORMS = ("llama.cpp", "decoded", "as it came")


def best_form(row: dict[str, Any]) -> str:
    """The form nearest to what a user runs."""
    return next(form for form in FORMS if form in row["forms"])


def kl(found: dict[str, Any] | None, domain: str, ci: bool = False) -> str:
    if found is None:
        return ""
    figures = found[domain]
    half = f" ± {figures['kl_mean_ci_nats']:.4f}" if ci and figures["kl_mean_ci_nats"] else ""
    return f"{figures['kl_mean_nats']:.4f}{half}"


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def head(*cells: str) -> list[str]:
    return [line(*cells), "|" + "---|" * len(cells)]


def tokens(row: dict[str, Any]) -> str:
    looked, trained = row["calibration_tokens"], row["training_tokens"]
    return " + ".join([f"{looked:,}"] * bool(looked) + [f"{trained:,} trained"] * bool(trained)) or "0"


def bits(row: dict[str, Any]) -> str:
    if "gguf_bytes" in row:
        return f"{row['gguf_bytes'] / 1e6:.2f} MB"
    return f"{row['bits_a_weight']:.2f} bits a weight"


def tables(result: dict[str, Any]) -> list[str]:
    made = [row for row in result["methods"].values() if "forms" in row]
    lines = head("method", *(f"KL, {form}" for form in FORMS), "99% KL", "same top", "perplexity", "greedy tokens")
    for row in made:
        found = row["forms"][best_form(row)]
        figures, greedy = found["held-out"], found["greedy"]
        kls = [kl(row["forms"].get(form), "held-out", ci=form == best_form(row)) for form in FORMS]
        rest = (f"{figures['kl_99_nats']:.3f}", f"{figures['same_top_share']:.1%}")
        rest += (f"{figures['perplexity_candidate']:.3f}", f"{greedy['median']:.0f}, {greedy['same_share']:.1%}")
        lines.append(line(row["label"], *kls, *rest))
    lines += ["", "Cost:", "", *head("method", "size", "its own embeddings", "tokens", "CPU seconds", "peak memory")]
    for row in made:
        cost = (f"{row['cpu_seconds']:.0f}", f"{row['peak_rss_bytes'] / 1e9:.2f} GB")
        lines.append(line(row["label"], bits(row), row["embeddings"], tokens(row), *cost))
    domains = list(result["texts"])
    lines += ["", "KL by domain, in the form nearest to what a user runs:", "", *head("method", "form", *domains)]
    for row in made:
        form = best_form(row)
        lines.append(line(row["label"], form, *(kl(row["forms"][form], domain, ci=True) for domain in domains)))
    lines += ["", *head("text", "source", "bytes a token", "tokens scored", "perplexity of the original")]
    for domain, text in result["texts"].items():
        figures = next(row["forms"][best_form(row)][domain] for row in made)
        scored = (f"{text['bytes_a_token']}", f"{figures['tokens']:,}", f"{figures['perplexity_reference']:.1f}")
        lines.append(line(domain, text["source"], *scored))
    failed = [row for row in result["methods"].values() if "failure" in row]
    return lines + [""] * bool(failed) + [f"- {row['label']} did not run: `{row['failure']}`" for row in failed]


def write_table(result: dict[str, Any], page: Path) -> None:
    before, _, rest = page.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text("\n".join([before + BEGIN, "", *tables(result), "", END + after]), "utf-8")


if __name__ == "__main__":
    write_table(json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2]))
