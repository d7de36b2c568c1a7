"""A merge method from a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folders
import numpy as np
import pytest
import torch

from merges import api
from merges.recipes.recipe import Part, Recipe


def part(name: str, **options: Any) -> Part:
    return Part(name, Path(name).stem, options)


def test_a_method_from_a_file_of_its_own_needs_only_numpy(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merges import methods
    from merges.engine.method import MergeMethod

    def combine(_task: Any, block: Any, _prepared: Any) -> np.ndarray:
        return np.take_along_axis(block.values, np.abs(block.values).argmax(0)[None], 0)[0]

    greatest = MergeMethod(name="greatest", summary="", source="", space="delta", base="needed", combine=combine)
    known = dict(methods.available())
    monkeypatch.setattr(methods, "available", lambda: known | {"greatest": greatest})
    api.merge(Recipe("greatest", (part("a"), part("b")), "base", dtype="float32"), "out")
    base, a, b, out = (folders.read(here / name) for name in ("base", "a", "b", "out"))
    name = "lm_head.weight"
    d = torch.stack([a[name].float() - base[name].float(), b[name].float() - base[name].float()])
    torch.testing.assert_close(out[name], base[name].float() + d.gather(0, d.abs().argmax(0)[None])[0])
