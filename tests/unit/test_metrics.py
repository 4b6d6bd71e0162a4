"""Metrics against direct float64 arithmetic, and evaluation over windows of a real, tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intaglio.errors import ConfigError, InputError, WeightError
from intaglio.measure import metrics
from intaglio.measure.evaluate import (
    Candidate,
    evaluate_many,
    greedy,
    logits_of,
    transformers_source,
)
from intaglio.measure.metrics import Accumulator, Comparison, recovered_share, student_975
from intaglio.progress import Progress

Window = tuple[Tensor, Tensor, Tensor]


def random_windows(windows: int, tokens: int, vocabulary: int, noise: float, seed: int = 0) -> list[Window]:
    random = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(windows):
        reference = torch.randn(tokens, vocabulary, generator=random) * 3
        candidate = reference + torch.randn(tokens, vocabulary, generator=random) * noise
        made.append((reference, candidate, torch.randint(vocabulary, (tokens,), generator=random)))
    return made


def compare(windows: list[Window]) -> Comparison:
    accumulator = Accumulator(runtime="test", simulated=True)
    for window in windows:
        accumulator.add(*window)
    return accumulator.result()


def direct(windows: list[Window]) -> dict[str, np.ndarray]:
    """The textbook formulas in float64; one row a window."""
    p = torch.stack([w[0] for w in windows]).double().softmax(-1)
    q = torch.stack([w[1] for w in windows]).double().softmax(-1)
    labels = torch.stack([w[2] for w in windows]).unsqueeze(-1)
    p_label, q_label = p.gather(-1, labels).squeeze(-1), q.gather(-1, labels).squeeze(-1)
    columns = {
        "kl": (p * (p / q).log()).sum(-1),
        "same_top": (p.argmax(-1) == q.argmax(-1)).double(),
        "delta_p": q_label - p_label,
        "nll_p": -p_label.log(),
        "nll_q": -q_label.log(),
    }
    return {name: column.numpy() for name, column in columns.items()}


def half_width(values: np.ndarray, t: float) -> float:
    """Windows of one length: 95% half width of the mean of their means, straight from its definition."""
    means = values.mean(-1)
    return t * means.std(ddof=1) / math.sqrt(len(means))


# Accumulator


@pytest.mark.parametrize("noise", [1e-3, 0.1, 3.0])
def test_every_number_against_float64(noise: float):
    windows = random_windows(6, 33, 500, noise)
    result, want = compare(windows), direct(windows)
    t = 2.5706  # Student's t, 5 degrees of freedom
    near = {"rel": 1e-4, "abs": 1e-9}
    assert result.tokens == 6 * 33 and result.windows == 6
    assert result.kl_mean_nats == pytest.approx(want["kl"].mean(), **near)
    assert result.kl_mean_ci_nats == pytest.approx(half_width(want["kl"], t), rel=2e-3)
    assert result.kl_median_nats == pytest.approx(np.median(want["kl"]), **near)
    assert result.kl_99_nats == pytest.approx(np.quantile(want["kl"], 0.99), **near)
    assert result.kl_999_nats == pytest.approx(np.quantile(want["kl"], 0.999), **near)
    assert result.kl_max_nats == pytest.approx(want["kl"].max(), **near)
    assert result.same_top_share == pytest.approx(want["same_top"].mean(), **near)
    assert result.same_top_ci == pytest.approx(half_width(want["same_top"], t), rel=2e-3)
    assert result.rms_delta_p == pytest.approx(math.sqrt(np.square(want["delta_p"]).mean()), rel=1e-3)
    assert result.perplexity_reference == pytest.approx(np.exp(want["nll_p"].mean()), **near)
    assert result.perplexity_candidate == pytest.approx(np.exp(want["nll_q"].mean()), **near)
    change = want["nll_q"] - want["nll_p"]
    assert result.perplexity_ratio == pytest.approx(np.exp(change.mean()), **near)
    assert result.perplexity_ratio_ci == pytest.approx(result.perplexity_ratio * half_width(change, t), rel=3e-3)
    assert result.perplexity_candidate_ci == pytest.approx(
        result.perplexity_candidate * half_width(want["nll_q"], t), rel=2e-3
    )


def test_a_window_by_hand():
    """llama-perplexity's definitions on two tokens of a vocabulary of two."""
    reference = torch.log(torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    candidate = torch.log(torch.tensor([[0.25, 0.75], [0.8, 0.2]]))
    result = compare([(reference, candidate, torch.tensor([0, 1]))])
    kls = [0.75 * math.log(3) - 0.25 * math.log(3), 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)]
    assert result.kl_mean_nats == pytest.approx(sum(kls) / 2)
    assert result.kl_median_nats == pytest.approx(sum(kls) / 2)  # between the two, as its percentile function has it
    assert result.kl_99_nats == pytest.approx(0.01 * min(kls) + 0.99 * max(kls))
    assert result.same_top_share == 0.5  # equal logits of the second token: the first index counts as its top
    assert result.rms_delta_p == pytest.approx(math.sqrt((0.5**2 + 0.3**2) / 2))
    assert result.perplexity_reference == pytest.approx((0.75 * 0.5) ** -0.5)
    assert result.perplexity_candidate == pytest.approx((0.25 * 0.2) ** -0.5)
    assert result.perplexity_ratio == pytest.approx((0.375 / 0.05) ** 0.5)


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 9),
    vocabulary=st.integers(1, 60),
    scale=st.sampled_from([0.0, 1e-4, 1.0, 40.0]),
)
@settings(max_examples=60, deadline=None)
def test_identical_logits_are_no_distance(seed: int, tokens: int, vocabulary: int, scale: float):
    logits = torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale
    result = compare([(logits, logits.clone(), torch.zeros(tokens, dtype=torch.long))] * 2)
    assert result.kl_max_nats == result.kl_mean_nats == result.kl_mean_ci_nats == 0
    assert result.same_top_share == 1 and result.rms_delta_p == 0 and result.perplexity_ratio == 1


@given(seed=st.integers(0, 2**31), noise=st.floats(0, 60))
@settings(max_examples=60, deadline=None)
def test_kl_is_never_negative_and_never_overflows(seed: int, noise: float):
    reference, candidate, labels = random_windows(1, 4, 50, noise, seed)[0]
    result = compare([(reference * 10, candidate * 10, labels)])
    assert 0 <= result.kl_median_nats <= result.kl_max_nats < math.inf


def test_tiny_distances_in_a_full_vocabulary():
    """The rounding of float32 log-probabilities is as large as this KL, and must not show."""
    windows = random_windows(1, 4, 262_144, 1e-3)
    assert compare(windows).kl_mean_nats == pytest.approx(direct(windows)["kl"].mean(), rel=1e-3)


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch):
    windows = random_windows(3, 20, 100, 0.3)
    whole = compare(windows)
    monkeypatch.setattr(metrics, "CHUNK_VALUES", 300)
    assert compare(windows) == whole


def test_windows_of_different_lengths_weigh_by_their_tokens():
    windows = random_windows(1, 30, 50, 0.5) + random_windows(1, 3, 50, 2.0, seed=1)
    kl = np.concatenate([direct([window])["kl"][0] for window in windows])
    assert compare(windows).kl_mean_nats == pytest.approx(kl.mean(), rel=1e-4)


def test_bfloat16_logits_are_taken_as_they_are():
    reference, candidate, labels = random_windows(1, 5, 40, 0.1)[0]
    narrow = (reference.bfloat16(), candidate.bfloat16(), labels)
    assert compare([narrow]) == compare([(narrow[0].float(), narrow[1].float(), labels)])


def test_interval_covers_the_truth_although_tokens_of_a_window_agree():
    """400 experiments whose windows share an offset: about 95% of the intervals hold the true mean."""
    random = np.random.default_rng(0)
    covered = independent = 0
    for _ in range(400):
        values = random.normal(size=(12, 1)) + random.normal(size=(12, 50))
        mean, ci = metrics._mean_and_ci(list(values.astype(np.float32)))
        assert ci is not None
        covered += abs(mean) <= ci
        independent += abs(mean) <= 1.96 * values.std() / math.sqrt(values.size)
    assert 0.92 <= covered / 400 <= 0.98
    assert independent / 400 < 0.5  # what an interval would do that takes tokens for independent


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (4, 2.776), (5, 2.571), (10, 2.228), (1000, 1.962)])
def test_student_quantiles(freedom: int, quantile: float):
    assert student_975(freedom) == pytest.approx(quantile, rel=2e-3)


def test_one_window_has_no_interval_and_json_holds_it():
    result = compare(random_windows(1, 5, 20, 0.1))
    assert result.kl_mean_ci_nats is None and result.perplexity_ratio_ci is None
    assert Comparison(**json.loads(json.dumps(result.to_dict()))) == result


def test_wrong_inputs_are_named():
    reference, candidate, labels = random_windows(1, 5, 20, 0.1)[0]
    accumulator = Accumulator(runtime="test", simulated=False)
    with pytest.raises(InputError, match="nothing to compare"):
        accumulator.result()
    with pytest.raises(ConfigError, match=r"\[5, 20\], candidate logits \[5, 19\]"):
        accumulator.add(reference, candidate[:, :-1], labels)
    with pytest.raises(ConfigError, match="4 labels"):
        accumulator.add(reference, candidate, labels[1:])
    with pytest.raises(InputError, match="without a label"):
        accumulator.add(reference[:0], candidate[:0], labels[:0])
    candidate[3, 7] = math.nan
    with pytest.raises(WeightError, match=r"window 0: .* of the candidate at 1 of 5 tokens, first at position 3"):
        accumulator.add(reference, candidate, labels)


def test_recovered_share():
    assert recovered_share(0.02, 0.08) == pytest.approx(0.75)
    assert recovered_share(0.12, 0.08) == pytest.approx(-0.5)
    for nothing in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="nothing to recover"):
            recovered_share(0.1, nothing)


# Evaluation


@pytest.fixture(scope="module")
def tiny():
    """A random Gemma 4 with per-layer embeddings and a shared key-value tail."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gemma4_text",
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=64,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=16,
        sliding_window=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(64, (5, 12), generator=torch.Generator().manual_seed(0))


class Noisy:
    """A candidate: the model's logits with a little noise; counts its calls."""

    def __init__(self, source, noise: float):
        self.source, self.noise, self.calls = source, noise, 0

    def __call__(self, window: Tensor) -> Tensor:
        self.calls += 1
        logits = self.source(window)
        return logits + self.noise * torch.randn(logits.shape, generator=torch.Generator().manual_seed(self.calls))


def test_logits_come_one_window_at_a_time_whatever_the_batch(tiny, windows: Tensor):
    single = list(logits_of(tiny, windows))
    batched = list(logits_of(tiny, windows, batch=2))
    assert [tuple(x.shape) for x in single] == [(12, 64)] * 5
    assert all(x.dtype == torch.float32 and not x.requires_grad for x in single)
    for one, many, window in zip(single, batched, windows, strict=True):
        torch.testing.assert_close(one, many, atol=1e-5, rtol=0)
        torch.testing.assert_close(one, tiny(input_ids=window[None]).logits[0], atol=1e-5, rtol=0)


def test_evaluation_leaves_the_training_mode_as_it_was(tiny, windows: Tensor):
    tiny.train()
    next(iter(logits_of(tiny, windows)))
    assert tiny.training
    tiny.eval()


def test_pair_scores_every_position_but_the_last(tiny, windows: Tensor):
    source = transformers_source(tiny)
    noisy = Noisy(source, 0.1)
    one = {"candidate": Candidate(source=noisy, runtime="r", simulated=False)}
    result = evaluate_many(source, one, windows)["candidate"]
    noisy.calls = 0
    want = compare([(source(w)[:-1], noisy(w)[:-1], w[1:]) for w in windows])
    assert result.tokens == 5 * 11 and result.runtime == "r" and not result.simulated
    assert result.to_dict() == want.to_dict() | {"runtime": "r", "simulated": False}


def test_many_candidates_share_one_pass_of_the_teacher(tiny, windows: Tensor):
    teacher = Noisy(transformers_source(tiny), 0.0)
    candidates = {
        "same": Candidate(source=logits_of(tiny, windows, batch=3), runtime="a", simulated=True),
        "noisy": Candidate(source=Noisy(transformers_source(tiny), 0.3), runtime="b", simulated=False),
    }
    heard = Mock()
    results = evaluate_many(teacher, candidates, windows, Progress(heard))
    assert teacher.calls == 5
    assert results["same"].kl_max_nats < 1e-9 < results["noisy"].kl_mean_nats
    assert (results["same"].simulated, results["noisy"].simulated) == (True, False)
    progress = [call.args for call in heard.part.call_args_list]
    assert [done for done, _, _ in progress] == [11, 22, 33, 44, 55]
    assert progress[-1][1:] == (55, f"KL {results['noisy'].kl_mean_nats:.4f}")


def test_windows_that_cannot_be_scored(tiny, windows: Tensor):
    source = transformers_source(tiny)
    for wrong in (windows[:0], windows[:, :1], windows[0]):
        with pytest.raises(InputError, match="expected \\[windows, tokens\\]"):
            evaluate_many(source, {"candidate": Candidate(source=source, runtime="r", simulated=True)}, wrong)

    def short() -> Iterator[Tensor]:
        yield from logits_of(tiny, windows[:2])

    with pytest.raises(InputError, match="logits of candidate ended early: expected 5 windows"):
        evaluate_many(source, {"candidate": Candidate(source=short(), runtime="r", simulated=True)}, windows)


class Letters:
    """A tokenizer with what `greedy` needs: one token a character."""

    def __call__(self, text: str, return_tensors: str):
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": [[ord(c) % 64 for c in text]]}, tensor_type=return_tensors)

    def decode(self, tokens: Tensor, skip_special_tokens: bool) -> str:
        return "".join(chr(64 + int(t)) for t in tokens)


def test_greedy_takes_the_likeliest_token_each_time(tiny):
    texts = greedy(tiny, Letters(), ["ab", "xyz"], tokens=6)
    ids = [ord(c) % 64 for c in "ab"]
    for _ in range(6):
        ids.append(int(tiny(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert texts[0] == "".join(chr(64 + i) for i in ids[2:])
    assert len(texts) == 2
