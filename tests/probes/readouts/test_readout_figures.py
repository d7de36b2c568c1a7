"""Figures of classes whose scores are known."""

from __future__ import annotations

import pytest
import torch

from probes.readouts.figures import of_classes


def test_few_groups_that_are_separated_are_no_certainty() -> None:
    """Two groups of each class gave 0.93 to 1, by their forty examples of each."""
    groups = [f"g{i // 20}" for i in range(80)]
    found, _, _ = of_classes(torch.ones(40), -torch.ones(40), 0.0, 0, groups)
    assert (found.auroc, found.auroc_low, found.auroc_high) == (1.0, pytest.approx(0.025 ** (1 / 2)), 1.0)
    alone, _, _ = of_classes(torch.ones(40), -torch.ones(40), 0.0, 0)
    assert alone.auroc_low == pytest.approx(0.025 ** (1 / 40))
