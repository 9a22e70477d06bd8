"""Divergences of student from teacher: closed forms, limits, where each leads, and the chunked pass over a model."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_trainer.algos.distillation import forward_kl, jensen_shannon, reverse_kl, students_row
from rlhf_trainer.config import Distillation
from rlhf_trainer.desk.model import build_model, build_tokenizer
from rlhf_trainer.loops.distillation import divergence_of
from rlhf_trainer.models import student as student_module
from rlhf_trainer.models.policy import Batch
from rlhf_trainer.models.student import Divergence, Student

P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()  # teacher
Q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()  # student


def half(teacher: Tensor, student: Tensor) -> Tensor:
    return jensen_shannon(teacher, student, 0.3)


EVERY: dict[str, Divergence] = {"forward": forward_kl, "reverse": reverse_kl, "jensenShannon": half}


def plain_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_values_by_hand() -> None:
    p, q = P.exp().tolist(), Q.exp().tolist()
    assert float(forward_kl(P, Q)) == pytest.approx(plain_kl(p, q))
    assert float(reverse_kl(P, Q)) == pytest.approx(plain_kl(q, p))
    mixture = [0.3 * a + 0.7 * b for a, b in zip(p, q, strict=True)]
    assert float(half(P, Q)) == pytest.approx(0.3 * plain_kl(p, mixture) + 0.7 * plain_kl(q, mixture))
    for divergence in EVERY.values():
        assert float(divergence(P, P)) == pytest.approx(0.0, abs=1e-12)


def test_jensen_shannon_tends_to_forward_and_reverse() -> None:
    assert float(jensen_shannon(P, Q, 1e-6)) / 1e-6 == pytest.approx(float(forward_kl(P, Q)), rel=1e-4)
    assert float(jensen_shannon(P, Q, 1 - 1e-6)) / 1e-6 == pytest.approx(float(reverse_kl(P, Q)), rel=1e-4)
    assert float(jensen_shannon(P, Q, 0.5)) == pytest.approx(float(jensen_shannon(Q, P, 0.5)))


def test_the_user_chooses_the_divergence() -> None:
    for name, expected in (("forward", forward_kl), ("reverse", reverse_kl)):
        chosen = divergence_of(Distillation.model_validate({"divergence": name}))
        assert float(chosen(P, Q)) == pytest.approx(float(expected(P, Q)))
    mixed = divergence_of(Distillation.model_validate({"divergence": "jensenShannon", "beta": 0.3}))
    assert float(mixed(P, Q)) == pytest.approx(float(half(P, Q)))


TABLE = torch.log_softmax(torch.randn(5, 8, generator=torch.Generator().manual_seed(2)), -1)


def distance_of_student(name: str, steps: int = 400) -> float:
    """Largest KL(teacher‖student) over the contexts of a table after ``steps`` of learning."""
    logits = torch.zeros(5, 8, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(EVERY[name](TABLE, torch.log_softmax(logits, -1)).mean())
        optimizer.step()
    return float(forward_kl(TABLE, torch.log_softmax(logits, -1)).max().detach())


@pytest.mark.parametrize("name", EVERY)
def test_a_tabular_student_becomes_its_teacher(name: str) -> None:
    assert distance_of_student(name) < 1e-4
    assert distance_of_student(name, steps=0) > 0.05  # there was something to learn


def fitted_centre(divergence: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean of a bell over 21 tokens fitted to a teacher with two bells, at 5 and 15, the second a little larger."""
    tokens = torch.arange(21, dtype=torch.float64)
    bells = 0.45 * torch.exp(-((tokens - 5) ** 2) / 2) + 0.55 * torch.exp(-((tokens - 15) ** 2) / 2)
    teacher = (bells + 1e-6).log().log_softmax(-1)
    centre = torch.tensor(13.0, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([centre, scale], lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        student = torch.log_softmax(-((tokens - centre) ** 2) / (2 * scale.exp() ** 2), -1)
        torch.autograd.backward(divergence(teacher, student))
        optimizer.step()
    return float(centre.detach())


def test_forward_covers_and_reverse_seeks_a_mode() -> None:
    """A student too simple for its teacher shows that the two are not mixed up."""
    assert fitted_centre(forward_kl) == pytest.approx(10.5, abs=0.5)
    assert fitted_centre(reverse_kl) == pytest.approx(15.0, abs=0.3)


@pytest.mark.parametrize(("fraction", "written"), [(0.0, 0), (0.5, 8), (0.3, 4), (1.0, 16)])
def test_the_students_rows_are_spread_over_the_batch(fraction: float, written: int) -> None:
    rows = [students_row(index, fraction) for index in range(16)]
    assert sum(rows) == written
    assert abs(sum(rows[:8]) - sum(rows[8:])) <= 1


def compared(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Divergences and the gradient of their sum, of a student and a wider teacher."""
    tokenizer = build_tokenizer()
    teacher = build_model(tokenizer, width=24, layers=1, seed=2, initializer_range=0.2).requires_grad_(False)
    student = Student(build_model(tokenizer, width=16, layers=1, seed=1, initializer_range=0.2))
    apart, _ = student(batch, teacher, forward_kl, 0.8)
    torch.autograd.backward(apart.sum())
    return apart.detach(), {name: value.grad for name, value in student.named_parameters() if value.grad is not None}


def test_chunks_of_tokens_change_neither_value_nor_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch.of([(1, 5, 6), (1, 7)], [(8, 9, 2), (10, 11, 12, 13, 2)], 0, torch.device("cpu"))
    whole, gradients = compared(batch)
    monkeypatch.setattr(student_module, "_LOGITS_PER_CHUNK", 3 * len(build_tokenizer()))  # 8 tokens in chunks of 3
    parts, others = compared(batch)
    torch.testing.assert_close(parts, whole)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-6, rtol=1e-5)


def test_the_pass_over_a_model_agrees_with_whole_logits() -> None:
    """Row by row, without padding, from the logits of Hugging Face's own forward."""
    tokenizer = build_tokenizer()
    teacher, student = (build_model(tokenizer, width=16, layers=1, seed=s, initializer_range=0.2) for s in (2, 1))
    rows = [((1, 5, 6), (8, 9, 2)), ((1, 7), (10, 11, 12, 13, 2))]
    batch = Batch.of([p for p, _ in rows], [r for _, r in rows], 0, torch.device("cpu"))
    found, entropy = Student(student)(batch, teacher, reverse_kl, 0.8)
    expected, entropies = [], []
    for prompt, response in rows:
        ids = torch.tensor([[*prompt, *response]])
        where = slice(len(prompt) - 1, -1)
        ours, theirs = (torch.log_softmax(lm(ids).logits[0, where] / 0.8, -1) for lm in (student, teacher))
        expected.append((ours.exp() * (ours - theirs)).sum(-1))
        entropies.append(-(ours.exp() * ours).sum(-1))
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(entropy, torch.cat(entropies), atol=1e-5, rtol=1e-4)
