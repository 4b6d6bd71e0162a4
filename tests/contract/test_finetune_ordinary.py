"""Fine-tuning a stranger's QAT checkpoint: on its grid, and the ordinary way, in bfloat16 and converted afterwards."""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from intaglio.formats.checkpoint.write import export_hf
from intaglio.measure.evaluate import Candidate, evaluate_many, transformers_source
from intaglio.measure.metrics import Comparison
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import load_model
from intaglio.packed.decoded import load_packed
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.sources.convert import convert
from intaglio.tiny import HELDOUT_TEXT, MODEL_DIR, TRAIN_TEXT
from intaglio.train.corpus import held_out_windows, load_corpus
from intaglio.train.loop import train
from intaglio.train.options import Options
from intaglio.train.pack import pack_model
from intaglio.train.quantize import quantize
from intaglio.train.start import plan_to_go_on
from tests.support.strangers import put_on_grid

LENGTH, BATCH, STEPS, DOMAIN = 128, 2, 8, '"source": "moby-dick"'
TUNING = (
    "schedule.loss=cross_entropy", f"schedule.tokens={LENGTH * BATCH * STEPS}", f"schedule.batch_size={BATCH}",
    f"schedule.sequence_length={LENGTH}", "schedule.lr=5e-5", "schedule.frozen_tail=0", "schedule.gptq_tokens=0",
)  # fmt: skip
# embeddings in F16 all along: what is compared are the linears, which the checkpoint was trained on a grid for
EMBEDDINGS = ("weights.token_embedding.grid=f16", "weights.ple_embedding.grid=f16")


def released(folder: Path) -> Path:
    """The bundled model with linears on absmax / 7, as someone else's training would leave it, in bfloat16."""
    shutil.copytree(MODEL_DIR, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if weight.ndim == 2 and "embed" not in name and "model_projection" not in name:
            codes, scales = put_on_grid(weight.reshape(-1, 32), "absmax-7", "bf16")
            tensors[name] = (codes * scales).to(torch.bfloat16).reshape(weight.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def domain(source: Path, target: Path) -> Path:
    """One book of the bundled text, which no weight was trained for alone."""
    with lzma.open(source, "rt", encoding="utf-8") as lines:
        target.write_text("".join(line for line in lines if DOMAIN in line), "utf-8")
    return target


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Comparison]:
    """Three models on held-out text of the domain, against the bfloat16 fine-tune before anything is converted."""
    folder = tmp_path_factory.mktemp("ordinary")
    source, tokenizer = released(folder / "released"), load_tokenizer(MODEL_DIR)
    vocabulary = load_model(MODEL_DIR).config.vocab_size
    text = load_corpus(
        domain(TRAIN_TEXT, folder / "train.jsonl"), tokenizer, sequence_length=LENGTH, vocab_size=vocabulary,
        max_tokens=LENGTH * BATCH * STEPS,
    )  # fmt: skip

    def tuned(original: Any, plan: Plan, name: str, start: PackedModel | None = None) -> PackedModel:
        options = Options(precision="no", compiled=False)
        student = train(original, plan, text, folder / name, start=start, options=options)
        pack_model(student, folder / f"{name}-packed", assets=source)
        return PackedModel.open(folder / f"{name}-packed")

    start = convert(source, folder / "converted", recipe=Recipe.load("q4_0-free", EMBEDDINGS)).packed
    on_grid = tuned(load_packed(start), plan_to_go_on(start, TUNING), "on-grid", start)

    floats = [f"weights.{rule}.grid=f32" for rule in ("linear", "ple_linear")]
    plan = make_plan(source, Recipe.load("q4_0-free", (*EMBEDDINGS, *floats, *TUNING)))
    ordinary = tuned(load_model(source), plan, "ordinary")
    export_hf(ordinary, folder / "ordinary-hf")
    stock = make_plan(folder / "ordinary-hf", Recipe.load("q4_0-stock", EMBEDDINGS))
    converted = quantize(folder / "ordinary-hf", stock, folder / "ordinary-converted")

    windows = held_out_windows(
        domain(HELDOUT_TEXT, folder / "heldout.jsonl"), tokenizer, length=LENGTH, max_tokens=8 * LENGTH,
        vocab_size=vocabulary,
    )  # fmt: skip
    models = {"before": start, "on the grid": on_grid, "ordinary": converted}
    candidates = {
        name: Candidate(source=transformers_source(load_packed(packed)), runtime="transformers", simulated=True)
        for name, packed in models.items()
    }
    reference = transformers_source(load_packed(ordinary))
    return evaluate_many(reference, candidates, torch.from_numpy(windows).long())


def test_the_ordinary_way_is_worse(measured: dict[str, Comparison]) -> None:
    """Llama-quantize's rounding costs more than the fine-tune had gained; on the grid nothing is rounded."""
    before, on_grid, ordinary = (measured[name] for name in ("before", "on the grid", "ordinary"))
    assert 5 * on_grid.kl_mean_nats < ordinary.kl_mean_nats
    assert on_grid.kl_mean_nats < 0.9 * before.kl_mean_nats
    tuned = ordinary.perplexity_reference
    assert tuned < on_grid.perplexity_candidate < before.perplexity_candidate < ordinary.perplexity_candidate
