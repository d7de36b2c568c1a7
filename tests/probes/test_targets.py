"""Targets against slow references: KL over the listed tokens and a tail, in closed form."""

from __future__ import annotations

import pytest
import torch

from probes.targets import Target, divergence_from_target, hard_target, soft_target


def buckets(teacher: torch.Tensor, student: torch.Tensor, kept: list[int]) -> float:
    """KL over the kept tokens and one bucket for the rest, in float64, the obvious way."""
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    rest = [i for i in range(len(p)) if i not in kept]
    found = sum(float(p[i] * (p[i] / q[i]).log()) for i in kept)
    if rest:
        left, right = p[rest].sum(), q[rest].sum()
        found += float(left * (left / right).log())
    return found


@pytest.mark.parametrize("count", [1, 3, 10, 40])
def test_the_divergence_is_that_of_kept_tokens_and_a_tail(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    teacher, student = (3 * torch.randn(7, 40, generator=generator) for _ in range(2))
    target = soft_target(teacher, count)
    found = divergence_from_target(student, target.tokens, target.logs)
    expected = [buckets(t, s, kept) for t, s, kept in zip(teacher, student, target.tokens.tolist(), strict=True)]
    assert torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64), atol=2e-6)
    assert torch.allclose(divergence_from_target(teacher, target.tokens, target.logs), torch.zeros(7), atol=1e-5)


def test_a_certain_token_costs_its_cross_entropy_and_padding_nothing() -> None:
    logits, ids = torch.randn(5, 30, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 4, 9, 2, 0])
    target = hard_target(ids)
    entropy = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    assert torch.allclose(divergence_from_target(logits, target.tokens, target.logs), entropy, atol=1e-6)
    padded = torch.cat([target.tokens, torch.zeros(5, 3, dtype=torch.long)], 1)
    logs = torch.cat([target.logs, torch.full((5, 3), -torch.inf)], 1)
    assert torch.allclose(divergence_from_target(logits, padded, logs), entropy, atol=1e-6)


def test_gradients_are_those_of_finite_differences_and_finite_at_the_optimum() -> None:
    generator = torch.Generator().manual_seed(3)
    teacher, student = (torch.randn(2, 12, generator=generator) for _ in range(2))
    target = soft_target(teacher, 4)
    student.requires_grad_(True)
    divergence_from_target(student, target.tokens, target.logs).sum().backward()
    assert student.grad is not None
    for at in [(0, 0), (1, 5), (1, 11)]:
        step = torch.zeros_like(student)
        step[at] = 1e-2
        up, down = (
            divergence_from_target((student + sign * step).detach(), target.tokens, target.logs).sum()
            for sign in (1, -1)
        )
        assert float(student.grad[at]) == pytest.approx(float(up - down) / 2e-2, abs=2e-3)
    whole = soft_target(teacher, 12)
    same = teacher.clone().requires_grad_(True)
    divergence_from_target(same, whole.tokens, whole.logs).sum().backward()
    assert same.grad is not None
    assert float(same.grad.abs().max()) < 1e-5


def test_a_target_of_all_tokens_has_no_tail() -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(8))
    target = Target(*soft_target(logits, 100))
    assert target.tokens.shape == (3, 9)
    assert torch.allclose(target.logs.exp().sum(-1), torch.ones(3))
