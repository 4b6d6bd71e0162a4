"""Code that the scripts of all peers share. It runs in their environments, so it imports nothing of intaglio.

Each script is called as `python SCRIPT MODEL WORK OUT [OPTION ...]` and leaves in OUT

    artifact.json    what it took: CPU seconds, peak memory, tokens, versions
    checkpoint/      a transformers folder in float32: what the method's codes decode to, everything else as it was; or
    model.gguf       the tool's own file
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Making:
    """One method at work: its arguments, the clock, and the folder that it leaves."""

    def __init__(self) -> None:
        self.model_dir, self.work, self.out = (Path(word) for word in sys.argv[1:4])
        self.options = sys.argv[4:]
        self.out.mkdir(parents=True, exist_ok=True)
        self.start()
        torch.manual_seed(0)

    def calibration(self) -> torch.Tensor:
        """int64 [N, T], the text that every method may look at."""
        return torch.from_numpy(np.load(self.work / "calibration.npy"))

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        """The original; the clock starts when it is there."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.model_dir, dtype=dtype).eval().to(DEVICE)
        self.start()
        return model

    def start(self) -> None:
        self.began = time.process_time()

    def stop(self) -> None:
        """Stop the clock before what is not the method's own work."""
        self.record: dict[str, Any] = {
            "cpu_seconds": round(time.process_time() - self.began, 1),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None,
        }

    def save(self, model: Any) -> None:
        """The model as OUT/checkpoint, in float32."""
        model.to(torch.float32).save_pretrained(self.out / "checkpoint")
        self.add_tokenizer(self.out / "checkpoint")

    def add_tokenizer(self, folder: Path) -> None:
        for name in TOKENIZER:
            if (self.model_dir / name).is_file():
                shutil.copyfile(self.model_dir / name, folder / name)

    def finish(self, *packages: str, **facts: Any) -> None:
        """Write artifact.json. packages: whose versions count."""
        versions = {name: version(name) for name in ("torch", "transformers", *packages)}
        record = self.record | {"versions": versions, "threads": torch.get_num_threads(), "device": DEVICE} | facts
        (self.out / "artifact.json").write_text(json.dumps(record, indent=1), "utf-8")


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the decoder layers: those that recipe q4_0 and llama.cpp put on Q4_0."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}
