"""Sections hold as in the hooked model under everything that an engine does to requests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from engine_process import Engines, random_probes, write_settings
from test_gated_engine import require_right
from transformers import AutoModelForCausalLM

from probes.models.markers import Markers, markers_of

MARKERS = {"thinking": ["ab", "c"], "tools": ["d", "ee"]}  # two of them are two tokens in pico's tokenizer
SECTIONS = ["@answer", "@thinking", "@outside-tools"]
LETTERS = pico.tokenizer().convert_tokens_to_ids(list("abcdef"))
TEXTS = [
    "2*calm@answer",
    "2*calm@thinking - 2*formal@outside-tools",
    None,
    "warm@first:6@answer@outside-tools + 2*calm[3]@response",
    "2*calm@thinking@while:anger>0 + 2*calm[3]@when:joy>0",
    "rotate(calm, 40)@outside-tools@while:anger<=0.2",
    "warm@prompt + ablate(calm)@after:3@thinking",
    "2*calm@when:anger>0",
]


@pytest.fixture(scope="module")
def markers() -> Markers:
    return markers_of(pico.tokenizer(), MARKERS)


@pytest.fixture(scope="module")
def thinker(model_path: Path, markers: Markers) -> Any:
    """The hooked model, which has the markers."""
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    model.steer_markers = markers
    return model


@pytest.fixture(scope="module")
def sources(folder: Path, vectors: dict[str, Path]) -> dict[str, Path]:
    return {**vectors, **random_probes(folder)}


@pytest.fixture(scope="module")
def sectioned(folder: Path, sources: dict[str, Path]) -> Path:
    (folder / "sectioned").mkdir(exist_ok=True)
    return write_settings(folder / "sectioned", sources, markers=MARKERS, steps=1, gates=3)


def jobs_of(count: int, seed: int = 0, low: int = 5, high: int = 40, **more: Any) -> list[dict[str, Any]]:
    """Prompts and responses of few letters, so that markers are everywhere; some prompts end inside of something."""
    chance = random.Random(seed)
    jobs = []
    for i in range(count):
        ids = chance.choices(LETTERS, k=chance.randint(low, high))
        ids = [*ids, LETTERS[0]] if i % 3 == 1 else ids  # half a marker
        text = TEXTS[i % len(TEXTS)]
        jobs.append({"ids": ids, "steer": text, "tokens": 14, "allowed": LETTERS, "temperature": 2.0} | more)
    return jobs


@pytest.mark.on_v2
def test_sections_hold_as_in_the_hooked_model_beside_other_conditions_and_scopes(
    engines: Engines, model_path: Path, sectioned: Path, thinker: Any, sources: dict[str, Path], runner: str
) -> None:
    engines.start(model_path, sectioned)
    held: dict[str, list[tuple[int, int]]] = {}
    for count in (1, 32) if runner == "v1" or torch.cuda.is_available() else (7,):
        jobs = jobs_of(count, count)
        for gate in require_right(engines.generate(jobs), jobs, thinker, sources):
            held.setdefault(gate["condition"], []).append((gate["held"], gate["read"]))
    changing = [section for section in SECTIONS if any(0 < count < read for count, read in held[section])]
    assert changing == SECTIONS if sum(map(len, held.values())) > 50 else changing, "it begins or ends in a response"


def test_a_prefix_in_the_cache_is_not_forgotten_whether_it_ends_inside_or_in_half_a_marker(
    engines: Engines, model_path: Path, sectioned: Path, thinker: Any, sources: dict[str, Path]
) -> None:
    if engines.running != (model_path, sectioned, {}):
        engines.start(model_path, sectioned)
    a, b, c, d, _, f = LETTERS
    for number, end in enumerate(([a, b, f], [b, f, a], [d, a, b], [c, c, c])):  # the last ids of a block of 32
        ids = [*jobs_of(1, number, 29, 29)[0]["ids"], *end, *([b, f, f] if end[-1] == a else [f, f, f])]
        job = {**jobs_of(1, number)[0], "ids": ids, "unscored": True, "tokens": 30}
        engines.generate([{"ids": [*ids[:32], f, c, f], "unscored": True}])
        for text in TEXTS[:2]:
            (answer,) = engines.generate([{**job, "steer": text}])
            assert answer["cached"] == 32
            require_right([answer], [{**job, "steer": text}], thinker, sources)
            longer = {**job, "steer": text, "ids": [*ids, *answer["ids"]]}
            require_right(engines.generate([longer]), [longer], thinker, sources)


@pytest.fixture
def small(engines: Engines, model_path: Path, sectioned: Path) -> Engines:
    """An engine that computes at most 24 tokens in a step, and has few blocks for keys and values."""
    arguments = {
        "max_num_batched_tokens": 24,
        "max_num_seqs": 8,
        "enable_chunked_prefill": True,
        "num_gpu_blocks_override": 14,
    }
    if engines.running != (model_path, sectioned, arguments):
        engines.start(model_path, sectioned, **arguments)
    return engines


def test_any_split_of_a_chunked_prompt_changes_nothing(small: Engines, thinker: Any, sources: dict[str, Path]) -> None:
    for first in range(1, 24, 4):
        jobs = jobs_of(4, first, 20, 20, unscored=True, tokens=8)
        jobs.insert(0, {"ids": pico.sequences(1, first, first)[0], "steer": None, "tokens": 3, "unscored": True})
        require_right(small.generate(jobs), jobs, thinker, sources)


@pytest.mark.on_v2
def test_a_preempted_request_comes_back_to_where_it_was(
    small: Engines, thinker: Any, sources: dict[str, Path], runner: str
) -> None:
    before = small.call("state")["preempted"]
    jobs = [*jobs_of(2, 31, 40, 40, unscored=True), *jobs_of(7, 32, 8, 12, unscored=True)[3:]]
    chosen = range(1, 13, 4) if runner == "v1" or torch.cuda.is_available() else (5,)
    for step in chosen:
        steps: list[dict[str, Any]] = [{"add": job, "id": str(i)} for i, job in enumerate(jobs)]
        answers = small.call("script", steps=[*steps, {"step": step}, {"preempt": True}])["answers"]
        require_right([answers[str(i)] for i in range(len(jobs))], jobs, thinker, sources)
    assert small.call("state")["preempted"] >= before + 2 * len(chosen)


def test_requests_that_preempt_one_another_find_their_responses_cached(
    small: Engines, thinker: Any, sources: dict[str, Path]
) -> None:
    before = small.call("state")["preempted"]
    jobs = jobs_of(6, 8, 30, 60, unscored=True, tokens=60)
    require_right(small.generate(jobs), jobs, thinker, sources)
    assert small.call("state")["preempted"] > before


def test_a_model_without_markers_refuses_with_the_option_that_gives_them(
    engines: Engines, model_path: Path, folder: Path, sources: dict[str, Path]
) -> None:
    (folder / "unmarked").mkdir(exist_ok=True)
    engines.start(model_path, write_settings(folder / "unmarked", sources))
    (answer,) = engines.generate([{"ids": [5, 6, 7], "steer": "calm@answer"}])
    assert "@answer needs the model's markers of thinking" in answer["error"]
    assert "--steer-markers thinking=BEGIN,END" in answer["error"]
