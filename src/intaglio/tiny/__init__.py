"""A small Gemma 4 model and matching text, for tests and examples that need no download. Imports nothing.

`MODEL_DIR` is a Hugging Face folder, and `DRAFTER_DIR` one of a drafter for it; the texts are xz-compressed JSON
lines of ``{"text", "source"}``. The model never saw `HELDOUT_TEXT`. Licences are in ``NOTICE.md``.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
DRAFTER_DIR: Path = Path(__file__).parent / "drafter"
TRAIN_TEXT: Path = Path(__file__).parent / "corpus.train.jsonl.xz"
HELDOUT_TEXT: Path = Path(__file__).parent / "corpus.heldout.jsonl.xz"
