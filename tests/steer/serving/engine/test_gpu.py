"""What only a GPU shows: the half-precision dtypes that are served there, under the CUDA graphs that vLLM starts with.

The other tests of engines run there too, all on both runners (`-m v2` for one). To repeat them under CUDA graphs:

    STEER_TEST_GRAPHS=FULL_AND_PIECEWISE pytest tests/steer/serving/engine
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from engine_process import Engines, random_vectors, reference, save_model, write_settings
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    "attention_backend": None,
    "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"},
}


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_plain_requests_beside_steered_and_overflowing_ones_are_what_they_are_without_them(
    dtype: str, graphs: bool, engines: Engines, stock: Engines, tmp_path: Path
) -> None:
    """Bit for bit as beside plain ones in the same engine; eager also as in stock vLLM.

    Compiled, stock vLLM rounds elsewhere: it compiles another graph.
    """
    folder, vectors = save_model(tmp_path, "llama", num_key_value_heads=4), random_vectors(tmp_path)
    arguments = {"dtype": dtype, "enable_prefix_caching": False, "num_gpu_blocks_override": 60, **GRAPHS}
    if not graphs:
        arguments |= {"enforce_eager": True, "compilation_config": None}
    prompts = pico.sequences(6, 10, 30, seed=9)
    plain = [{"ids": ids, "tokens": 24} for ids in prompts]
    wild = ["5e10*warm", "ablate(warm, 1e11)", "clamp(warm, -5e10)@response", "2*warm", "ablate(calm)", "-9e9*formal"]
    engines.start(folder, write_settings(tmp_path, vectors), **arguments)
    # The same shapes of batches: vLLM's kernels may round differently for another number of tokens.
    mixed = [job for pair in zip(plain, plain, strict=True) for job in pair]
    expected = engines.generate(mixed)[::2]
    for _ in range(2):
        steered = [{**job, "steer": steer} for job, steer in zip(plain, wild, strict=True)]
        answers = engines.generate([job for pair in zip(plain, steered, strict=True) for job in pair])[::2]
        require_equal(answers, expected)
    require_equal(engines.generate(mixed)[::2], expected)
    if not graphs:
        stock.start(folder, **arguments)
        require_equal(stock.generate(mixed)[::2], expected)


def require_equal(answers: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]) -> None:
    """Tokens and log-probabilities, bit for bit."""
    for found, without in zip(answers, expected, strict=True):
        assert (found["ids"], found["scores"]) == (without["ids"], without["scores"])
        assert found["prompt_scores"] == without["prompt_scores"]


def test_a_steered_bfloat16_model_under_cuda_graphs_is_as_near_to_float32_as_the_plain_one(
    engines: Engines, tmp_path: Path
) -> None:
    """Rounding to bfloat16 moves a plain answer by so much; steering may not add to it more than its own rounding."""
    folder, vectors = save_model(tmp_path, "llama", num_key_value_heads=4), random_vectors(tmp_path)
    engines.start(folder, write_settings(tmp_path, vectors), dtype="bfloat16", **GRAPHS)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="float32").eval()
    compositions = [None, "warm", "2*warm", "ablate(warm)", "clamp(calm, 2)", "1.2*warm - 0.4*formal + ablate(calm)"]
    apart: dict[str | None, float] = {}
    for composition in compositions:
        jobs = [{"ids": ids, "steer": composition, "tokens": 16} for ids in pico.sequences(16, 10, 40, seed=4)]
        differences = []
        for job, answer in zip(jobs, engines.generate(jobs), strict=True):
            expected = reference(model, job["ids"], answer["ids"], composition, vectors)
            found = [*answer["prompt_scores"], *answer["scores"]]
            differences += [abs(a - b) for a, b in zip(found, expected, strict=True)]
        apart[composition] = sum(differences) / len(differences)
    print({str(composition): round(value, 5) for composition, value in apart.items()})
    assert max(apart.values()) < 2 * apart[None], apart
