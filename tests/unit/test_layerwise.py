"""Quantization layer by layer: the codes of the whole-model pass, errors that training lowers, few layers in memory."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intaglio.errors import InputError, OutputError, RecipeError
from intaglio.numerics.grid import Quantized
from intaglio.packed.checkpoint import load_model
from intaglio.packed.decoded import load_packed
from intaglio.packed.model import PackedModel
from intaglio.packed.outputs import remove
from intaglio.plan.memory import layers_memory, stage_peaks
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.runs.proof import Evaluation
from intaglio.runs.quantize import quantize_model
from intaglio.runs.train import run
from intaglio.tiny import HELDOUT_TEXT
from intaglio.train import layerwise
from intaglio.train.corpus import Corpus
from intaglio.train.latents import Latents
from intaglio.train.layerwise import WindowInfo, quantize_on_text
from intaglio.train.loop import train
from intaglio.train.options import Options
from intaglio.train.pack import pack_model
from intaglio.train.quantize import quantize
from intaglio.train.start import plan_to_go_on
from intaglio.train.student import build_student, calibrate_student, gptq_start
from tests.support.tiny import GEMMA2, GEMMA3, GEMMA4, GEMMA4_MOE, make_checkpoint
from tests.support.training import small_corpus, small_model

SMALL = {"vocab_size": 256, "vocab_size_per_layer_input": 256, "max_position_embeddings": 128}
SCHEDULE = [
    *("schedule.sequence_length=32", "schedule.gptq_tokens=512", "schedule.calibration_tokens=256"),
    *("schedule.layer_tokens=1024", "schedule.layer_batch=16", "schedule.layer_lr=3e-4", "schedule.layer_epochs=4"),
]
OPTIONS = Options(precision="no", compiled=False)
EVALUATION = Evaluation(tokens=64, window=32, references="none")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 4 with per-layer inputs and shared KV, whose layers outweigh its residual stream, in bfloat16."""
    folder = make_checkpoint(tmp_path_factory.mktemp("layerwise") / "model", GEMMA4 | SMALL)
    small_model(GEMMA4 | SMALL).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return small_corpus(32, 32)


def plan_of(checkpoint: Path, recipe: str = "q4_0", *settings: str) -> Plan:
    return make_plan(checkpoint, Recipe.load(recipe, [*SCHEDULE, *settings]))


def by_layers(
    checkpoint: Path, plan: Plan, corpus: Corpus, out: Path, **how: Any
) -> tuple[PackedModel, list[WindowInfo]]:
    windows = quantize_on_text(checkpoint, plan, corpus, out, options=OPTIONS, **how)
    return PackedModel.open(out), windows


def as_a_whole(checkpoint: Path, plan: Plan, corpus: Corpus, out: Path) -> PackedModel:
    """The same by passes over the whole model."""
    original, device = load_model(checkpoint), torch.device("cpu")
    latents = build_student(original, plan)
    gptq_start(latents, original, corpus, device)
    calibrate_student(latents, corpus, device)
    pack_model(latents, out, assets=checkpoint)
    return PackedModel.open(out)


def differing(first: PackedModel, second: PackedModel) -> dict[str, float]:
    """Share of the codes, or of the floats, that differ, by tensor."""
    found = {}
    for (tensor, one), (_, other) in zip(first, second, strict=True):
        a, b = (value.codes if isinstance(value, Quantized) else value for value in (one, other))
        found[tensor.name] = float((a != b).float().mean())
        if isinstance(one, Quantized) and isinstance(other, Quantized) and not found[tensor.name]:
            found[tensor.name] += float((one.scale != other.scale).float().mean())
    return found


@pytest.fixture(scope="module")
def moved(checkpoint: Path, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """Q4_0 by GPTQ."""
    return by_layers(checkpoint, plan_of(checkpoint), corpus, tmp_path_factory.mktemp("moved") / "packed", gptq=True)[0]


def test_gptq_chooses_the_codes_of_the_whole_model(
    moved: PackedModel, checkpoint: Path, corpus: Corpus, tmp_path: Path
) -> None:
    whole = as_a_whole(checkpoint, moved.plan, corpus, tmp_path / "whole")
    assert not any(differing(moved, whole).values())


def test_static_scales_are_those_of_the_whole_model(checkpoint: Path, corpus: Corpus, tmp_path: Path) -> None:
    plan = plan_of(checkpoint, "mobile")
    ours, _ = by_layers(checkpoint, plan, corpus, tmp_path / "layers", gptq=True)
    whole = as_a_whole(checkpoint, plan, corpus, tmp_path / "whole")
    assert not any(differing(ours, whole).values())
    assert ours.read_static() == whole.read_static()


def test_batches_add_up_to_the_whole_text(
    checkpoint: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every linear's second moments, to the last bits, in which sums of sums differ."""
    found: dict[int, dict[str, tuple[Tensor, Tensor, int]]] = {}
    for size in (16, 5):
        seen = found[size] = {}

        def see(latent: Any, moments: Tensor, cross: Tensor, tokens: int, seen: dict[str, Any] = seen) -> None:
            seen[latent.name] = (moments, cross, tokens)

        monkeypatch.setattr("intaglio.train.gptq._move", see)
        plan = plan_of(checkpoint, "q4_0", f"schedule.layer_batch={size}")
        by_layers(checkpoint, plan, corpus, tmp_path / str(size), gptq=True)
    assert found[16].keys() == found[5].keys()
    assert len(found[16]) == sum(t.quantized_linear for t in plan)
    for name, (moments, cross, tokens) in found[16].items():
        torch.testing.assert_close(found[5][name][0], moments, atol=1e-4 * float(moments.max()), rtol=0)
        torch.testing.assert_close(found[5][name][1], cross, atol=1e-4 * float(moments.max()), rtol=0)
        assert found[5][name][2] == tokens == 512


@pytest.mark.parametrize("config", [GEMMA3, GEMMA2], ids=["gemma3", "gemma2"])
def test_earlier_families_go_through(config: dict[str, Any], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", config)
    corpus, plan = small_corpus(16, 32, vocabulary=4096), plan_of(folder)
    ours, _ = by_layers(folder, plan, corpus, tmp_path / "layers", gptq=True)
    assert not any(differing(ours, as_a_whole(folder, plan, corpus, tmp_path / "whole")).values())


def test_experts_learn_with_their_layer(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", GEMMA4_MOE)
    plan, corpus = plan_of(folder, "q4_0", "schedule.layer_epochs=1"), small_corpus(16, 32, vocabulary=4096)
    trained, _ = by_layers(folder, plan, corpus, tmp_path / "trained", layers=True)
    changed = differing(quantize(folder, plan, tmp_path / "fitted"), trained)
    assert changed["model.layers.1.experts.down_proj"] > 0 and changed["model.layers.1.mlp.down_proj.weight"] > 0


def kl(original: nn.Module, packed: PackedModel, tokens: Tensor) -> float:
    with torch.no_grad():
        log_p, log_q = (m(tokens, use_cache=False).logits.log_softmax(-1) for m in (original, load_packed(packed)))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("window", [1, 3])
def test_training_lowers_the_error_of_each_window_and_the_kl(
    checkpoint: Path, corpus: Corpus, tmp_path: Path, window: int
) -> None:
    plan = plan_of(checkpoint, "q4_0", f"schedule.layer_window={window}")
    start = quantize(checkpoint, plan, tmp_path / "start")
    trained, windows = by_layers(checkpoint, plan, corpus, tmp_path / "trained", layers=True)
    assert [(info.first, info.last) for info in windows] == (
        [(i, i) for i in range(4)] if window == 1 else [(0, 2), (3, 3)]
    )
    for info in windows:
        assert info.before is not None and info.after is not None and info.after < 0.9 * info.before, windows
    original, tokens = load_model(checkpoint), torch.from_numpy(corpus.tokens).long()
    assert kl(original, trained, tokens) < 0.8 * kl(original, start, tokens)


@pytest.mark.parametrize("recipe", ["q4_0", "mobile"])
def test_the_stream_is_that_of_the_packed_model(
    checkpoint: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """Through per-layer inputs, and through keys and values that later layers share."""
    walks = []
    window = layerwise.Walk.window
    monkeypatch.setattr(layerwise.Walk, "window", lambda self, *rest: (walks.append(self), window(self, *rest))[1])
    plan = plan_of(checkpoint, recipe, "schedule.layer_epochs=1", "schedule.layer_window=2")
    packed, _ = by_layers(checkpoint, plan, corpus, tmp_path / "packed", gptq=True, layers=True)
    model = build_student(load_model(checkpoint), plan, start=packed).model
    original, seen = load_model(checkpoint), []
    for one in (original, model):
        one.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for batch in walks[-1].batches:
        seen.clear()
        with torch.no_grad():
            for one in (original, model):
                one.model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False)
        for found, expected in zip((batch.original, batch.quantized), seen, strict=True):
            difference = (batch.hidden[found] - expected).square().mean() / expected.square().mean()
            assert float(difference) < (1e-9 if recipe == "q4_0" or found == batch.original else 1e-4)


def test_few_layers_are_in_memory(
    checkpoint: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most those of the window and one original."""
    made: list[weakref.ref[nn.Module]] = []
    most = []
    filled = layerwise.filled

    def counted(template: nn.Module, path: str, *rest: Any) -> nn.Module:
        module = filled(template, path, *rest)
        if ".layers." in path:
            made.append(weakref.ref(module))
            most.append(sum(ref() is not None for ref in made))
        return module

    monkeypatch.setattr(layerwise, "filled", counted)
    for window in (1, 2):
        most.clear()
        plan = plan_of(checkpoint, "q4_0", f"schedule.layer_window={window}", "schedule.layer_epochs=1")
        by_layers(checkpoint, plan, corpus, tmp_path / str(window), layers=True)
        assert max(most) == window + 1


def test_scales_are_trained_alone_on_frozen_codes(checkpoint: Path, corpus: Corpus, tmp_path: Path) -> None:
    steps = ("schedule.tokens=4096", "schedule.batch_size=8")
    plan = plan_of(checkpoint, "q4_0", "schedule.stages=['layers', 'scales']", "schedule.layer_epochs=1", *steps)
    start, _ = by_layers(checkpoint, plan, corpus, tmp_path / "start", layers=True)
    original = load_model(checkpoint)
    latents = train(
        load_model(checkpoint), plan, corpus, tmp_path / "run", teacher=original, start=start, options=OPTIONS
    )
    assert isinstance(latents, Latents)
    assert all(latent.latent.dtype == torch.int8 for latent in latents.blocks.values())
    assert all(name.endswith("scale_latent") for name, _ in latents.named_parameters())
    pack_model(latents, tmp_path / "packed", assets=checkpoint)
    trained, moved = PackedModel.open(tmp_path / "packed"), 0
    for (tensor, one), (_, other) in zip(start, trained, strict=True):
        if isinstance(one, Quantized) and isinstance(other, Quantized):
            assert torch.equal(one.codes, other.codes), tensor.name
            moved += int((one.scale != other.scale).sum())
        else:
            assert torch.equal(one, other), tensor.name  # type: ignore[arg-type]
    assert moved > 0
    tokens = torch.from_numpy(corpus.tokens).long()
    assert kl(original, trained, tokens) < kl(original, start, tokens)


def test_a_run_trains_layers_first_and_goes_on(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    settings = ["schedule.stages=['layers', 'scales']", "schedule.layer_epochs=1", "schedule.tokens=1024"]
    recipe = Recipe.load("q4_0", [*SCHEDULE, *settings, "schedule.batch_size=8"])
    evaluation = replace(EVALUATION, references="all")
    how: dict[str, Any] = {"data": HELDOUT_TEXT, "options": OPTIONS, "evaluation": evaluation}
    report = run(folder, recipe, tmp_path / "run", **how)
    start, layers, packed = (PackedModel.open(tmp_path / "run" / name) for name in ("start", "layers", "packed"))
    assert "layers trained on" in layers.provenance["method"]
    assert "GPTQ on" in start.provenance["method"] and "layers" not in start.provenance["method"]
    assert report is not None and "its GPTQ start alone" in report.headline()
    assert all(
        torch.equal(one.codes, other.codes)
        for (_, one), (_, other) in zip(layers, packed, strict=True)
        if isinstance(one, Quantized) and isinstance(other, Quantized)
    )
    losses = (tmp_path / "run" / "losses.jsonl").read_bytes()
    run(folder, recipe, tmp_path / "run", resume=True, **how)
    assert (tmp_path / "run" / "losses.jsonl").read_bytes() == losses
    for path in (tmp_path / "run").iterdir():  # as if another recipe's run was cut before its first step
        if path.name != "layers":
            remove(path)
    with pytest.raises(OutputError, match="layers: was made by another recipe or from other text: remove it"):
        run(folder, recipe.with_schedule(layer_epochs=2), tmp_path / "run", **how)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["stages=['scales', 'model']"], r"expected one of \['model'\], \['layers'\]"),
        (["stages=[]"], r"stages = \[\]: expected one of"),
        (["stages='layers'"], r"stages = 'layers': expected one of"),
        (["stages=['layers', 'layers']"], "expected one of"),
        (["stages=['scales']", "learn_scales=false"], "trains scales alone, and learn_scales = false"),
        (["stages=['layers', 'model']", "lora_rank=8"], "lora_rank trains adapters in the stage 'model' alone"),
        (["layer_window=0"], "layer_window = 0: expected 1 or more"),
        (["layer_lr=-1"], "layer_lr = -1.0: expected 0 or more"),
    ],
)
def test_stages_that_contradict_each_other_are_refused(settings: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe.load("q4_0", [f"schedule.{setting}" for setting in settings])


def test_stages_survive_the_recipes_text() -> None:
    recipe = Recipe.load("q4_0", ["schedule.stages=['layers', 'scales']", "schedule.layer_window=2"])
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_a_stage_without_what_it_needs_is_refused(checkpoint: Path, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trains nothing over the whole model: use `intaglio quantize --data`"):
        train(load_model(checkpoint), plan_of(checkpoint, "q4_0", "schedule.stages=['layers']"), corpus, tmp_path / "a")
    with pytest.raises(InputError, match="the stage 'layers' comes first"):
        plan = plan_of(checkpoint, "q4_0", "schedule.stages=['layers', 'model']")
        train(load_model(checkpoint), plan, corpus, tmp_path / "b")
    with pytest.raises(InputError, match="the stage 'layers' learns from text, and there is none: give --data"):
        quantize_model(
            checkpoint,
            Recipe.load("q4_0", ["schedule.gptq_tokens=0", "schedule.stages=['layers']"]),
            tmp_path / "c",
        )
    with pytest.raises(InputError, match="GPTQ chooses codes under learned scales, and this recipe has none"):
        by_layers(
            checkpoint, plan_of(checkpoint, "q4_0", "schedule.learn_scales=false"), corpus, tmp_path / "d", gptq=True
        )
    assert not [path for path in tmp_path.iterdir() if any(path.iterdir())]


def test_a_packed_model_goes_on_behind_its_layers(checkpoint: Path, corpus: Corpus, tmp_path: Path) -> None:
    plan = plan_of(checkpoint, "q4_0", "schedule.stages=['layers', 'scales']", "schedule.layer_epochs=1")
    packed = quantize(checkpoint, plan, tmp_path / "packed")
    assert plan_to_go_on(packed).recipe.schedule.stages == ("scales",)
    with pytest.raises(RecipeError, match="begins with a checkpoint of floats, not a packed model"):
        plan_to_go_on(packed, ["schedule.stages=['layers', 'model']"])


def test_the_plan_knows_which_stages_fit() -> None:
    plan = make_plan(GEMMA4, Recipe.load("q4_0", SCHEDULE))
    peaks = stage_peaks(plan)
    assert peaks["layers"] < peaks["scales"] < peaks["model"]
    narrow, wide = (
        layers_memory(
            make_plan(
                GEMMA4, Recipe.load("q4_0", [*SCHEDULE, "schedule.stages=['layers']", f"schedule.layer_window={w}"])
            )
        )
        for w in (1, 4)
    )
    layer = sum(t.spec.numel for t in plan if t.name.startswith("model.layers.0."))
    assert wide.masters > 3 * narrow.masters > 3 * 4 * layer
    assert wide.gptq == narrow.gptq
