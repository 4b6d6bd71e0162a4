"""Drafters: what they read, how they are trained, and how their acceptance is worked out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.speculate import judge, speculate
from intaglio.drafter.accept import chances, draft_logits, rounds, softcap_of
from intaglio.drafter.clusters import assign_clusters, cluster_loss
from intaglio.drafter.decode import Costs
from intaglio.drafter.model import Shape, check_fits, load_drafter, new_drafter
from intaglio.drafter.text import end_tokens, written
from intaglio.drafter.train import train_drafter
from intaglio.drafter.unroll import inside, steps, target_states
from intaglio.errors import ConfigError, CorpusError, InputError, RecipeError
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import load_model
from intaglio.packed.decoded import load_packed
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from intaglio.runs.drafter import open_target
from intaglio.tiny import DRAFTER_DIR, HELDOUT_TEXT, MODEL_DIR
from intaglio.tiny.clustered import write_clustered_drafter
from intaglio.train.corpus import held_out_windows
from intaglio.train.options import Options
from intaglio.train.pack import pack_model
from intaglio.train.run_folder import read_losses
from tests.support.tiny import GEMMA3, GEMMA4, make_checkpoint
from tests.support.training import SMALL, small_corpus, small_model

SHAPE = Shape(width=64, mlp=64, heads=4)
CLUSTERED = Shape(width=64, mlp=64, heads=4, clusters=16, top_clusters=4)


@pytest.fixture(scope="module")
def target() -> Any:
    return small_model().requires_grad_(False)


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    """The bundled model and its drafter."""
    return load_model(MODEL_DIR), load_drafter(DRAFTER_DIR)


def tokens(count: int, length: int, vocabulary: int = 256) -> Tensor:
    return torch.from_numpy(small_corpus(count, length, vocabulary=vocabulary).tokens).long()


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 3, 40])
def test_a_draft_is_what_transformers_drafter_says(place: int, bundled: tuple[Any, Any]) -> None:
    target, drafter = bundled
    ids, positions = tokens(2, 48, 4096), torch.arange(48).expand(2, -1)
    ours = list(steps(drafter, target_states(target, ids, positions), positions, 3))
    out = target(input_ids=ids, output_hidden_states=True, return_shared_kv_states=True)
    kv = {kind: tuple(x[:, :, : place + 1] for x in pair) for kind, pair in out.shared_kv_states.items()}
    state = out.hidden_states[-1][:, place].unsqueeze(1)
    for number, hidden in enumerate(ours, 1):
        embeds = target.get_input_embeddings()(ids[:, place + number].unsqueeze(1))
        theirs = drafter(
            inputs_embeds=torch.cat((embeds, state), -1),
            position_ids=torch.full((2, 1), place + 1),
            shared_kv_states=kv,
            attention_mask=torch.ones(2, 48),
        )
        torch.testing.assert_close(drafter.lm_head(hidden[:, place]), theirs.logits[:, 0], atol=1e-4, rtol=1e-4)
        state = theirs.last_hidden_state


@torch.no_grad()
def test_documents_of_a_sequence_are_kept_apart(target: Any) -> None:
    drafter = new_drafter(target, SHAPE)
    ids, split = tokens(1, 40), 17
    positions = torch.cat((torch.arange(split), torch.arange(40 - split))).unsqueeze(0)
    packed = list(steps(drafter, target_states(target, ids, positions), positions, 2))
    second, at = ids[:, split:], positions[:, split:]
    alone = list(steps(drafter, target_states(target, second, at), at, 2))
    for both, one in zip(packed, alone, strict=True):
        torch.testing.assert_close(both[:, split:], one, atol=1e-5, rtol=1e-5)
    assert inside(positions, 2)[0, :, 1].tolist() == [place not in (split - 2, split - 1) for place in range(38)]


@torch.no_grad()
def test_a_window_ends_where_the_newest_token_no_longer_sees(bundled: tuple[Any, Any]) -> None:
    target, drafter = bundled
    ids, positions = tokens(1, 200, 4096), torch.arange(200).unsqueeze(0)
    states = target_states(target, ids, positions)
    whole = next(steps(drafter, states, positions, 1))
    window, place = drafter.config.get_text_config().sliding_window, 180
    changed = {kind: tuple(x.clone() for x in pair) for kind, pair in states.kv.items()}
    for part in changed["sliding_attention"]:
        part[:, :, : place + 2 - window] = 9.0  # what the token at place + 1 does not see any more
    unseen = next(steps(drafter, type(states)(states.embeds, states.hidden, changed), positions, 1))
    assert torch.equal(unseen[:, place], whole[:, place])
    for part in changed["sliding_attention"]:
        part[:, :, place + 2 - window] = 9.0  # and the oldest that it does
    seen = next(steps(drafter, type(states)(states.embeds, states.hidden, changed), positions, 1))
    assert not torch.equal(seen[:, place], whole[:, place])


@torch.no_grad()
@pytest.mark.parametrize("draft_length", [1, 4])
def test_greedy_output_is_the_same_with_a_drafter_and_rounds_are_as_worked_out(
    draft_length: int, bundled: tuple[Any, Any]
) -> None:
    """Beyond the window, where a cache that keeps rejected drafts would show."""
    target, drafter = bundled
    prompt = torch.tensor([[2, 614, 300, 281, 1045, 299, 330]])
    text = written(target, prompt, 160)
    ends = end_tokens(target)
    assert ends, "without them a text would end"
    plain = speculate(target, None, prompt[0].tolist(), 160, 0, without=ends)
    fast = speculate(target, drafter, prompt[0].tolist(), 160, draft_length, without=ends)
    assert fast.tokens == plain.tokens == text[0, 7:].tolist()
    assert sum(fast.accepted) > 10
    chance = chances(target, drafter, text, 7)
    place, worked_out = 0, []
    while place < chance.shape[1] - draft_length:
        worked_out.append(int(np.cumprod(chance[0, place, :draft_length]).sum()))
        place += worked_out[-1] + 1
    assert fast.accepted[: len(worked_out)] == worked_out
    found = rounds(chance, draft_length)
    assert found.rounds == len(worked_out)
    assert found.length == pytest.approx(1 + np.mean(worked_out))
    assert found.by_position[-1] == pytest.approx(np.mean([n == draft_length for n in worked_out]))


def test_sampled_output_is_distributed_as_the_target_whatever_the_drafter() -> None:
    torch.manual_seed(0)
    p, q = torch.tensor([0.5, 0.2, 0.2, 0.1]), torch.tensor([0.1, 0.6, 0.1, 0.2])
    counts, accepted, draws = torch.zeros(4), 0, 20_000
    for _ in range(draws):
        draft = int(torch.multinomial(q, 1))
        kept = judge([(draft, q.log())], torch.stack((p.log(), p.log())), True)
        counts[kept[0]] += 1
        accepted += len(kept) - 1
    assert torch.allclose(counts / draws, p, atol=4 * 0.5 / math.sqrt(draws))
    assert accepted / draws == pytest.approx(float(torch.minimum(p, q).sum()), abs=4 * 0.5 / math.sqrt(draws))


@torch.no_grad()
def test_chances_of_sampled_text_are_those_of_its_tokens(target: Any) -> None:
    drafter = new_drafter(target, SHAPE)
    text = tokens(2, 14)
    found = chances(target, drafter, text, 5, sampled=True, without=[1])
    assert found.shape == (2, 9, 8)
    logits = target(input_ids=text).logits
    logits[..., 1] = -torch.inf
    p = logits.softmax(-1)
    q = drafter.lm_head(next(steps(drafter, target_states(target, text), torch.arange(14).expand(2, -1), 1))).softmax(
        -1
    )
    for place in range(4, 12):
        token = text[0, place + 2]
        expected = min(1.0, float(q[0, place, token] / p[0, place + 1, token]))
        assert found[0, place - 4, 0] == pytest.approx(expected, rel=1e-3)
    assert not found[0, -1].any(), "nothing is known of what would follow the text"


def test_rounds_of_sampled_text_accept_as_often_as_chances_say() -> None:
    chance = np.full((400, 60, 8), 0.7, dtype=np.float32)
    found = rounds(chance, 3)
    assert found.by_position == pytest.approx((0.7, 0.49, 0.343), abs=0.01)
    assert found.length == pytest.approx(1 + 0.7 + 0.49 + 0.343, abs=0.02)
    assert found.accepted == pytest.approx((found.length - 1) / 3)


def test_a_speed_up_is_tokens_over_time() -> None:
    assert Costs((1.0, 1.1, 1.2, 1.3), 0.1).speed_up(2.5, 3) == pytest.approx(2.5 / (1.3 + 0.3))


def test_clusters_share_the_vocabulary_and_their_head_gives_the_heads_own_logits(target: Any) -> None:
    drafter = new_drafter(target, CLUSTERED)
    order = drafter.masked_embedding.token_ordering
    assert sorted(order.tolist()) == list(range(256))
    head = drafter.lm_head.weight
    spread = torch.stack([head[group].var(0).sum() for group in order.view(16, 16)]).mean()
    assert spread < 0.95 * head.var(0).sum(), "tokens of a cluster are alike"
    hidden = torch.randn(1, 5, 64)
    logits = drafter.masked_embedding(hidden, head)
    listed = logits > logits.amin()
    assert listed.sum(-1).unique().item() in (4 * 16, 4 * 16 - 1)
    torch.testing.assert_close(logits[listed], (hidden @ head.T)[listed], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_clustered_logits_are_transformers_for_each_place(target: Any) -> None:
    drafter, hidden = new_drafter(target, CLUSTERED), torch.randn(2, 5, 64)
    alone = [
        [drafter.masked_embedding(place.view(1, 1, 64), drafter.lm_head.weight) for place in row] for row in hidden
    ]
    expected = torch.stack([torch.cat(row, 1).squeeze(0) for row in alone])
    torch.testing.assert_close(draft_logits(drafter, hidden), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_bundled_drafter_has_a_clustered_head_too(bundled: tuple[Any, Any], tmp_path: Path) -> None:
    """Trained: its centroids rate the tokens' clusters better than the means of their rows do."""
    target, tied = bundled
    drafter = load_drafter(write_clustered_drafter(tmp_path / "drafter"))
    text = written(target, torch.tensor([[2, 614, 300, 281, 1045, 299, 330]]), 160)
    accepted = [rounds(chances(target, tied, text, 7), 1).accepted]
    accepted.append(rounds(chances(target, drafter, text, 7), 1).accepted)
    assert accepted[1] > 0.85 * accepted[0] > 0.3
    same = set(tied.state_dict()) - {"lm_head.weight"}
    assert all(torch.equal(tied.state_dict()[name], drafter.state_dict()[name]) for name in same)
    windows = held_out_windows(HELDOUT_TEXT, load_tokenizer(MODEL_DIR), length=256, vocab_size=4096, max_tokens=1024)
    ids = torch.from_numpy(windows).long()
    states, embedder = target_states(target, ids), drafter.masked_embedding
    hidden = next(steps(drafter, states, torch.arange(256).expand(4, -1), 1)).flatten(0, 1)
    wanted, head = states.hidden[:, 1:].flatten(0, 1), target.get_output_embeddings().weight
    trained = cluster_loss(hidden, embedder, wanted, head, softcap_of(target))
    embedder.centroids.weight.copy_(tied.lm_head.weight[embedder.token_ordering.view(64, 64)].mean(1))
    assert trained < cluster_loss(hidden, embedder, wanted, head, softcap_of(target)) - 0.05


def test_the_loss_of_clusters_is_cross_entropy_with_their_probability(target: Any) -> None:
    drafter = new_drafter(target, CLUSTERED)
    embedder, head = drafter.masked_embedding, target.get_output_embeddings().weight
    hidden, wanted = torch.randn(7, 64), torch.randn(7, head.shape[1])
    p = (30 * torch.tanh(wanted @ head.T / 30)).softmax(-1)
    mass = torch.zeros(7, 16)
    for cluster, group in enumerate(embedder.token_ordering.view(16, 16)):
        mass[:, cluster] = p[:, group].sum(-1)
    plain = -(mass * embedder.centroids(hidden).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(cluster_loss(hidden, embedder, wanted, head, 30.0), plain)


def test_clusters_need_not_be_a_power_of_two(target: Any) -> None:
    small = small_model(SMALL | {"vocab_size": 240, "vocab_size_per_layer_input": 240})
    drafter = new_drafter(small, Shape(width=64, mlp=64, heads=4, clusters=12, top_clusters=2))
    assign_clusters(drafter)
    assert sorted(drafter.masked_embedding.token_ordering.tolist()) == list(range(240))


def trained(target: Any, tmp_path: Path, recipe: str, *overrides: str, shape: Shape = SHAPE) -> tuple[Any, Any, Any]:
    """Drafter before, drafter after 12 steps, and the plan."""
    before = new_drafter(target, shape)
    changes = ["schedule.tokens=1536", "schedule.batch_size=8", "schedule.sequence_length=16", *overrides]
    plan = make_plan(before.config.to_dict(), Recipe.load(recipe, changes))
    options = Options(precision="no", compiled=False)
    return before, train_drafter(target, before, plan, small_corpus(), tmp_path / "run", options=options), plan


@pytest.mark.parametrize("recipe", ["drafter", "drafter-q4_0", "drafter-mobile"])
def test_training_lowers_the_loss_and_what_was_trained_is_packed(recipe: str, target: Any, tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in target.state_dict().items()}
    _, student, _ = trained(target, tmp_path, recipe, "schedule.lr=3e-3")
    rows = read_losses(tmp_path / "run")
    losses = [row["loss"] for row in rows]
    assert all(("codes_changed" in row) == (recipe != "drafter") for row in rows)
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert all(torch.equal(value, weights[name]) for name, value in target.state_dict().items())
    pack_model(student, tmp_path / "packed", assets=MODEL_DIR)
    shipped, ids, positions = (
        load_packed(PackedModel.open(tmp_path / "packed")),
        tokens(2, 12),
        torch.arange(12).expand(2, -1),
    )
    with torch.no_grad():
        states = target_states(target, ids, positions)
        ours, theirs = (next(steps(model.eval(), states, positions, 1)) for model in (student.model, shipped))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("clusters", "moved"), [("train", True), ("keep", False)])
def test_centroids_are_trained_or_kept(clusters: str, moved: bool, target: Any, tmp_path: Path) -> None:
    before, student, _ = trained(target, tmp_path, "drafter", f"drafter.clusters={clusters}", shape=CLUSTERED)
    same = torch.equal(
        before.masked_embedding.centroids.weight.bfloat16().float(), student.model.masked_embedding.centroids.weight
    )
    assert same != moved
    assert torch.equal(before.masked_embedding.token_ordering, student.model.masked_embedding.token_ordering)


def test_a_quantized_targets_cache_is_what_a_drafter_reads(mobile_packed: PackedModel) -> None:
    target, _ = open_target(mobile_packed.path)
    for module in target.modules():
        if hasattr(module, "static") and "k_cache" not in module.static.fixed and hasattr(module, "k_proj"):
            module.static.fixed |= {"k_cache": torch.tensor(0.5), "v_cache": torch.tensor(0.25)}
    states = target_states(target, tokens(1, 9, target.config.vocab_size))
    for key, value in states.kv.values():
        assert torch.equal(key, (key / 0.5).round() * 0.5)
        assert torch.equal(value, (value / 0.25).round() * 0.25)


# Bad input


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 128}, "backbone_hidden_size is 256 in the drafter and 128 in the target"),
        ({"head_dim": 32}, "head_dim of sliding_attention layers is 64 in the drafter and 32"),
        ({"vocab_size": 512, "vocab_size_per_layer_input": 512}, "vocab_size is 256 in the drafter and 512"),
    ],
)
def test_a_drafter_of_another_model(changes: dict[str, Any], says: str, target: Any) -> None:
    with pytest.raises(ConfigError, match=says):
        check_fits(new_drafter(target, SHAPE), small_model(SMALL | changes))


def test_a_target_that_stores_nothing_for_a_layer(target: Any) -> None:
    config = SMALL | {"layer_types": ["full_attention"] * len(SMALL["layer_types"])}
    with pytest.raises(ConfigError, match="reads the keys and values of sliding_attention layers, of which the target"):
        check_fits(new_drafter(target, SHAPE), small_model(config))


def test_a_target_of_another_family(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gemma3_text: only gemma4_text, gemma4_unified_text hand out"):
        new_drafter(load_model(make_checkpoint(tmp_path / "gemma3", GEMMA3)), SHAPE)


def test_a_model_that_is_no_drafter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model_type 'gemma4_text' is no drafter"):
        load_drafter(make_checkpoint(tmp_path / "model", GEMMA4))


@pytest.mark.parametrize("length", [0, 9])
def test_a_draft_length_that_no_round_has(length: int, bundled: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match=f"draft length {length}: expected 1 to 8"):
        speculate(*bundled, [2, 5], 4, length)


def test_text_too_short_for_the_steps(target: Any, tmp_path: Path) -> None:
    drafter = new_drafter(target, SHAPE)
    plan = make_plan(drafter.config.to_dict(), "drafter")
    with pytest.raises(CorpusError, match="sequences of 4 tokens: expected 5 or more for 3 draft steps"):
        train_drafter(target, drafter, plan, small_corpus(length=4), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("drafter.step_weights=[]", "expected one to eight numbers"),
        ("drafter.step_weights=[0, 0]", "not all zero"),
        ("drafter.clusters=move", "expected one of train, keep"),
        ("drafter.more=1", "more"),
    ],
)
def test_what_a_recipe_may_not_say_of_a_drafter(override: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe.load("drafter", [override])
