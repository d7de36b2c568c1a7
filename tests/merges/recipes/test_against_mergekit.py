"""mergekit 0.1.5 as an outside oracle, where it is installed: `STEER_MERGEKIT=PEER/bin/python pytest -m slow`.

Where we differ on purpose: what ties at a threshold is kept (mergekit keeps one of them, whichever its sort puts
first), so models here have no ties; a cancelled vote gives the base (reading mergekit's YAML sets `zero: positive`);
multislerp is a true mean on the sphere; model_stock never goes against the mean of the deltas; breadcrumbs with a small
gamma keeps the delta; random methods draw other numbers; arcee_fusion keeps the dtype, and counts
all elements.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import folders
import mergekit_grid
import numpy as np
import pico
import pytest
import torch
from safetensors.torch import load_file
from test_mergekit_grid import check

from merges import api
from merges.recipes.document import read

PEER = os.environ.get("STEER_MERGEKIT")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PEER is None, reason="STEER_MERGEKIT names no Python with mergekit")]

WEIGHTED = "models:\n  - {model: a, parameters: {weight: 1.0%s}}\n  - {model: b, parameters: {weight: 0.5%s}}\n"
ALL = "models:\n  - model: a\n  - model: b\n  - model: c\n"
BASE = "base_model: base\n"
LAYERS = "slices:\n  - sources:\n      - {model: %s, layer_range: [0, 2]}\n      - {model: %s, layer_range: [0, 2]}\n"
TWO = "  - sources: [{model: %s, layer_range: [%d, 2]}, {model: %s, layer_range: [%d, 2]}]\n"
CASES = {
    "linear": WEIGHTED % ("", ""),
    "linear gradient": "models:\n  - {model: a, parameters: {weight: [0.2, 0.9]}}\n"
    "  - {model: b, parameters: {weight: [{filter: mlp, value: 0.3}, {value: 0.7}]}}\nparameters: {normalize: false}\n",
    "linear union": WEIGHTED % ("", "") + "tokenizer: {source: union, pad_to_multiple_of: 64}\n",
    "task_arithmetic": BASE + WEIGHTED % ("", ""),
    "task_arithmetic normalized": BASE + WEIGHTED % ("", "") + "parameters: {normalize: true, lambda: 0.7}\n",
    "ties": BASE + WEIGHTED % (", density: 0.4", ", density: 0.7"),
    "ties sum": BASE + WEIGHTED % (", density: 0.4", ", density: 0.7") + "parameters: {normalize: false}\n",
    "ties rescaled": BASE + WEIGHTED % (", density: 0.4", "") + "parameters: {rescale: true, int8_mask: true}\n",
    "dare_linear whole": BASE + WEIGHTED % ("", ""),
    "dare_ties whole": BASE + WEIGHTED % ("", ""),
    "slerp": "base_model: a\nmodels:\n  - model: a\n  - model: b\nparameters: {t: 0.3}\n",
    "slerp slices": "base_model: a\n"
    + LAYERS % ("b", "a")
    + "parameters: {t: [{filter: mlp, value: [0, 1]}, {value: 0.4}]}\n",
    "nuslerp": WEIGHTED % ("", ""),
    "nuslerp base": BASE + WEIGHTED % ("", ""),
    "nuslerp rows": WEIGHTED % ("", "") + "parameters: {nuslerp_flatten: false}\n",
    "nuslerp columns": WEIGHTED % ("", "") + "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n",
    "multislerp two alike": "models:\n  - model: a\n  - model: b\nparameters: {weight: 1}\n",
    "karcher": ALL,
    "model_stock": BASE + ALL,
    "model_stock rows": BASE + ALL + "parameters: {filter_wise: true}\n",
    "sce": BASE + ALL + "parameters: {select_topk: 0.5}\n",
    "nearswap": "base_model: a\nmodels:\n  - model: a\n  - model: b\nparameters: {t: 0.01}\n",
    "arcee_fusion": "base_model: a\nmodels:\n  - model: a\n  - model: b\n",
    "breadcrumbs": BASE + WEIGHTED % (", density: 0.5, gamma: 0.1", ", density: 0.5, gamma: 0.1"),
    "breadcrumbs rescaled": BASE
    + WEIGHTED % (", density: 0.8, gamma: 0.3", ", density: 0.5, gamma: 0.1")
    + "parameters: {rescale: true}\n",
    "breadcrumbs_ties": BASE + WEIGHTED % (", density: 0.5, gamma: 0.1", ", density: 0.6, gamma: 0.1"),
    "linear gradients": "slices:\n"
    + TWO % ("a", 0, "b", 0)
    + "    parameters: {weight: [0.1, 0.6]}\n"
    + TWO % ("a", 1, "b", 1)
    + "    parameters: {weight: [0.1, 0.9]}\n",
    "slerp bases": "slices:\n"
    + TWO % ("a", 0, "b", 0)
    + "    base_model: a\n"
    + TWO % ("a", 0, "b", 0)
    + "    base_model: b\nparameters: {t: 0.3}\n",
    "task_arithmetic bases": BASE
    + "slices:\n"
    + TWO % ("a", 0, "base", 0)
    + TWO % ("a", 1, "b", 1)
    + "    base_model: b\nparameters: {weight: 0.7}\n",
    "linear module": "modules:\n  default:\n    models:\n      - {model: {model: {path: a}}, parameters: {weight: 1}}\n"
    "      - {model: b, parameters: {weight: 0.5}}\n    parameters: {normalize: false}\n",
    "passthrough": "slices:\n  - sources: [{model: a, layer_range: [0, 2]}]\n"
    "  - sources: [{model: b, layer_range: [1, 2], parameters: {scale: 0.5}}]\n",
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


@pytest.fixture(scope="module")
def theirs(models: Path) -> Path:
    """The folders that mergekit makes of all cases."""
    arguments: list[str | Path] = []
    for case, text in CASES.items():
        # mergekit takes a name for a hub id unless it is a path.
        placed = re.sub(r"(model: |base_model: |path: )(base|a|b|c)\b", lambda m: f"{m[1]}{models / m[2]}", text)
        recipe = models / f"{case}.yaml"
        recipe.write_text(f"merge_method: {case.partition(' ')[0]}\n{placed}dtype: float32\n")
        arguments += [recipe, models / f"{case} theirs"]
    script = Path(__file__).parents[2] / "bench" / "mergekit_peer.py"
    assert PEER is not None
    done = subprocess.run([PEER, script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return models


@pytest.mark.parametrize("case", CASES)
def test_mergekit_makes_the_same(theirs: Path, case: str) -> None:
    api.merge(read(theirs / f"{case}.yaml"), theirs / f"{case} ours")
    ours, other = (load_file(theirs / f"{case} {whose}" / "model.safetensors") for whose in ("ours", "theirs"))
    assert ours.keys() == other.keys()
    # Their Karcher mean stops at steps of 1e-5.
    loose = 1e-5 if case == "karcher" else 2e-6
    for name in ours:
        assert ours[name].shape == other[name].shape
        if case == "arcee_fusion":  # an importance at the threshold itself is another number in float32, as theirs is
            assert int(((ours[name] - other[name]).abs() > loose).sum()) <= 1
            continue
        np.testing.assert_allclose(ours[name], other[name], rtol=2e-5, atol=loose, err_msg=name)
    configs = [json.loads((theirs / f"{case} {whose}" / "config.json").read_text()) for whose in ("ours", "theirs")]
    for key in ("num_hidden_layers", "vocab_size", "hidden_size"):
        assert configs[0][key] == configs[1][key]


def test_other_documents_than_the_recorded_ones_resolve_alike(tmp_path: Path) -> None:
    assert PEER is not None
    for name in ("base", "a", "b"):
        folders.write(tmp_path / name, folders.weights(0), config=mergekit_grid.HEADS)
    script = Path(mergekit_grid.__file__)
    done = subprocess.run([PEER, script, tmp_path / "grid.json", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for row in json.loads((tmp_path / "grid.json").read_text())["grid"]:
        check(row, tmp_path)
