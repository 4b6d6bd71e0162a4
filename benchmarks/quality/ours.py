"""intaglio: one row of the table.

    python ours.py MODEL WORK OUT HOW RECIPE TOKENS

HOW   stock, absmax or mse: that fit, without text
      gptq: `quantize` with GPTQ. layers: GPTQ and the stage "layers", windows of two layers
      qat: GPTQ as a start, then TOKENS tokens of training, else 0, in batches of 4 x 256, with the settings of the demo
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from artifact import Making
from methods import embedding_settings

from intaglio import Recipe, load_corpus, load_model, load_tokenizer, make_plan, pack_model, quantize
from intaglio.plan.plan import Plan
from intaglio.tiny import TRAIN_TEXT
from intaglio.train.corpus import Corpus
from intaglio.train.layerwise import quantize_on_text
from intaglio.train.loop import train
from intaglio.train.options import Options

QAT = {
    "q4_0": {"lr": 1e-4, "scale_lr": 1e-3, "float_lr": 1.0, "frozen_tail": 0.1, "tail_lr": 0.5},
    "q2_0": {"lr": 5e-4, "scale_lr": 1e-3, "float_lr": 1.0, "frozen_tail": 0.1, "tail_lr": 0.5},
    "mobile": {"lr": 5e-4, "scale_lr": 1e-3, "float_lr": 1.0, "frozen_tail": 0.1, "tail_lr": 0.5},
}
LAYERS = {"stages": ("layers",), "layer_window": 2}


def plan_of(making: Making, how: str, recipe: str, tokens: int) -> Plan:
    count, length = making.calibration().numel(), making.calibration().shape[1]
    fit = {"stock": "stock", "absmax": "absmax"}.get(how, "mse")
    settings = embedding_settings(making.model_dir, how == "stock") if recipe == "q4_0" else []
    made = Recipe.load("q4_0-stock" if how == "stock" else recipe, [f"fit={fit}", *settings])
    if how in ("stock", "absmax", "mse"):
        return make_plan(making.model_dir, made.with_schedule(sequence_length=length))
    made = made.with_schedule(gptq_tokens=count, layer_tokens=count, sequence_length=length)
    if how == "layers":
        made = made.with_schedule(**LAYERS)
    if how == "qat":
        made = made.with_schedule(tokens=tokens, batch_size=4, sequence_length=256, **QAT[recipe])
    return make_plan(making.model_dir, made)


def text(plan: Plan, model: Path, tokens: int) -> Corpus:
    length, vocabulary = plan.recipe.schedule.sequence_length, plan.model.layer_config.vocab_size
    return load_corpus(
        TRAIN_TEXT, load_tokenizer(model), sequence_length=length, vocab_size=vocabulary, max_tokens=tokens
    )


def main() -> None:
    making = Making()
    how, recipe, tokens = making.options
    plan = plan_of(making, how, recipe, int(tokens))
    packed, looks = making.out / "packed", making.calibration().numel()
    making.start()
    if how == "qat":
        model = load_model(making.model_dir)
        with tempfile.TemporaryDirectory() as folder:
            corpus = text(plan, making.model_dir, int(tokens))
            options = Options(precision="no", compiled=False)
            latents = train(model, plan, corpus, Path(folder) / "run", options=options)
        pack_model(latents, packed, assets=making.model_dir)
    elif how in ("gptq", "layers") or plan.static_scales:
        learns = {"gptq": how in ("gptq", "layers"), "layers": how == "layers"}
        quantize_on_text(making.model_dir, plan, text(plan, making.model_dir, looks), packed, **learns)
    else:
        quantize(making.model_dir, plan, packed)
        looks = 0
    making.stop()
    making.finish("gguf", calibration_tokens=looks, training_tokens=int(tokens))


if __name__ == "__main__":
    main()
