"""Fine-tuning a packed model: it begins with the packed bits, never leaves the grid, and ships what it became."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.errors import InputError, RecipeError
from intaglio.formats.verify import verify
from intaglio.numerics.grid import Quantized
from intaglio.packed.checkpoint import checkpoint_spec
from intaglio.packed.decoded import load_packed
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train.latents import prepare
from intaglio.train.loop import train
from intaglio.train.pack import pack_model
from intaglio.train.quantize import quantize
from intaglio.train.start import plan_to_go_on
from intaglio.train.static import put_scales
from tests.support.cli import intaglio
from tests.support.tiny import GEMMA4, MULTIMODAL, make_checkpoint, pack
from tests.support.training import SMALL, small_corpus, small_model, small_plan

RECIPES = ("q4_0", "q4_0-free", "mobile")
SHORT = (
    "schedule.batch_size=4", "schedule.sequence_length=16", "schedule.frozen_tail=0.4", "schedule.tokens=640",
    "schedule.loss=cross_entropy", "schedule.lr=1e-3",
)  # fmt: skip


def trained(folder: Path, recipe: str, config: dict[str, Any] = SMALL) -> PackedModel:
    """A packed model whose scales were learned, to numbers that no fit would choose."""
    model, plan = small_model(config), small_plan(recipe=recipe, config=config)
    latents = prepare(model, plan)
    put_scales(model, plan, {s.name: 0.05 + 0.001 * i for i, s in enumerate(plan.static_scales) if s.owned})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in latents.named_parameters():
            if name.endswith("scale_latent"):
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3
            elif parameter.ndim == 2:
                parameter[0, :64] = 0.0  # blocks that decode to nothing
    latents.decode()
    (folder / "assets").mkdir()
    pack_model(latents, folder / "packed", assets=folder / "assets")
    return PackedModel.open(folder / "packed")


def assert_same(a: PackedModel, b: PackedModel) -> None:
    """Codes and the bits of scales and floats, tensor by tensor."""
    for tensor in a.plan:
        x, y = a.read(tensor.name), b.read(tensor.name)
        for one, other in zip(parts(x), parts(y), strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), tensor.name
    assert a.read_static() == b.read_static()


def parts(value: Quantized | Tensor) -> list[Tensor]:
    if isinstance(value, Quantized):
        return [p.contiguous() for p in (value.codes, value.scale, value.super_scale) if p is not None]
    return [value.reshape(-1).contiguous()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_begins_with_the_packed_bits(recipe: str, tmp_path: Path) -> None:
    """Even if nothing is learned at all, no code and no scale bit may differ."""
    start = trained(tmp_path, recipe)
    plan = plan_to_go_on(start)
    latents = prepare(load_packed(start), plan, start=start)
    pack_model(latents, tmp_path / "again", assets=start.path)
    assert_same(start, PackedModel.open(tmp_path / "again"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_codes_alone_move_where_scales_are_kept(recipe: str, tmp_path: Path) -> None:
    start = trained(tmp_path, recipe)
    plan = plan_to_go_on(start, (*SHORT, "schedule.learn_scales=false", "schedule.lr=0.02", "schedule.frozen_tail=0"))
    student = train(load_packed(start), plan, small_corpus(), tmp_path / "run", start=start)
    pack_model(student, tmp_path / "after", assets=start.path)
    after, moved = PackedModel.open(tmp_path / "after"), 0
    for tensor in start.plan:
        before, now = start.read(tensor.name), after.read(tensor.name)
        if isinstance(before, Quantized) and isinstance(now, Quantized):
            assert torch.equal(before.step, now.step), tensor.name
            moved += int((before.codes != now.codes).sum())
    assert moved > 100


def heldout_loss(packed: PackedModel) -> float:
    """Cross-entropy of the decoded weights on the training text: what fine-tuning is to lower."""
    corpus, model = small_corpus(), load_packed(packed)
    ids, positions = (torch.from_numpy(x).long() for x in (corpus.tokens, corpus.positions))
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    counted = positions[:, 1:] > 0
    return float(F.cross_entropy(logits[:, :-1][counted], ids[:, 1:][counted]))


@pytest.mark.parametrize("lora", [0, 4], ids=["full", "LoRA"])
def test_cross_entropy_is_learned_without_a_teacher(lora: int, tmp_path: Path) -> None:
    start = trained(tmp_path, "q4_0")
    plan = plan_to_go_on(start, (*SHORT, f"schedule.lora_rank={lora}", "schedule.tokens=1920", "schedule.lr=5e-3"))
    losses: list[float] = []
    student = train(
        load_packed(start), plan, small_corpus(), tmp_path / "run", start=start, on_step=lambda i: losses.append(i.loss)
    )
    pack_model(student, tmp_path / "after", assets=start.path)
    after = PackedModel.open(tmp_path / "after")
    assert heldout_loss(after) < heldout_loss(start) - 0.1
    ids = torch.from_numpy(small_corpus().tokens[:2]).long()
    with torch.no_grad():
        shipped = load_packed(after)(input_ids=ids, use_cache=False).logits
        assert torch.equal(student.model.eval()(input_ids=ids, use_cache=False).logits, shipped)
    if lora:  # nothing but what adapters and scales can move
        for name in ("model.norm.weight", "model.embed_tokens.weight"):
            assert torch.equal(after.decode(name), start.decode(name))


def test_the_first_loss_is_the_mean_cross_entropy_of_the_packed_model(tmp_path: Path) -> None:
    start = trained(tmp_path, "q4_0")
    plan = plan_to_go_on(start, (*SHORT, "schedule.batch_size=16", "schedule.tokens=256"))
    losses: list[float] = []
    train(
        load_packed(start), plan, small_corpus(), tmp_path / "run", start=start, on_step=lambda i: losses.append(i.loss)
    )
    assert losses[0] == pytest.approx(heldout_loss(start), rel=1e-5)


def test_grids_must_stay_and_losses_need_what_they_learn_from(tmp_path: Path) -> None:
    start = trained(tmp_path, "q4_0")
    with pytest.raises(RecipeError, match=r"is on grid q4_0 in .*, and cannot go on on q8_0"):
        plan_to_go_on(start, ["weights.linear.grid=q8_0"])
    free = plan_to_go_on(start, ["weights.linear.grid=q4_0-free"])
    prepare(load_packed(start), free, start=start)
    with pytest.raises(InputError, match="needs a teacher"):
        train(load_packed(start), plan_to_go_on(start), small_corpus(), tmp_path / "run", start=start)
    with pytest.raises(RecipeError, match="loss = 'mse': expected one of kl, cross_entropy"):
        plan_to_go_on(start, ["schedule.loss=mse"])
    with pytest.raises(InputError, match="lora_rank is for training that goes on"):
        train(small_model(), small_plan("schedule.lora_rank=4"), small_corpus(), tmp_path / "run")


def test_a_canonical_grid_refuses_blocks_that_it_would_change(tmp_path: Path) -> None:
    """A stranger's codes without any -8: the first forward would have other scales."""
    model, plan = small_model(), small_plan("schedule.learn_scales=false")
    latents = prepare(model, plan)
    with torch.no_grad():
        master = latents.blocks["model.layers.0.self_attn.q_proj.weight"].latent
        master.copy_(master.sign() * 0.01)
    latents.decode()
    (tmp_path / "assets").mkdir()
    pack_model(latents, tmp_path / "packed", assets=tmp_path / "assets")
    start = PackedModel.open(tmp_path / "packed")
    with pytest.raises(InputError, match=r"q_proj.weight: .* of .* blocks are not what training .*grid=q4_0-free"):
        prepare(load_packed(start), plan_to_go_on(start, ["schedule.learn_scales=true"]), start=start)


# The command


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    turns = [
        {"role": "user", "content": "Where is the whale?"},
        {"role": "assistant", "content": "It swam past the ship."},
    ]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 60, "utf-8")
    return path


OPTIONS = ("--set=schedule.tokens=512", "--set=schedule.batch_size=4", "--set=schedule.sequence_length=32",
           "--set=schedule.frozen_tail=0.25")  # fmt: skip


def test_train_goes_on_from_a_packed_folder(chats: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", GEMMA4)
    pack(checkpoint, tmp_path / "packed")
    made = intaglio("train", tmp_path / "packed", f"--data={chats}", f"--out={tmp_path / 'run'}", *OPTIONS,
                    "--set=schedule.loss=cross_entropy", "--set=schedule.lr=3e-3")  # fmt: skip
    assert made.code == 0, made.err
    after = PackedModel.open(tmp_path / "run/packed")
    assert verify(after, tmp_path / "run/model.gguf").exact and verify(after, tmp_path / "run/hf").exact
    measured = json.loads((tmp_path / "run/finetune.json").read_text())
    assert measured["after"]["perplexity_candidate"] < measured["before"]["perplexity_candidate"]
    assert measured["before"]["kl_mean_nats"] == 0  # the model itself is the reference
    taught = intaglio("train", tmp_path / "run/packed", f"--data={chats}", f"--out={tmp_path / 'second'}", *OPTIONS,
                      f"--teacher={checkpoint}", "--set=schedule.loss=kl")  # fmt: skip
    assert taught.code == 0, taught.err
    measured = json.loads((tmp_path / "second/finetune.json").read_text())
    assert measured["after"]["kl_mean_nats"] < measured["before"]["kl_mean_nats"]


def test_wrong_use_is_told(chats: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", GEMMA4)
    packed = pack(checkpoint, tmp_path / "packed").path

    def refusal(model: Path, *options: str) -> str:
        made = intaglio("train", model, f"--out={tmp_path / 'run'}", *OPTIONS, *options)
        assert made.code == 2 and not (tmp_path / "run").exists()
        return " ".join(made.err.split())

    assert "needs a teacher" in refusal(packed, f"--data={chats}")
    assert "leave out --recipe" in refusal(packed, "--recipe=mobile").replace("│ ", "")
    assert "has no use for a teacher" in refusal(packed, f"--teacher={checkpoint}", "--set=schedule.loss=cross_entropy")
    assert "learns a text" in refusal(packed, "--set=schedule.loss=cross_entropy")
    assert "leave it out" in refusal(checkpoint, f"--teacher={checkpoint}").replace("│ ", "")


def test_towers_go_along_untouched(chats: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", MULTIMODAL)
    recipe = Recipe.load("mobile-e2b", ["weights.mlp_early.layers=0-1"])
    start = quantize(checkpoint, make_plan(checkpoint_spec(checkpoint), recipe), tmp_path / "packed")
    made = intaglio("train", start.path, f"--data={chats}", f"--out={tmp_path / 'run'}", *OPTIONS,
                    "--set=schedule.loss=cross_entropy", "--set=schedule.lr=3e-3")  # fmt: skip
    assert made.code == 0, made.err
    after = PackedModel.open(tmp_path / "run/packed")
    assert after.plan.carried == start.plan.carried and after.plan.carried
    for tensor in start.plan.carried:
        assert torch.equal(after.decode(tensor.name), start.decode(tensor.name))
    changed = [t.name for t in start.plan if not torch.equal(after.decode(t.name), start.decode(t.name))]
    assert changed and verify(after, tmp_path / "run/mobile").exact
