"""Write the text that the package carries: a sample of the corpus, compressed.

Takes the same share of every source, whole documents only, as many as fit: all held-out text, and
training text in what is left of the budget.

    python benchmarks/tiny/bundle_text.py
"""

import argparse
import lzma
from pathlib import Path

BUDGET_BYTES = 4_000_000  # of the two compressed files together


def compress(lines: list[bytes]) -> bytes:
    """An .xz file; the filter suits text, and the bytes depend on nothing but the lines."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]
    return lzma.compress(b"".join(lines), filters=filters)


def largest_prefix(lines: list[bytes], budget: int) -> bytes:
    """Compresses as many of the first lines as fit. The corpus is in random order, so they sample it."""
    low, high, best = 0, len(lines), b""
    while high - low > len(lines) // 500:
        middle = (low + high) // 2
        packed = compress(lines[:middle])
        if len(packed) <= budget:
            low, best = middle, packed
        else:
            high = middle
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--corpus", type=Path, default=Path(".data/corpus"))
    parser.add_argument("--out", type=Path, default=Path("src/intaglio/tiny"))
    args = parser.parse_args()

    heldout = compress((args.corpus / "heldout.jsonl").read_bytes().splitlines(keepends=True))
    lines = (args.corpus / "train.jsonl").read_bytes().splitlines(keepends=True)
    train = largest_prefix(lines, BUDGET_BYTES - len(heldout))
    (args.out / "corpus.heldout.jsonl.xz").write_bytes(heldout)
    (args.out / "corpus.train.jsonl.xz").write_bytes(train)
    print(f"held-out {len(heldout):,} bytes, training {len(train):,} bytes")


if __name__ == "__main__":
    main()
