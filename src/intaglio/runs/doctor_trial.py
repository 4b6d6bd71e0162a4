"""Tries torch, transformers and llama.cpp on the bundled model. `runs.doctor` starts it as a process of its own.

    python -m intaglio.runs.doctor_trial FOLDER

It prints a line of JSON for each as soon as it is done: its "name", and what it "found", the "fault" that it met, or
what is "missing". FOLDER takes a packed model and a GGUF.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from intaglio.plan.files import one_line
from intaglio.tiny import MODEL_DIR

TEXT = "The whale swam past the ship, and nobody on it said a word about it until the evening came."
MOST_KL = 1.0  # nats; stock Q4_0 has about 0.1 on such a text, and wrong products have 5 and more


class Trial:
    """The attempts, in their order."""

    def torch(self) -> dict[str, Any]:
        """The GPUs that torch can use."""
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        gpus = [torch.cuda.get_device_properties(index) for index in range(count)]
        return {"found": torch.__version__, "gpus": [{"name": gpu.name, "bytes": gpu.total_memory} for gpu in gpus]}

    def transformers(self) -> dict[str, Any]:
        """Logits of the bundled model, on the GPU where there is one."""
        import torch

        from intaglio.measure.evaluate import transformers_source
        from intaglio.numerics.device import device_for
        from intaglio.packed.assets import load_tokenizer
        from intaglio.packed.checkpoint import load_model

        self.windows_NT = torch.tensor([load_tokenizer(MODEL_DIR)(TEXT)["input_ids"]])
        self.logits_TV = transformers_source(load_model(MODEL_DIR, device=device_for()))(self.windows_NT[0]).cpu()
        finite = bool(self.logits_TV.isfinite().all())
        return {"found": "runs the bundled model"} if finite else {"fault": "the bundled model computes NaN or Inf"}

    def llama(self, folder: Path) -> dict[str, Any]:
        """The bundled model in Q4_0 from a GGUF, compared with transformers' logits."""
        from intaglio.formats.gguf.write import export_gguf
        from intaglio.measure.evaluate import Candidate, evaluate_many
        from intaglio.measure.llamacpp import LlamaCpp, installed
        from intaglio.plan.recipe import Recipe
        from intaglio.runs.quantize import quantize_model

        if not installed():
            return {"missing": "not here", "advice": "pip install 'intaglio[llama]'"}
        packed, _ = quantize_model(MODEL_DIR, Recipe.load("q4_0-stock"), folder / "packed")
        export_gguf(packed, folder / "model.gguf")
        with LlamaCpp(folder / "model.gguf", context_tokens=64) as llama:
            candidate = Candidate(source=llama.logits, runtime=llama.version, simulated=False)
            result = evaluate_many([self.logits_TV], {"gguf": candidate}, self.windows_NT)["gguf"]
        if not result.kl_mean_nats < MOST_KL:
            return {"fault": f"computes nonsense: KL {result.kl_mean_nats:.2f} nats to transformers"}
        return {"found": "runs the bundled model as GGUF"}


def main(folder: Path) -> None:
    """Try one after the other, and print what came of it."""
    trial = Trial()
    attempts: dict[str, Callable[[], dict[str, Any]]] = {
        "torch": trial.torch,
        "transformers": trial.transformers,
        "llama.cpp": lambda: trial.llama(folder),
    }
    for name, attempt in attempts.items():
        try:
            answer = attempt()
        except Exception as error:  # whatever it is, it is what the doctor is asked for
            answer = {"fault": one_line(error)}
        print(json.dumps({"name": name, **answer}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
