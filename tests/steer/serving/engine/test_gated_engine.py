"""Conditions under everything that an engine does to requests decide as the hooked model does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from engine_process import Engines, difference, random_probes, save_model, write_settings
from test_parity import CLOSE
from transformers import AutoModelForCausalLM

from probes.steered import steered
from vectors.expression import parse
from vectors.probe import Probe, Readout
from vectors.resolve import load

TEXTS = [
    "2*calm@when:anger>0",
    "2*calm@while:anger>0",
    None,
    "calm[3]@when:anger<=0 + 2*formal@while:joy>0",
    "warm@prompt + 2*calm@while:anger>0@while:joy<0.5",
    "ablate(calm)@first:3@while:anger>0 + 2*calm@after:2@when:joy>0",
    "2*calm@first:4@while:anger>0",
    "0.5*warm + 3*calm@when:anger>0 - formal@while:warm[0]>-0.2",
]


@pytest.fixture(scope="module")
def sources(folder: Path, vectors: dict[str, Path]) -> dict[str, Path]:
    """The vectors and two probes."""
    return {**vectors, **random_probes(folder)}


@pytest.fixture(scope="module")
def gated(folder: Path, sources: dict[str, Path]) -> Path:
    """Settings with gates at the layers of the two probes."""
    (folder / "gated").mkdir(exist_ok=True)
    return write_settings(folder / "gated", sources)


def prompts(count: int, low: int = 5, high: int = 40) -> list[list[int]]:
    return pico.sequences(count, low, high, seed=3)


def jobs_of(ids: Sequence[list[int]], texts: Sequence[str | None] = TEXTS, **more: Any) -> list[dict[str, Any]]:
    return [{"ids": each, "steer": texts[i % len(texts)], "tokens": 8, **more} for i, each in enumerate(ids)]


def require_right(
    answers: Sequence[Mapping[str, Any]], jobs: Sequence[Mapping[str, Any]], model: Any, sources: Mapping[str, Path]
) -> list[dict[str, Any]]:
    """Every answer, decision, and number of tokens is that of the hooked model; return the gates of all receipts."""
    loaded = {name: load(path) for name, path in sources.items()}
    gates = []
    for job, answer in zip(jobs, answers, strict=True):
        assert "error" not in answer, answer
        prompt, whole = len(job["ids"]), torch.tensor([[*job["ids"], *answer["ids"]]])
        with torch.no_grad():
            if job["steer"] is None:
                logits, decided = model(input_ids=whole, use_cache=False).logits, []
            else:
                with steered(model, job["steer"], vectors=loaded, prompt_length=prompt) as decisions:
                    logits = model(input_ids=whole, use_cache=False).logits
                decided = decisions.of_row(0, len(answer["ids"]))
        scores = logits[0, :-1].double().log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0].tolist()
        if "prompt_scores" in answer:
            assert difference(answer, scores) < CLOSE, job["steer"]
        assert max(abs(a - b) for a, b in zip(answer["scores"], scores[prompt - 1 :], strict=True)) < CLOSE, job
        found = {gate["condition"]: gate for gate in (answer["receipt"] or {}).get("gates", ())}
        assert found.keys() == {each.condition for each in decided}
        for each in decided:
            gate = found[each.condition]
            assert (gate["held"], gate["read"]) == (each.held, each.read), (job["steer"], gate, each)
            if gate["value"] is None:
                assert math.isnan(each.value)
            else:
                assert gate["value"] == pytest.approx(each.value, abs=1e-3)
        gates += list(found.values())
    return gates


@pytest.mark.on_v2
def test_decisions_and_answers_are_those_of_the_hooked_model_in_batches_of_1_7_and_64(
    engines: Engines, model_path: Path, gated: Path, model: Any, sources: dict[str, Path], runner: str
) -> None:
    engines.start(model_path, gated)
    read = []
    for count in (1, 7, 64) if runner == "v1" or torch.cuda.is_available() else (7,):  # Triton's interpreter is slow
        jobs = jobs_of(prompts(count))
        read += require_right(engines.generate(jobs), jobs, model, sources)
    once = [gate["held"] for gate in read if gate["condition"].startswith("@when")]
    assert 0 < sum(once) < len(once), "both decisions are made"


def test_a_response_shares_its_prompt_with_plain_requests_and_is_never_taken_for_a_plain_prompt(
    engines: Engines, model_path: Path, gated: Path, model: Any, sources: dict[str, Path]
) -> None:
    """Prefix hits of every length in blocks: the decision is that of the hooked model, whatever is cached."""
    if engines.running != (model_path, gated, {}):
        engines.start(model_path, gated)
    for number, text in enumerate([TEXTS[i] for i in (0, 1, 2, 4)]):
        for blocks in (0, 1, 2, 3):
            seed = 100 + 10 * number + blocks
            (ids,) = pico.sequences(1, 110, 110, seed=seed)
            (other,) = pico.sequences(1, 110, 110, seed=seed + 1000)
            before = [*ids[: 32 * blocks], *other[32 * blocks :]]
            engines.generate([{"ids": before, "unscored": True}])
            job = {"ids": ids, "steer": text, "tokens": 22, "unscored": True}
            answer = engines.generate([job])[0]
            own_prompt = text is not None and "@prompt" in text
            assert answer["cached"] == (0 if own_prompt else 32 * blocks)
            require_right([answer], [job], model, sources)
            again = engines.generate([job])[0]
            assert (again["cached"], again["ids"]) == (96, answer["ids"])
            require_right([again], [job], model, sources)
            # The response is now part of a prompt: of a plain request, and of one that is gated itself.
            longer = [*ids, *answer["ids"]]
            for steer in (None, text, "2*calm@when:joy<=0"):
                job = {"ids": longer, "steer": steer, "tokens": 4, "unscored": True}
                answers = engines.generate([job])
                if steer is None:
                    expected = 32 * blocks if own_prompt else 128 if text is None else 96
                    assert answers[0]["cached"] == expected, "no block of a gated response is taken for a plain one"
                require_right(answers, [job], model, sources)


def test_plain_requests_beside_gated_ones_are_those_of_stock_vllm_to_the_bit(
    engines: Engines, stock: Engines, model_path: Path, gated: Path
) -> None:
    if engines.running != (model_path, gated, {}):
        engines.start(model_path, gated)
    stock.start(model_path)
    plain = [{"ids": ids, "tokens": 12} for ids in prompts(16)]
    mixed = [{**job, "steer": TEXTS[i % 2] if i % 2 else None} for i, job in enumerate(plain)]
    for found, expected, job in zip(engines.generate(mixed), stock.generate(plain), mixed, strict=True):
        if job["steer"] is None:
            assert (found["scores"], found["prompt_scores"]) == (expected["scores"], expected["prompt_scores"])


def test_what_cannot_be_decided_is_refused_with_its_reason(engines: Engines, model_path: Path, gated: Path) -> None:
    if engines.running != (model_path, gated, {}):
        engines.start(model_path, gated)
    bad = {
        "calm@when:nobody>0": "no vector is called 'nobody'; loaded: anger, calm, formal, joy, warm",
        "warm@when:anger>0": "reads layer 1, and warm@when:anger>0 steers from layer 0",
        "calm@when:calm>0": "reads layer 2",
        "2*anger": "anger is a probe",
        "calm@when:anger>0@while:joy>0@when:joy>0": "--steer-gates 3",
        "calm[3]@when:calm[2]>0": "--steer-gate-layers 0-2",
        "calm@prompt@when:anger>0": "can only act on the response",
    }
    ids = prompts(1)[0]
    for text, answer in zip(bad, engines.generate([{"ids": ids, "steer": text} for text in bad]), strict=True):
        assert bad[text] in answer.get("error", ""), answer
    assert len(parse(next(iter(bad))).conditions) == 1


@pytest.fixture
def small(engines: Engines, model_path: Path, gated: Path) -> Engines:
    """An engine that computes at most 24 tokens in a step, and has few blocks for keys and values."""
    arguments = {
        "max_num_batched_tokens": 24,
        "max_num_seqs": 8,
        "enable_chunked_prefill": True,
        "num_gpu_blocks_override": 14,
    }
    if engines.running != (model_path, gated, arguments):
        engines.start(model_path, gated, **arguments)
    return engines


def test_any_split_of_a_chunked_prompt_decides_alike(small: Engines, model: Any, sources: dict[str, Path]) -> None:
    for first in range(1, 24):
        texts = [TEXTS[first % 2], TEXTS[3], TEXTS[5]]
        jobs = jobs_of(pico.sequences(3, 20, 20, seed=first), texts, unscored=True)
        jobs.insert(0, {"ids": prompts(1, first, first)[0], "steer": None, "tokens": 3, "unscored": True})
        require_right(small.generate(jobs), jobs, model, sources)


@pytest.mark.on_v2
def test_a_preemption_after_any_step_changes_no_decision_and_counts_no_token_twice(
    small: Engines, model: Any, sources: dict[str, Path], runner: str
) -> None:
    ids = [*pico.sequences(1, 60, 60, seed=31), *pico.sequences(4, 8, 8, seed=32)]
    jobs = jobs_of(ids, [TEXTS[i] for i in (0, 1, 3, 5, 7)], unscored=True)
    before = small.call("state")["preempted"]
    chosen = range(1, 9) if runner == "v1" or torch.cuda.is_available() else (2, 5)
    for step in chosen:
        steps: list[dict[str, Any]] = [{"add": job, "id": str(i)} for i, job in enumerate(jobs)]
        answers = small.call("script", steps=[*steps, {"step": step}, {"preempt": True}])["answers"]
        require_right([answers[str(i)] for i in range(len(jobs))], jobs, model, sources)
    assert small.call("state")["preempted"] >= before + 2 * len(chosen) - 2


def test_a_preempted_request_finds_its_response_cached_and_its_decision_where_it_was(
    small: Engines, model: Any, sources: dict[str, Path]
) -> None:
    """Few blocks: requests preempt one another, and come back with hits beyond their last prompt token."""
    before = small.call("state")["preempted"]
    jobs = jobs_of(pico.sequences(6, 30, 60, seed=8), [TEXTS[i] for i in (0, 1, 3, 5, 7, 2)], unscored=True)
    jobs = [{**job, "tokens": 60} for job in jobs]
    require_right(small.generate(jobs), jobs, model, sources)
    assert small.call("state")["preempted"] > before
    small.generate([{"ids": [5, 6, 7]}])  # the worker hears of the end of a request with the next step
    assert small.call("state")["worker"]["gated"] == 0


def test_on_a_planted_model_the_rates_of_gates_are_exact(
    engines: Engines, tmp_path: Path, vectors: dict[str, Path]
) -> None:
    """Every second token of the vocabulary is planted with a direction, which a probe reads."""
    folder = save_model(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    unit = torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(2)), dim=0)
    with torch.no_grad():
        model.model.embed_tokens.weight[::2] += 300 * unit
        model.model.embed_tokens.weight[1::2] -= 300 * unit
    model.save_pretrained(folder)
    files = {**vectors, "even": tmp_path / "even.safetensors"}
    Probe({1: Readout(unit, 0.0)}).save(files["even"])
    engines.start(folder, write_settings(tmp_path, files))
    ids = prompts(48)
    texts = ["0.01*calm@when:even>0", "0.01*calm@while:even>0"]
    jobs = [{**job, "seed": i} for i, job in enumerate(jobs_of(ids, texts, temperature=2.0, unscored=True))]
    answers = engines.generate(jobs)
    for each, answer, text in zip(ids, answers, texts * 24, strict=True):
        (gate,) = answer["receipt"]["gates"]
        (term,) = answer["receipt"]["terms"]
        even = [token % 2 == 0 for token in ([each[-1]] if "@when" in text else answer["ids"][:-1])]
        assert (gate["held"], gate["read"]) == (sum(even), len(even))
        assert term["response_tokens"] == (7 * sum(even) if "@when" in text else sum(even))
    assert len({answer["receipt"]["gates"][0]["held"] for answer in answers[1::2]}) > 2
