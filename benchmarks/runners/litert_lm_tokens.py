"""Tokens of texts by LiteRT-LM's own tokenizer: `litert_lm_tokens.py BUNDLE TEXTS.json OUT.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import litert_lm


def main() -> None:
    bundle, texts, out = sys.argv[1:]
    with litert_lm.Engine(bundle, backend=litert_lm.Backend.CPU()) as engine:
        found = [list(engine.tokenize(text)) for text in json.loads(Path(texts).read_text("utf-8"))]
    Path(out).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
