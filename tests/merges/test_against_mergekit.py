"""mergekit as an outside oracle, where it is installed: `STEER_MERGEKIT=PEER/bin/python pytest -m slow`.

Where we differ on purpose: what ties at a threshold is kept (mergekit keeps one of them, whichever its sort puts
first), so models here have no ties; a cancelled vote gives the base (reading mergekit's YAML sets `zero: positive`);
multislerp is a true mean on the sphere; model_stock never goes against the mean of the deltas; breadcrumbs with a small
gamma keeps the delta; random methods draw other numbers; arcee_fusion keeps the dtype, with exact quartiles.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pico
import pytest
import torch
from safetensors.torch import load_file

from merges import running
from merges.recipe import read

PEER = os.environ.get("STEER_MERGEKIT")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PEER is None, reason="STEER_MERGEKIT names no Python with mergekit")]

WEIGHTED = "models:\n  - {model: a, parameters: {weight: 1.0%s}}\n  - {model: b, parameters: {weight: 0.5%s}}\n"
CASES = {
    "linear": WEIGHTED % ("", ""),
    "task_arithmetic": "base_model: base\n" + WEIGHTED % ("", ""),
    "ties": "base_model: base\n" + WEIGHTED % (", density: 0.4", ", density: 0.7"),
    "slerp": "base_model: a\nmodels:\n  - model: a\n  - model: b\nparameters: {t: 0.3}\n",
    "nuslerp": WEIGHTED % ("", ""),
    "karcher": "models:\n  - model: a\n  - model: b\n  - model: c\n",
    "model_stock": "base_model: base\nmodels:\n  - model: a\n  - model: b\n  - model: c\n",
    "sce": "base_model: base\nmodels:\n  - model: a\n  - model: b\n  - model: c\nparameters: {select_topk: 0.5}\n",
    "nearswap": "base_model: a\nmodels:\n  - model: a\n  - model: b\nparameters: {t: 0.01}\n",
    "breadcrumbs": "base_model: base\n" + WEIGHTED % (", density: 0.5, gamma: 0.1", ", density: 0.5, gamma: 0.1"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pico Llamas in float32, whose deltas all differ in magnitude and mostly agree."""
    folder = tmp_path_factory.mktemp("oracle")
    for seed, name in enumerate(("base", "a", "b", "c")):
        model = pico.build("llama", dtype=torch.float32)
        common, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                shared = torch.randn(parameter.shape, generator=common)
                parameter.add_((seed > 0) * 0.02 * (shared + torch.randn(parameter.shape, generator=own)))
        model.save_pretrained(folder / name)
        pico.tokenizer().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("method", sorted(CASES))
def test_mergekit_makes_the_same(models: Path, tmp_path: Path, method: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    # mergekit takes a name for a hub id unless it is a path.
    placed = re.sub(r"(model: |base_model: )(base|a|b|c)\b", lambda m: f"{m[1]}{models / m[2]}", CASES[method])
    recipe.write_text(f"merge_method: {method}\n{placed}dtype: float32\n")
    script = Path(__file__).parents[1] / "bench" / "mergekit_peer.py"
    assert PEER is not None
    done = subprocess.run([PEER, script, recipe, tmp_path / "theirs"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    running.merge(read(recipe), tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    # Their Karcher mean stops at steps of 1e-5.
    loose = 1e-5 if method == "karcher" else 2e-6
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, atol=loose, err_msg=name)
