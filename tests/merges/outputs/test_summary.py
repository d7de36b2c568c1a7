"""After a merge: what each input is in the result, from a sample."""

from __future__ import annotations

from pathlib import Path

import folders
import pytest
import torch

from merges import api
from merges.outputs import summary
from merges.recipes.recipe import Part, Recipe


def deltas(here: Path, *names: str) -> dict[str, torch.Tensor]:
    """Each model's delta to the base, as one vector."""
    base = folders.read(here / "base")
    return {
        name: torch.cat([(tensor.double() - base[key].double()).flatten() for key, tensor in sorted(
            folders.read(here / name).items())])
        for name in names
    }  # fmt: skip


def test_it_has_norm_share_conflicts_and_cosine_of_each_input(here: Path) -> None:
    parts = (Part("a", "a", {"weight": 1.0}), Part("b", "b", {"weight": -0.5}))
    record = api.merge(Recipe("task_arithmetic", parts, "base", dtype="float32"), "out")
    assert record["summary"]["sampled"] == 1.0
    found = {entry["name"]: entry for entry in record["summary"]["inputs"]}
    d = deltas(here, "a", "b", "out")
    for name, sign in (("a", 1), ("b", -1)):
        assert found[name]["norm"] == pytest.approx(float(d[name].norm()), rel=1e-4)
        cosine = torch.nn.functional.cosine_similarity(d[name], d["out"], 0)
        assert found[name]["cosine"] == pytest.approx(float(cosine), abs=1e-4)
        against = (d[name].sign() * sign * d["out"].sign())[(d[name] * d["out"]) != 0]
        assert found[name]["sign_conflicts"] == pytest.approx(float((against < 0).double().mean()), abs=1e-3)
        assert found[name]["kept"] == 1.0


def test_of_a_trimming_method_it_says_what_is_kept_and_without_a_base_nothing(here: Path) -> None:
    parts = (Part("a", "a", {"density": 0.25}), Part("b", "b"))
    record = api.merge(Recipe("ties", parts, "base"), "out")
    assert {entry["name"]: round(entry["kept"], 3) for entry in record["summary"]["inputs"]} == {"a": 0.25, "b": 0.2}
    assert api.merge(Recipe("linear", (Part("a", "a"), Part("b", "b"))), "plain")["summary"] is None


def test_a_sample_reads_few_elements(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "PIECES", 8)
    monkeypatch.setattr(summary, "PIECE", 16)
    record = api.merge(Recipe("task_arithmetic", (Part("a", "a"),), "base"), "out")
    assert 0 < record["summary"]["sampled"] < 0.2
    assert record["summary"]["inputs"][0]["cosine"] == pytest.approx(1.0, abs=1e-3)
