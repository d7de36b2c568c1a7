"""The same, compiled, and the compile cache, which must never give a run the graph of another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pico
import pytest
from engine_process import (
    Engines,
    difference,
    random_probes,
    random_vectors,
    reference,
    save_model,
    write_settings,
)
from test_every_decoder import ALL
from test_gated_engine import jobs_of, require_right
from test_parity import CLOSE, COMPOSITIONS, STEPPED, STEPS
from test_sectioned_engine import MARKERS
from test_sectioned_engine import jobs_of as sectioned_jobs_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from probes.models.markers import markers_of
from vectors import references


def check_all(engines: Engines, path: Path, vectors: Mapping[str, Path]) -> None:
    """Every composition in one batch against the hooked model."""
    compositions = [*COMPOSITIONS, *STEPPED]
    prompts = pico.sequences(len(compositions), 5, 40, seed=3)
    jobs = [{"ids": ids, "steer": c} for ids, c in zip(prompts, compositions, strict=True)]
    answers = engines.generate(jobs)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype="float32").eval()
    for job, answer in zip(jobs, answers, strict=True):
        expected = reference(model, job["ids"], answer["ids"], job["steer"], vectors)
        assert difference(answer, expected) < CLOSE, job["steer"]
        if job["steer"] not in (None, "0*warm"):
            plain = reference(model, job["ids"], answer["ids"], None, {})
            assert difference(answer, plain) > 10 * CLOSE, job["steer"]


@pytest.mark.parametrize("name", ["qwen2", *(["gemma3", "qwen3", "mistral", "gpt2"] if ALL else [])])
def test_the_compiled_graph_equals_the_hooked_model_on(name: str, engines: Engines, tmp_path: Path) -> None:
    folder, vectors = save_model(tmp_path, name), random_vectors(tmp_path, norm=30.0 if name == "gemma3" else 3.0)
    gated = name == "qwen2"  # one of the graphs has gates
    sources = {**vectors, **(random_probes(tmp_path) if gated else {})}
    more = {"markers": MARKERS, "gates": 3} if gated else {}
    engines.start(folder, write_settings(tmp_path, sources, steps=STEPS, **more), enforce_eager=False)
    check_all(engines, folder, vectors)
    if gated:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        model.steer_markers = markers_of(pico.tokenizer(), MARKERS)
        for count in (1, 7, 24):
            jobs = [*jobs_of(pico.sequences(count, 5, 40, seed=3)), *sectioned_jobs_of(count, count)]
            require_right(engines.generate(jobs), jobs, model, sources)


@pytest.mark.skipif(not ALL, reason="minutes: make parity")
def test_the_compiled_bundled_model_equals_the_hooked_one(engines: Engines, tmp_path: Path) -> None:
    """A Llama in its real widths; its first four blocks, as all thirty are alike."""
    path = references.resolve("smollm2").path
    model = AutoModelForCausalLM.from_pretrained(path, num_hidden_layers=4, dtype="float32")
    model.save_pretrained(tmp_path / "blocks")
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "blocks")
    vectors = random_vectors(tmp_path, 576, norm=6.0)
    engines.start(tmp_path / "blocks", write_settings(tmp_path, vectors, steps=STEPS), enforce_eager=False)
    check_all(engines, tmp_path / "blocks", vectors)


def compiled(cache: Path) -> tuple[set[str], set[str]]:
    """The keys of vLLM's cache, and all machine code in it."""
    folder = cache / "torch_compile_cache" / "torch_aot_compile"
    return {path.name for path in folder.glob("*")}, {path.name for path in folder.rglob("*.so")}


def test_runs_that_share_a_compile_cache_never_share_a_wrong_graph(
    engines: Engines, stock: Engines, compile_cache: Path, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, "llama", num_hidden_layers=1)
    vectors = random_vectors(tmp_path, layers=1, everywhere=True)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = pico.sequences(1, 12, 12)[0]
    seen = compiled(compile_cache)[0]

    def run(plugin: bool, steer: str | None, fresh: bool, **sizes: Any) -> set[str]:
        """Start, compare with the hooked model, and see whether the run had a key of its own."""
        process, settings = (engines, write_settings(tmp_path, vectors, **sizes)) if plugin else (stock, None)
        process.start(folder, settings, enforce_eager=False, max_num_seqs=4)
        for expression in (None, steer):
            answer = process.generate([{"ids": ids, "steer": expression}])[0]
            assert difference(answer, reference(model, ids, answer["ids"], expression, vectors)) < CLOSE
        keys, code = compiled(compile_cache)
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
