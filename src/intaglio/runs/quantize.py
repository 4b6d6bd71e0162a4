"""Quantization without training, from a checkpoint's folder to a packed model's: by the fit alone, or on text."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from intaglio.errors import InputError
from intaglio.numerics.device import Device, device_for
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import checkpoint_spec
from intaglio.packed.model import PackedModel
from intaglio.packed.origin import provenance_of
from intaglio.packed.outputs import check_output
from intaglio.packed.store import scratch_folder
from intaglio.plan.hub import find_model
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.progress import Progress
from intaglio.train.corpus import load_corpus
from intaglio.train.data.sources import Data, path_of, record_of
from intaglio.train.layerwise import quantize_on_text
from intaglio.train.media import audio_samples, image_samples
from intaglio.train.quantize import quantize
from intaglio.train.towers import Towers


def quantize_model(
    model_dir: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    data: Data | None = None,
    images: str | Path | None = None,
    audio: str | Path | None = None,
    text_only: bool = False,
    trained: PackedModel | None = None,
    replace: bool = False,
    progress: Progress | None = None,
    device: Device = None,
) -> tuple[PackedModel, dict[str, float]]:
    """Write a PackedModel without training; return it, and what calibrated activations change in each tower's output.

    data: text to calibrate static scales on, for GPTQ where the schedule has gptq_tokens, and for the training of
    layers where that is one of its stages; None leaves the scales off. images, audio: folders, likewise for the towers'
    scales; of text_only there are none. trained: as `quantize` takes it, a text model that was packed by this recipe;
    it has its static scales, so `data` has no use then. device: where tensors are fitted; None picks a GPU if there is
    one. Raises InputError for samples of what the recipe does not quantize, and for GPTQ or layers without text.
    """
    check_output(out, [model_dir, path_of(data), images, audio, None if trained is None else trained.path])
    if data is not None and trained is not None:
        raise InputError("--trained has its static scales: expected it or --data, not both")
    progress, out, device = progress or Progress(), Path(out), device_for(device)
    model_dir = find_model(model_dir, progress)
    plan = make_plan(checkpoint_spec(model_dir, text_only=text_only), recipe)
    if plan.recipe.schedule.gptq_tokens and data is None and trained is None:
        raise InputError("schedule.gptq_tokens: GPTQ needs text, and there is none: give --data")
    if "layers" in plan.recipe.schedule.stages and data is None and trained is None:
        raise InputError("schedule.stages: the stage 'layers' learns from text, and there is none: give --data")
    samples = [image_samples(model_dir, images)] if images is not None else []
    samples += [audio_samples(model_dir, audio)] if audio is not None else []
    towers = Towers(plan, samples, progress) if samples else None
    if data is not None and not plan.carried:
        _fit_on_text(model_dir, plan, out, data, device, replace, progress)
        return PackedModel.open(out), {}
    with ExitStack() as stack:
        if data is not None:  # the text model by itself, which what is carried then joins
            alone = stack.enter_context(scratch_folder(out)) / "text"
            _fit_on_text(model_dir, make_plan(model_dir, plan.recipe), alone, data, device, replace, progress)
            trained = PackedModel.open(alone)
        progress.stage(f"Fitting {len(plan.everything)} tensors")
        quantize(
            model_dir, plan, out, trained=trained, towers=towers, replace=replace, device=device, progress=progress
        )
    return PackedModel.open(out), towers.errors if towers is not None else {}


def _fit_on_text(
    model_dir: str | Path,
    plan: Plan,
    out: Path,
    data: Data,
    device: torch.device,
    replace: bool,
    progress: Progress,
) -> None:
    schedule = plan.recipe.schedule
    gptq, layers = bool(schedule.gptq_tokens), "layers" in schedule.stages
    if not (plan.static_scales or gptq or layers):
        raise InputError(
            f"recipe {plan.recipe.name} has no static scales to calibrate: leave out the text, or give it to GPTQ with "
            "--set schedule.gptq_tokens=32768, or to the training of layers with --set schedule.stages=['layers']"
        )
    progress.stage("Reading text")
    corpus = load_corpus(
        data,
        load_tokenizer(model_dir),
        sequence_length=schedule.sequence_length,
        vocab_size=plan.model.layer_config.vocab_size,
        max_tokens=schedule.tokens_by_layers(bool(plan.static_scales)),
    )
    progress.stage("Quantizing layer by layer")
    quantize_on_text(
        model_dir,
        plan,
        corpus,
        out,
        gptq=gptq,
        layers=layers,
        device=device,
        provenance=provenance_of(model_dir) | record_of(data),
        replace=replace,
        progress=progress,
    )
