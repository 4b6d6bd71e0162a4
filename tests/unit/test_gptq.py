"""GPTQ's start: the textbook's codes, latents that decode to them, and a student closer to its teacher."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from intaglio.errors import InputError
from intaglio.numerics.gptq import DAMPING, corrected_weight, gptq_codes, gptq_latents, ridge_of
from intaglio.numerics.grid import F16, Q4_0, Q4_0_FREE, BlockGrid
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import load_model
from intaglio.plan.plan import make_plan
from intaglio.progress import StepInfo
from intaglio.tiny import HELDOUT_TEXT, MODEL_DIR
from intaglio.train.corpus import held_out_windows
from intaglio.train.gptq import start_from_gptq
from intaglio.train.latents import Latents, prepare
from intaglio.train.loop import train
from intaglio.train.options import Options
from tests.support.training import small_corpus, small_model, small_plan
from tests.unit.test_latent import latent_of

each_grid = pytest.mark.parametrize("grid", [Q4_0, Q4_0_FREE], ids=lambda grid: grid.name)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(rows: int = 8, columns: int = 256) -> Tensor:
    return torch.randn(rows, columns, generator=generator(0)) * 0.05


def correlated_inputs(columns: int, tokens: int = 2048) -> Tensor:
    """Inputs [T, C] in which a few directions carry most, as in a language model."""
    directions = torch.randn(columns // 8, columns, generator=generator(1))
    strengths = torch.randn(tokens, columns // 8, generator=generator(2))
    return strengths @ directions + 0.3 * torch.randn(tokens, columns, generator=generator(3))


def steps_of(weight: Tensor, grid: BlockGrid) -> Tensor:
    return latent_of(weight, grid, moved=False).compute()[1]


def textbook(weight: Tensor, step: Tensor, moments: Tensor, grid: BlockGrid, keep: Tensor) -> Tensor:
    """One column after the other, each taken out of the inverse by elimination, in float64."""
    moments = moments.double().clone()
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    inverse = moments.inverse()
    left, codes = weight.double().clone(), torch.zeros_like(weight)
    for j in moments.diagonal().argsort(descending=True).tolist():
        source = torch.where(keep[:, j], weight[:, j].double(), left[:, j])
        codes[:, j] = (source / step[:, j]).round().clamp(grid.code_min, grid.code_max)
        error = (left[:, j] - codes[:, j] * step[:, j]) / inverse[j, j]
        left = left - error.unsqueeze(1) * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@each_grid
def test_codes_are_the_textbooks(grid: BlockGrid) -> None:
    weight = weights()
    x = correlated_inputs(256)
    step = steps_of(weight, grid).repeat_interleave(32, -1)
    keep = torch.rand(weight.shape, generator=generator(4)) < 0.1
    found = gptq_codes(weight, step, x.T @ x, grid, keep)
    expected = textbook(weight, step, x.T @ x, grid, keep)
    assert (found != expected).float().mean() < 2e-3  # a tie may fall either way in float32
    assert (found != (weight / step).round().clamp(-8, 7)).float().mean() > 0.1


@each_grid
def test_products_come_closer_than_by_rounding_to_nearest(grid: BlockGrid) -> None:
    weight, x = weights(), correlated_inputs(256)
    step = steps_of(weight, grid).repeat_interleave(32, -1)
    nearest = (weight / step).round().clamp(grid.code_min, grid.code_max)
    codes = gptq_codes(weight, step, x.T @ x, grid, torch.zeros_like(weight, dtype=torch.bool))
    errors = [float((x @ (c * step - weight).T).square().mean()) for c in (codes, nearest)]
    assert errors[0] < 0.5 * errors[1]


def test_without_correlation_it_is_rounding_to_nearest() -> None:
    weight = weights()
    step = steps_of(weight, Q4_0).repeat_interleave(32, -1)
    keep = torch.zeros_like(weight, dtype=torch.bool)
    codes = gptq_codes(weight, step, torch.eye(256) * 7, Q4_0, keep)
    assert torch.equal(codes, (weight / step).round().clamp(-8, 7))


def test_an_input_that_is_always_zero_is_no_obstacle() -> None:
    weight, x = weights(), correlated_inputs(256)
    x[:, 5] = 0
    step = steps_of(weight, Q4_0).repeat_interleave(32, -1)
    codes = gptq_codes(weight, step, x.T @ x, Q4_0, torch.zeros_like(weight, dtype=torch.bool))
    assert torch.isfinite(codes).all()


@each_grid
def test_latents_decode_to_the_codes_under_unchanged_steps(grid: BlockGrid) -> None:
    weight, x = weights(), correlated_inputs(256)
    weight[0, :32] = 0  # an empty block
    latent = latent_of(weight, grid, moved=False)
    _, step = latent.compute()
    wanted = weight + 0.2 * step.repeat_interleave(32, -1)
    latents = gptq_latents(weight, wanted, step, x.T @ x, grid)
    latent.latent.data.copy_(latents)
    values, after = latent.compute()
    assert torch.equal(after, step)
    blocks = weight.view(8, -1, 32)
    keep = ((blocks.abs() == blocks.abs().amax(-1, keepdim=True)) & grid.canonical).view(8, -1)
    spread = step.repeat_interleave(32, -1)
    aim = torch.where(keep, weight, wanted)
    assert torch.equal(values, gptq_codes(aim, spread, x.T @ x, grid, keep) * spread)
    assert ((latents - values).abs() <= 0.41 * spread.abs())[~keep].all()


def test_the_corrected_weight_is_the_ridge_regressions() -> None:
    weight, y = weights(), correlated_inputs(256)
    x = y + 0.3 * torch.randn(y.shape, generator=generator(5))
    moments, cross = x.T @ x, x.T @ y
    found = corrected_weight(weight, cross, moments, len(x)).double()
    strength = ridge_of(256, len(x)) * moments.double().diagonal().mean()

    def loss(candidate: Tensor) -> Tensor:
        missed = x.double() @ candidate.T - y.double() @ weight.double().T
        return missed.square().sum() + strength * (candidate - weight).square().sum()

    least = loss(found)
    assert least < 0.99 * loss(weight.double())
    for seed in range(5):
        nudge = 1e-3 * torch.randn(weight.shape, generator=generator(seed), dtype=torch.float64)
        assert min(loss(found + nudge), loss(found - nudge)) > least
    same = corrected_weight(weight, y.T @ y, y.T @ y, len(y))
    torch.testing.assert_close(same, weight, atol=1e-5, rtol=0)
    nothing = torch.zeros(256, 256)
    assert torch.equal(corrected_weight(weight, nothing, nothing, 9), weight)


def kl(teacher: nn.Module, student: nn.Module, tokens: Tensor) -> float:
    with torch.no_grad():
        log_p, log_q = (m(tokens, use_cache=False).logits.log_softmax(-1) for m in (teacher, student))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def hooks(latents: Latents) -> list[nn.Module]:
    return [
        m for m in latents.model.modules() if isinstance(m, nn.Linear) and (m._forward_pre_hooks or m._forward_hooks)
    ]


@pytest.fixture
def teacher() -> nn.Module:
    return small_model()


def test_a_student_starts_closer_to_its_teacher(teacher: nn.Module) -> None:
    for value in teacher.state_dict().values():  # so that float leftovers are not rounded
        value.copy_(F16.round(value))
    student = prepare(copy.deepcopy(teacher).requires_grad_(True), small_plan())
    corpus, fresh = small_corpus(64, 32), torch.from_numpy(small_corpus(16, 32, seed=1).tokens).long()
    before = kl(teacher, student.model, fresh)
    tokens, positions = torch.from_numpy(corpus.tokens).long(), torch.from_numpy(corpus.positions).long()
    seen = []
    student.model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    teacher.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    start_from_gptq(student, teacher, tokens, positions)
    with torch.no_grad():
        teacher.model(input_ids=tokens, position_ids=positions, use_cache=False)
    both, floats = seen[:2]
    torch.testing.assert_close(both[:64], floats, atol=1e-3, rtol=0)  # what the original computes
    assert float((both[64:] - floats).abs().max()) > 1
    assert kl(teacher, student.model, fresh) < 0.8 * before
    assert not hooks(student)


def test_what_layers_before_lost_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model that has learned something: of a random one no layer knows what another lost."""
    original = load_model(MODEL_DIR)
    windows = held_out_windows(HELDOUT_TEXT, load_tokenizer(MODEL_DIR), length=128, vocab_size=4096, max_tokens=12288)
    tokens, plan, found = torch.from_numpy(windows).long(), make_plan(MODEL_DIR, "q4_0"), []
    for ridge in (ridge_of, lambda columns, tokens: 1e9):  # by which nothing is corrected
        monkeypatch.setattr("intaglio.numerics.gptq.ridge_of", ridge)
        student = prepare(copy.deepcopy(original).requires_grad_(True), plan)
        start_from_gptq(student, original, tokens[:64], torch.arange(128).expand(64, -1))
        found.append(kl(original, student.model, tokens[64:]))
    assert found[0] < 0.97 * found[1], found


def test_scales_that_are_not_learned_are_refused(teacher: nn.Module) -> None:
    student = prepare(copy.deepcopy(teacher).requires_grad_(True), small_plan("schedule.learn_scales=false"))
    tokens = torch.from_numpy(small_corpus().tokens).long()
    with pytest.raises(InputError, match="GPTQ chooses codes under learned scales, and this recipe has none"):
        start_from_gptq(student, teacher, tokens, torch.arange(16).expand_as(tokens))


def test_inputs_that_are_not_finite_are_named(teacher: nn.Module) -> None:
    student = prepare(copy.deepcopy(teacher).requires_grad_(True), small_plan())
    student.model.model.layers[0].layer_scalar.fill_(torch.inf)
    tokens = torch.from_numpy(small_corpus().tokens).long()
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.[qkv]_proj\.weight: its inputs are NaN or Inf"):
        start_from_gptq(student, teacher, tokens, torch.arange(16).expand_as(tokens))
    assert not hooks(student)


class Killed(Exception):
    pass


def test_a_run_from_gptq_resumes_bit_for_bit(teacher: nn.Module, tmp_path: Path) -> None:
    plan = small_plan(
        "schedule.tokens=384", "schedule.batch_size=4", "schedule.sequence_length=16", "schedule.gptq_tokens=256"
    )
    options = Options(precision="no", compiled=False, checkpoint_every=2)
    corpus = small_corpus()

    def die(info: StepInfo) -> None:
        if info.step == 4:
            raise Killed

    whole = train(teacher, plan, corpus, tmp_path / "whole", options=options)
    with pytest.raises(Killed):
        train(teacher, plan, corpus, tmp_path / "cut", options=options, on_step=die)
    resumed = train(teacher, plan, corpus, tmp_path / "cut", options=options, resume=True)
    assert (tmp_path / "whole/losses.jsonl").read_bytes() == (tmp_path / "cut/losses.jsonl").read_bytes()
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name
