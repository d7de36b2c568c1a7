"""Steering together with what else an engine may do: adapters, and a model cut over two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
from engine_process import (
    RANK,
    Engines,
    Failed,
    difference,
    random_vectors,
    reference,
    save_adapter,
    save_model,
    write_settings,
)
from test_engine import one_fails
from test_every_decoder import ALL
from test_parity import CLOSE, COMPOSITIONS
from transformers import AutoModelForCausalLM


@pytest.mark.on_v2
def test_adapters_and_steering_act_together(engines: Engines, tmp_path: Path) -> None:
    """Batches are all of an adapter or all without: on the CPU, vLLM 0.32 applies an adapter to a whole batch.

    So it does without the plugin, where it also fails over log-probabilities of prompts beside adapters: only those of
    responses are compared.
    """
    folder, vectors = save_model(tmp_path, "llama"), random_vectors(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    merged = AutoModelForCausalLM.from_pretrained(folder).eval()
    save_adapter(merged, tmp_path / "adapter")
    engines.start(folder, write_settings(tmp_path, vectors), enable_lora=True, max_lora_rank=RANK)
    prompts = pico.sequences(len(COMPOSITIONS), 5, 30, seed=6)
    for own, other, more in ((merged, plain, {"lora": str(tmp_path / "adapter")}), (plain, merged, {})):
        jobs: list[dict[str, Any]] = [
            {"ids": ids, "steer": c, "unscored": True, **more} for ids, c in zip(prompts, COMPOSITIONS, strict=True)
        ]
        for job, answer in zip(jobs, engines.generate(jobs), strict=True):
            apart = {}
            for model in (own, other):
                expected = reference(model, job["ids"], answer["ids"], job["steer"], vectors)[len(job["ids"]) - 1 :]
                apart[model] = max(abs(a - b) for a, b in zip(answer["scores"], expected, strict=True))
            assert apart[own] < CLOSE, job["steer"]
            assert apart[other] > 10 * CLOSE, job["steer"]


@pytest.fixture
def two(engines: Engines, engine_environment: dict[str, str], tmp_path: Path) -> Any:
    """A process whose engine has two workers, one on each of two cores, which talk over the loopback interface.

    The size of the cache of keys and values is left to vLLM: with a size that is set, the CPU worker of 0.32 skips the
    warm-up, in which its V1 runner makes the buffer between the parts of a pipeline, and then fails without the plugin
    too.
    """
    several = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_KVCACHE_SPACE": None}
    process = Engines(True, tmp_path / "two.txt", **{**engine_environment, **several})
    yield process
    process.close()


@pytest.mark.parametrize("how", ["tensor", *(["pipeline"] if ALL else [])])
def test_a_model_cut_over_two_processes_is_steered_as_a_whole_one_and_faults_end_one_request_or_the_engine(
    how: str, two: Engines, tmp_path: Path
) -> None:
    """Cut across its matrices, or with the first two blocks in one process and the last two in the other."""
    folder, vectors = save_model(tmp_path, "llama"), random_vectors(tmp_path)
    more: dict[str, Any] = {f"{how}_parallel_size": 2, "gpu_memory_utilization": 0.06, "num_gpu_blocks_override": 200}
    two.start(folder, write_settings(tmp_path, vectors), distributed_executor_backend="mp", **more)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = pico.sequences(len(COMPOSITIONS), 5, 40, seed=3)
    jobs = [{"ids": ids, "steer": c} for ids, c in zip(prompts, COMPOSITIONS, strict=True)]
    for job, answer in zip(jobs, two.generate(jobs), strict=True):
        expected = reference(model, job["ids"], answer["ids"], job["steer"], vectors)
        assert difference(answer, expected) < CLOSE, job["steer"]
        if job["steer"] not in (None, "0*warm"):
            assert answer["receipt"]["prompt_tokens"] == len(job["ids"])
    one_fails(two, vectors, model)

    # A fault of one worker alone, of which vLLM would not hear: it must end the engine, neither steer half nor hang.
    steps = [{"add": jobs[0], "id": "before"}, {"step": 2}, {"break": 1}]
    steps += [{"add": {**jobs[1], "steer": "1.5*warm"}, "id": "a"}, {"step": 20}]
    with pytest.raises(Failed):
        two.call("script", steps=steps)
    assert "can't be steered in this worker, which ends" in (tmp_path / "two.txt").read_text()
