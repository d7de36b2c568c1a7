"""Targets and objectives against slow references."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from probes.scores.divergence import Row
from steer.training.data.samples import GENERAL, Sample, load_all, save_all, told_by
from steer.training.data.targets import Target, certain, divergence, top
from steer.training.objectives import divergence as by_divergence
from steer.training.objectives import preference
from steer.training.objectives.protocol import ObjectiveSettings


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
    target = top(teacher, count)
    found = divergence(student, target.tokens, target.logs)
    expected = [buckets(t, s, kept) for t, s, kept in zip(teacher, student, target.tokens.tolist(), strict=True)]
    assert torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64), atol=2e-6)
    assert torch.allclose(divergence(teacher, target.tokens, target.logs), torch.zeros(7), atol=1e-5)


def test_a_certain_token_costs_its_cross_entropy_and_padding_nothing() -> None:
    logits, ids = torch.randn(5, 30, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 4, 9, 2, 0])
    target = certain(ids)
    entropy = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    assert torch.allclose(divergence(logits, target.tokens, target.logs), entropy, atol=1e-6)
    padded = torch.cat([target.tokens, torch.zeros(5, 3, dtype=torch.long)], 1)
    logs = torch.cat([target.logs, torch.full((5, 3), -torch.inf)], 1)
    assert torch.allclose(divergence(logits, padded, logs), entropy, atol=1e-6)


def test_gradients_are_those_of_finite_differences_and_finite_at_the_optimum() -> None:
    generator = torch.Generator().manual_seed(3)
    teacher, student = (torch.randn(2, 12, generator=generator) for _ in range(2))
    target = top(teacher, 4)
    student.requires_grad_(True)
    divergence(student, target.tokens, target.logs).sum().backward()
    assert student.grad is not None
    for at in [(0, 0), (1, 5), (1, 11)]:
        step = torch.zeros_like(student)
        step[at] = 1e-2
        up, down = (divergence((student + sign * step).detach(), target.tokens, target.logs).sum() for sign in (1, -1))
        assert float(student.grad[at]) == pytest.approx(float(up - down) / 2e-2, abs=2e-3)
    whole = top(teacher, 12)
    same = teacher.clone().requires_grad_(True)
    divergence(same, whole.tokens, whole.logs).sum().backward()
    assert same.grad is not None
    assert float(same.grad.abs().max()) < 1e-5


def samples() -> list[Sample]:
    rows = [Row([5, 6, 7, 8], 2), Row([5, 6, 7, 8, 9, 10, 11], 3), Row([9, 4], 1)]
    made = told_by(rows)
    made[2] = made[2]._replace(target=top(torch.randn(1, 20, generator=torch.Generator().manual_seed(2)), 6))
    return made


def test_each_sample_counts_the_same_however_long_or_padded() -> None:
    made = samples()
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(len(s.ids), 20, generator=generator) for s in made]
    batch = by_divergence.collate(made, 0)
    whole = torch.zeros(len(made), batch["input_ids"].shape[1], 20)
    for row, one in enumerate(logits):
        whole[row, : len(one)] = one
    alone = [
        float(divergence(one[s.prompt - 1 : -1], s.target.tokens, s.target.logs).mean())
        for s, one in zip(made, logits, strict=True)
    ]
    flat = whole[:, batch["keep"]][batch["counts"]]
    found = by_divergence.by_sample(batch, flat)
    assert found.tolist() == pytest.approx(alone, abs=1e-5)
    assert float(by_divergence.loss(batch, flat, ObjectiveSettings())) == pytest.approx(sum(alone) / 3, abs=1e-5)


def test_the_preference_loss_is_equation_7() -> None:
    wanted, other = told_by([Row([5, 6, 7, 8], 2), Row([5, 6, 9], 2)])
    pair = wanted._replace(likelihood=-4.0, other=other._replace(likelihood=-2.5))
    general = told_by([Row([3, 4, 5], 1)], kind=GENERAL)[0]
    batch = preference.collate([general, pair], 0)
    logits = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(5))

    def likelihood(row: int, sample: Sample) -> float:
        logs = logits[row, sample.prompt - 1 : len(sample.ids) - 1].double().log_softmax(-1)
        return float(logs.gather(1, torch.tensor(sample.ids[sample.prompt :])[:, None]).sum())

    margin = (likelihood(0, wanted) + 4.0) - (likelihood(1, other) + 2.5)
    expected = float(torch.nn.functional.softplus(torch.tensor(-0.3 * margin)))
    expected = (expected - likelihood(2, general) / 2) / 2
    kept = logits[:, batch["keep"]][batch["counts"]]
    assert float(preference.loss(batch, kept, ObjectiveSettings(beta=0.3))) == pytest.approx(expected, abs=1e-5)


def test_samples_survive_the_disk(tmp_path: Path) -> None:
    made = samples()
    made[0] = made[0]._replace(other=made[1]._replace(likelihood=-3.0), likelihood=-1.5)
    made.append(told_by([Row([1, 2, 3], 1)], kind=GENERAL)[0])
    save_all(made, tmp_path / "samples.safetensors")
    for before, after in zip(made, load_all(tmp_path / "samples.safetensors"), strict=True):
        assert (before.ids, before.prompt, before.kind, before.likelihood) == (
            after.ids, after.prompt, after.kind, after.likelihood,
        )  # fmt: skip
        assert before.digest == after.digest
        assert torch.equal(before.target.tokens, after.target.tokens)
        assert torch.equal(before.target.logs, after.target.logs)
        assert (before.other is None) == (after.other is None)
        if before.other is not None and after.other is not None:
            assert before.other.ids == after.other.ids
            assert after.other.likelihood == -3.0


def test_a_target_of_all_tokens_has_no_tail() -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(8))
    target = Target(*top(logits, 100))
    assert target.tokens.shape == (3, 9)
    assert torch.allclose(target.logs.exp().sum(-1), torch.ones(3))
