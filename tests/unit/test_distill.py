"""The chunked loss is the plain KL, in value and in gradient, and never holds all logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intaglio.train import distill
from intaglio.train.distill import cap, chunked_kl

TOKENS, WIDTH, VOCABULARY = 13, 8, 37


def random_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and heads of student and teacher; logits reach beyond a soft-cap of 3."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, WIDTH), (VOCABULARY, WIDTH)]
    hidden, head = (torch.randn(shape, generator=generator) for shape in shapes)
    noisy = [x + 0.3 * torch.randn(x.shape, generator=generator) for x in (hidden, head)]
    return tuple(x.to(dtype) for x in (hidden, head, *noisy))  # type: ignore[return-value]


def naive_kl(hidden: Tensor, head: Tensor, t_hidden: Tensor, t_head: Tensor, *softcaps: float | None) -> Tensor:
    """The definition, in float64. softcaps: of the student, and of a teacher that has another."""

    def log_softmax(hidden_TD: Tensor, head_VD: Tensor, softcap: float | None) -> Tensor:
        logits = hidden_TD.double() @ head_VD.double().T
        return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)

    log_p, log_q = log_softmax(t_hidden, t_head, softcaps[-1]), log_softmax(hidden, head, softcaps[0])
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@pytest.mark.parametrize("softcap", [None, 3.0, 30.0])
@pytest.mark.parametrize("chunk", [1, 4, 5, TOKENS, 512])
@pytest.mark.parametrize("head_learns", [True, False])
def test_value_and_gradient_are_those_of_the_definition(softcap: float | None, chunk: int, head_learns: bool) -> None:
    hidden, head, *teacher = random_inputs()
    hidden.requires_grad_()
    head.requires_grad_(head_learns)
    loss = chunked_kl(hidden, head, *teacher, softcap=softcap, chunk_tokens=chunk)
    (3 * loss).backward()
    ours = [hidden.grad, head.grad]

    hidden.grad = head.grad = None
    expected = naive_kl(hidden, head, *teacher, softcap)
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    assert loss > 0.05
    torch.testing.assert_close(ours[0], hidden.grad, rtol=1e-4, atol=1e-6)
    assert (ours[1] is None) == (not head_learns)
    if head_learns:
        torch.testing.assert_close(ours[1], head.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("softcap", "teacher_softcap"), [(None, 3.0), (3.0, None), (3.0, 30.0)])
def test_a_teacher_may_be_capped_otherwise(softcap: float | None, teacher_softcap: float | None) -> None:
    hidden, head, *teacher = random_inputs()
    hidden.requires_grad_()
    loss = chunked_kl(hidden, head, *teacher, softcap=softcap, teacher_softcap=teacher_softcap)
    loss.backward()
    ours, hidden.grad = hidden.grad, None
    expected = naive_kl(hidden, head, *teacher, softcap, teacher_softcap)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours, hidden.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_student_that_equals_its_teacher_loses_nothing(softcap: float | None) -> None:
    hidden, head, *_ = random_inputs()
    hidden.requires_grad_()
    loss = chunked_kl(hidden, head, hidden.detach(), head, softcap=softcap)
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


def test_in_bfloat16_everything_after_the_logits_is_float32() -> None:
    hidden, head, *teacher = random_inputs(torch.bfloat16)
    loss = chunked_kl(hidden.requires_grad_(), head, *teacher, softcap=30.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    student, original = (x @ w.T for x, w in ((hidden, head), teacher))  # logits, rounded to bfloat16
    identity = torch.eye(VOCABULARY)
    expected = naive_kl(student, identity, original, identity, 30.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)


def test_the_kl_runs_from_the_teacher_to_the_student() -> None:
    """Forward KL: where the teacher is certain and the student is not, the student pays."""
    certain, uncertain = torch.tensor([[8.0]]), torch.tensor([[0.0]])
    head = torch.tensor([[1.0], [0.0], [-1.0]])
    loss = chunked_kl(uncertain, head, certain, head, softcap=None)
    torch.testing.assert_close(loss, torch.tensor(3.0).log(), rtol=0.01, atol=0.0)


def test_huge_logits_stay_finite_under_the_cap() -> None:
    hidden, head, *teacher = random_inputs()
    hidden = (hidden * 1e6).requires_grad_()
    loss = chunked_kl(hidden, head, *teacher, softcap=30.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all()
    assert cap(torch.tensor([1e9, -1e9]), 30.0).tolist() == [30.0, -30.0]


def test_one_chunk_of_logits_exists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    plain = distill._chunk_gradient

    def watched(softcaps: tuple, student: Tensor, teacher: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        shapes.extend([student.shape, teacher.shape])
        return plain(*softcaps, student, teacher, weight)

    monkeypatch.setattr(distill, "_kernel", lambda kernel, softcaps, compiled: lambda *rest: watched(softcaps, *rest))
    chunked_kl(*random_inputs(), softcap=None, chunk_tokens=5)
    assert [tuple(s) for s in shapes] == [(5, VOCABULARY)] * 4 + [(3, VOCABULARY)] * 2


def test_no_logits_are_kept_for_the_backward() -> None:
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    hidden, head, *teacher = random_inputs()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunked_kl(hidden.requires_grad_(), head.requires_grad_(), *teacher, softcap=30.0)
    assert sorted(kept) == [(TOKENS, WIDTH), (VOCABULARY, WIDTH)]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [4, 512])
def test_only_what_is_counted_counts(softcap: float | None, chunk: int) -> None:
    hidden, head, *teacher = random_inputs()
    counted = torch.arange(TOKENS) % 3 == 1
    hidden.requires_grad_()
    head.requires_grad_()
    loss = chunked_kl(hidden, head, *teacher, softcap=softcap, chunk_tokens=chunk, counted_T=counted)
    loss.backward()
    ours = [hidden.grad, head.grad]
    hidden.grad = head.grad = None
    t_hidden, t_head = teacher
    expected = naive_kl(hidden[counted], head, t_hidden[counted], t_head, softcap)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    for found, plain in zip(ours, (hidden.grad, head.grad), strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)
    assert not ours[0][~counted].any()


def test_a_batch_in_which_nothing_counts_teaches_nothing() -> None:
    hidden, head, *teacher = random_inputs()
    hidden.requires_grad_()
    loss = chunked_kl(hidden, head, *teacher, softcap=None, counted_T=torch.zeros(TOKENS, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not hidden.grad.any()
