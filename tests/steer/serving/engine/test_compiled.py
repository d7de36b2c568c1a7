"""The same, compiled, and the compile cache, which must never give a run the graph of another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pico
import pytest
from engine_process import Engines, difference, random_vectors, reference, save_model, write_settings
from test_parity import CLOSE, COMPOSITIONS
from transformers import AutoModelForCausalLM

from vectors import references


def check_all(engines: Engines, path: Path, vectors: Mapping[str, Path]) -> None:
    """Every composition in one batch against the hooked model."""
    prompts = pico.sequences(len(COMPOSITIONS), 5, 40, seed=3)
    jobs = [{"ids": ids, "steer": c} for ids, c in zip(prompts, COMPOSITIONS, strict=True)]
    answers = engines.generate(jobs)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype="float32").eval()
    for job, answer in zip(jobs, answers, strict=True):
        expected = reference(model, job["ids"], answer["ids"], job["steer"], vectors)
        assert difference(answer, expected) < CLOSE, job["steer"]
        if job["steer"] not in (None, "0*warm"):
            plain = reference(model, job["ids"], answer["ids"], None, {})
            assert difference(answer, plain) > 10 * CLOSE, job["steer"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_the_compiled_graph_equals_the_hooked_model_on(name: str, engines: Engines, tmp_path: Path) -> None:
    folder, vectors = save_model(tmp_path, name), random_vectors(tmp_path, norm=30.0 if name == "gemma3" else 3.0)
    engines.start(folder, write_settings(tmp_path, vectors), enforce_eager=False)
    check_all(engines, folder, vectors)


def test_the_compiled_bundled_model_equals_the_hooked_one(engines: Engines, tmp_path: Path) -> None:
    path = references.resolve("smollm2").path
    vectors = random_vectors(tmp_path, 576, 30, norm=6.0)
    engines.start(path, write_settings(tmp_path, vectors), enforce_eager=False)
    check_all(engines, path, vectors)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def pair(cache: Path, tmp_path: Path) -> Iterator[dict[bool, Engines]]:
    """Engines without and with the plugin that share a cache."""
    made = {plugin: Engines(plugin, tmp_path / f"{plugin}.txt", VLLM_CACHE_ROOT=str(cache)) for plugin in (False, True)}
    yield made
    for process in made.values():
        process.close()


def kept(cache: Path) -> tuple[set[str], set[str]]:
    """The keys of vLLM's cache, and all machine code in it."""
    folder = cache / "torch_compile_cache" / "torch_aot_compile"
    return {path.name for path in folder.iterdir()}, {path.name for path in folder.rglob("*.so")}


def test_runs_that_share_a_compile_cache_never_share_a_wrong_graph(
    pair: dict[bool, Engines], cache: Path, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, "llama", num_hidden_layers=2)
    vectors = random_vectors(tmp_path, layers=2, everywhere=True)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = pico.sequences(1, 12, 12)[0]
    seen: set[str] = set()

    def run(plugin: bool, steer: str | None, fresh: bool, **sizes: Any) -> set[str]:
        """Start, compare with the hooked model, and see whether the run had a key of its own."""
        settings = write_settings(tmp_path, vectors, **sizes) if plugin else None
        pair[plugin].start(folder, settings, enforce_eager=False, max_num_seqs=4)
        for expression in (None, steer):
            answer = pair[plugin].generate([{"ids": ids, "steer": expression}])[0]
            assert difference(answer, reference(model, ids, answer["ids"], expression, vectors)) < CLOSE
        keys, code = kept(cache)
        assert len(keys - seen) == (1 if fresh else 0), (plugin, sizes)
        seen.update(keys)
        return code

    run(False, None, True)
    code = run(True, "2*warm + ablate(calm)", True, rows=5, directions=1)
    # What a row holds is data, so other vectors, arms and limits need no other graph; nor does the same again.
    assert run(True, "2*warm + ablate(calm)", False, rows=5, directions=1, arms={"a": "warm"}) == code
    run(True, "2*warm + ablate(calm) + ablate(formal)", True, rows=5, directions=2)
    run(True, "2*warm", True, rows=7, directions=1)
    run(False, None, False)
