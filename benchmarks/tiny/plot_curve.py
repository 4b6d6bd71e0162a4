"""The KL-against-tokens curve of the seeds in `results/tiny_q4_0.json`: docs/images/kl-tokens.png. Needs matplotlib."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[2]
FROZEN_AT = 0.4 * 50  # a tail of 60% of 50 million tokens
COLORS = ("#0b6e4f", "#2a9d8f", "#84c5a8")


def main() -> None:
    rows = json.loads((ROOT / "benchmarks/results/tiny_q4_0.json").read_text("utf-8"))["rows"]
    stock = next(row for row in rows if row["name"] == "stock")
    seeds = sorted((row for row in rows if row["name"].startswith("seed ")), key=lambda row: row["name"])
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for row, color in zip(seeds, COLORS, strict=True):
        tokens, losses = zip(*row["losses"], strict=True)
        axes.plot([t / 1e6 for t in tokens], losses, color=color, label=f"{row['name']}, training text")
        axes.errorbar(tokens[-1] / 1e6, row["kl"], yerr=row["kl_ci95"], fmt="o", color=color, capsize=4)
    axes.axhline(stock["kl"], color="#b23a48", linestyle="--", label="stock rounding, held-out text")
    axes.axvline(FROZEN_AT, color="#999999", linewidth=1, linestyle=":")
    axes.annotate("codes freeze", (FROZEN_AT, 0.066), xytext=(5, 0), textcoords="offset points", color="#666666")
    axes.set(xlabel="training tokens, millions", ylabel="KL to the original, nats", ylim=(0, 0.08), xlim=(0, 51.5))
    axes.set_title("Q4_0 training of the bundled model; dots: held-out text with 95% interval", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs/images/kl-tokens.png", dpi=130)


if __name__ == "__main__":
    main()
