"""Steering under everything that an engine does to requests: batches, caches, chunks, preemption, aborts, few rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pico
import pytest
from engine_process import Engines, Failed, difference, reference, write_settings
from test_parity import CLOSE, COMPOSITIONS

from vectors.steering import SteeringVector


def distinct(count: int) -> list[str | None]:
    """Compositions that are all different, some of them none."""
    chosen = random.Random(7)
    found: list[str | None] = []
    for i in range(count):
        if i % 8 == 7:
            found.append(None)
            continue
        a, b, c = (round(chosen.uniform(0.1, 2), 3) for _ in range(3))
        scope, sign = chosen.choice(["", "@prompt", "@response", "@after:2"]), chosen.choice("+-")
        last = chosen.choice([f"{c}*calm", "ablate(calm)", f"clamp(calm, {c})"])
        found.append(f"{a}*warm{scope} {sign} {b}*formal + {last}")
    return found


def test_a_mixed_batch_equals_its_requests_one_by_one_and_plain_ones_equal_stock_vllm(
    engines: Engines, stock: Engines, model_path: Path, settings: Path, vectors: dict[str, Path], model: Any
) -> None:
    jobs = [{"ids": ids, "steer": c} for ids, c in zip(pico.sequences(32, 4, 30), distinct(32), strict=True)]
    engines.start(model_path, settings, enable_prefix_caching=False)
    together, alone = engines.generate(jobs), engines.generate(jobs, together=False)
    stock.start(model_path, enable_prefix_caching=False)
    plain = stock.generate([{**job, "steer": None} for job in jobs])
    for job, a, b, without in zip(jobs, together, alone, plain, strict=True):
        assert a["ids"] == b["ids"]
        assert difference(a, [*b["prompt_scores"], *b["scores"]]) < CLOSE
        assert difference(a, reference(model, job["ids"], a["ids"], job["steer"], vectors)) < CLOSE
        if job["steer"] is None:
            assert (a["ids"], a["receipt"]) == (without["ids"], None)
            assert difference(a, [*without["prompt_scores"], *without["scores"]]) < 1e-5
        else:
            assert a["receipt"]["expression"]


@pytest.mark.on_v2
def test_one_hundred_scores_of_an_unsteered_batch_are_those_of_stock_vllm_to_the_bit(
    engine: Engines, stock: Engines, model_path: Path
) -> None:
    jobs = [{"ids": ids, "tokens": 12} for ids in pico.sequences(8, 4, 30, seed=2)]
    stock.start(model_path)
    for found, expected in zip(engine.generate(jobs), stock.generate(jobs), strict=True):
        assert found["scores"] == expected["scores"]
        assert found["prompt_scores"] == expected["prompt_scores"]


@pytest.mark.on_v2
@pytest.mark.parametrize(
    "order", [("plain", "warm", "scoped"), ("warm", "plain", "scoped"), ("scoped", "warm", "plain")]
)
def test_equal_prompts_with_unequal_steering_never_share_keys_and_values(
    order: tuple[str, ...], engine: Engines, model: Any, vectors: dict[str, Path]
) -> None:
    steering = {"plain": None, "warm": "2*warm", "scoped": "2*warm@prompt + formal@prompt"}
    ids = pico.sequences(1, 100, 100, seed=sum(map(len, order)) + order.index("plain"))[0]
    for name in order:
        job = {"ids": ids, "steer": steering[name], "unscored": True}
        first, again = engine.generate([job])[0], engine.generate([job])[0]
        expected = reference(model, ids, first["ids"], steering[name], vectors)[len(ids) - 1 :]
        assert first["cached"] == 0
        assert again["cached"] >= 64, "equal steering reuses the cache"
        for answer in (first, again):
            assert max(abs(a - b) for a, b in zip(answer["scores"], expected, strict=True)) < CLOSE
        assert again["receipt"] is None or again["receipt"]["cached_tokens"] == again["cached"]


@pytest.mark.on_v2
def test_a_prompt_that_repeats_an_earlier_response_is_computed_anew_under_a_scope(
    engine: Engines, model: Any, vectors: dict[str, Path]
) -> None:
    ids = pico.sequences(1, 40, 40, seed=11)[0]
    for steer in ("2*warm@prompt", "2*warm"):
        first = engine.generate([{"ids": ids, "steer": steer, "tokens": 60, "unscored": True}])[0]
        longer = ids + first["ids"]
        second = engine.generate([{"ids": longer, "steer": steer, "unscored": True}])[0]
        expected = reference(model, longer, second["ids"], steer, vectors)[len(longer) - 1 :]
        assert max(abs(a - b) for a, b in zip(second["scores"], expected, strict=True)) < CLOSE
        # Without a scope, what was a response is steered as it is as a prompt; else the block that was a prompt is.
        assert second["cached"] == (32 if "@" in steer else 96)


def test_the_cache_salt_of_a_client_is_kept_apart_too(engine: Engines) -> None:
    ids = pico.sequences(1, 70, 70, seed=12)[0]
    job = {"ids": ids, "steer": "2*warm", "unscored": True}
    engine.generate([job])
    assert engine.generate([job])[0]["cached"] == 64


@pytest.mark.parametrize("budget", [48, 64])
def test_chunked_prefill_changes_nothing(
    budget: int, engines: Engines, model_path: Path, settings: Path, model: Any, vectors: dict[str, Path]
) -> None:
    engines.start(model_path, settings, max_num_batched_tokens=budget, enable_chunked_prefill=True)
    jobs = [{"ids": ids, "steer": c} for ids, c in zip(pico.sequences(15, 60, 150), COMPOSITIONS, strict=True)]
    for job, answer in zip(jobs, engines.generate(jobs), strict=True):
        assert difference(answer, reference(model, job["ids"], answer["ids"], job["steer"], vectors)) < CLOSE


# On V2, test_interruptions preempts after every step.
def test_preemption_changes_nothing_and_counts_no_token_twice(
    engines: Engines, model_path: Path, settings: Path, model: Any, vectors: dict[str, Path]
) -> None:
    engines.start(model_path, settings, num_gpu_blocks_override=14, enable_prefix_caching=False, max_num_seqs=8)
    before = engines.call("state")["preempted"]
    steering = ["2*warm@prompt", "2*warm@first:30", "warm@response + ablate(calm)", None, "formal@after:10", "2*warm"]
    jobs = [
        {"ids": ids, "steer": c, "tokens": 60, "unscored": True}
        for ids, c in zip(pico.sequences(6, 30, 60), steering, strict=True)
    ]
    answers = engines.generate(jobs)
    assert engines.call("state")["preempted"] > before
    for job, answer in zip(jobs, answers, strict=True):
        expected = reference(model, job["ids"], answer["ids"], job["steer"], vectors)[len(job["ids"]) - 1 :]
        assert max(abs(a - b) for a, b in zip(answer["scores"], expected, strict=True)) < CLOSE
        if job["steer"] is not None:
            assert answer["receipt"]["prompt_tokens"] == len(job["ids"])
            assert answer["receipt"]["response_tokens"] == 59
    receipts = [answer["receipt"] for answer in answers]
    assert [receipts[i]["terms"][0]["response_tokens"] for i in (0, 1, 2, 4, 5)] == [0, 30, 59, 49, 59]
    assert [receipts[i]["terms"][0]["prompt_tokens"] for i in (0, 1)] == [len(jobs[0]["ids"]), 0]


@pytest.mark.on_v2
def test_aborted_requests_give_their_rows_back(
    engines: Engines, model_path: Path, tmp_path: Path, vectors: dict[str, Path], model: Any
) -> None:
    engines.start(model_path, write_settings(tmp_path, vectors, rows=2))
    ids = pico.sequences(3, 20, 20, seed=4)
    steps: list[dict[str, Any]] = [
        {"add": {"ids": ids[0], "steer": "1*warm", "tokens": 50}, "id": "a"},
        {"add": {"ids": ids[0], "steer": "2*warm", "tokens": 50}, "id": "b"},
        {"add": {"ids": ids[1], "steer": "3*warm", "tokens": 6}, "id": "c"},
        {"add": {"ids": ids[2], "steer": "4*warm", "tokens": 6}, "id": "d"},
        {"add": {"ids": ids[2], "tokens": 6}, "id": "plain"},
        {"step": 3},
        {"vectors": True},
        {"abort": "d"},
        {"abort": "a"},
        {"step": 3},
        {"vectors": True},
    ]
    result = engines.call("script", steps=steps)
    waiting, after = (state["capacity"] for state in result["trace"])
    assert waiting == {"rows": 2, "rows_held": 2, "waiting": 2}
    assert after["waiting"] == 0
    assert set(result["answers"]) >= {"b", "c", "plain"}
    answer = result["answers"]["c"]
    assert difference(answer, reference(model, ids[1], answer["ids"], "3*warm", vectors)) < CLOSE
    engines.generate([{"ids": ids[0]}])  # the worker hears of the end of a request with the next step
    end = engines.call("state")
    assert (end["capacity"]["rows_held"], end["worker"]["rows_held"], end["worker"]["requests"], end["progress"]) == (
        0,
        0,
        0,
        0,
    )


def test_more_compositions_than_rows_wait_and_all_are_steered(
    engines: Engines, model_path: Path, tmp_path: Path, vectors: dict[str, Path], model: Any
) -> None:
    engines.start(model_path, write_settings(tmp_path, vectors, rows=3))
    steering = [f"{1 + i / 10}*warm + calm@response" for i in range(12)] + [None]
    jobs = [{"ids": ids, "steer": c} for ids, c in zip(pico.sequences(13, 5, 30), steering, strict=True)]
    for job, answer in zip(jobs, engines.generate(jobs), strict=True):
        assert difference(answer, reference(model, job["ids"], answer["ids"], job["steer"], vectors)) < CLOSE


def test_what_cannot_be_steered_is_refused_with_its_reason_and_the_rest_runs(
    engine: Engines, model: Any, vectors: dict[str, Path]
) -> None:
    ids = pico.sequences(1, 10, 10)[0]
    bad = {
        "3*nobody": "no vector is called 'nobody'; loaded: calm, formal, warm",
        "warm +": "a term expected",
        "warm[9]": "warm holds no layer 9",
        "nan*warm": "wrong at character",
        "1e999*warm": "a finite number",
        "": "the expression is empty",
    }
    jobs: list[dict[str, Any]] = [{"ids": ids, "steer": steer} for steer in bad]
    jobs += [
        {"ids": ids, "extra": {"steer": 5}},
        {"ids": ids, "extra": {"steer_resolved": {"expression": "warm", "vectors": {}}}},
    ]
    good = {"ids": ids, "steer": "2*warm"}
    *refused, answer = engine.generate([*jobs, good])
    reasons = [*bad.values(), "steer is 5, not an expression", "steer_resolved can't be set by a client"]
    for reason, found in zip(reasons, refused, strict=True):
        assert found["error"].startswith("VLLMValidationError"), found
        assert reason in found["error"]
    assert difference(answer, reference(model, ids, answer["ids"], "2*warm", vectors)) < CLOSE


def one_fails(engine: Engines, vectors: dict[str, Path], model: Any) -> None:
    """Of four requests, one comes whose vector the workers have lost: it fails, and the others are as ever."""
    ids = pico.sequences(4, 20, 30, seed=8)
    jobs = {
        "warm": {"ids": ids[0], "steer": "2*warm", "tokens": 12},
        "plain": {"ids": ids[1], "tokens": 12},
        "calm": {"ids": ids[2], "steer": "2*calm + warm", "tokens": 12, "unscored": True},
        "later": {"ids": ids[3], "steer": "ablate(warm)@response", "tokens": 12},
    }
    digest = SteeringVector.load(vectors["calm"]).digest
    steps: list[dict[str, Any]] = [
        *({"add": jobs[name], "id": name} for name in ("warm", "plain")),
        {"step": 3},
        {"unload": digest},
        *({"add": jobs[name], "id": name} for name in ("calm", "later")),
        {"step": 20},
    ]
    answers = engine.call("script", steps=steps)["answers"]
    failed = answers.pop("calm")
    assert (failed["reason"], failed["ids"], failed["receipt"]) == ("error", [], None)
    for name, answer in answers.items():
        steer = jobs[name].get("steer")
        assert answer["reason"] == "length"
        assert difference(answer, reference(model, jobs[name]["ids"], answer["ids"], steer, vectors)) < CLOSE
    assert engine.generate([jobs["warm"]])[0]["ids"] == answers["warm"]["ids"], "the engine lives"


@pytest.mark.on_v2
def test_a_request_that_the_worker_can_not_steer_fails_alone(
    engine: Engines, model: Any, vectors: dict[str, Path]
) -> None:
    engine.running = None  # its worker loses a vector: no other test can use it
    one_fails(engine, vectors, model)
    engine.generate([{"ids": [5, 6, 7]}])  # the worker hears of the end of a request with the next step
    end = engine.call("state")
    assert (end["capacity"]["rows_held"], end["worker"]["rows_held"], end["progress"]) == (0, 0, 0)


def test_requests_that_overflow_leave_the_plain_ones_beside_and_after_them_as_they_are(
    engines: Engines, model_path: Path, settings: Path
) -> None:
    """Values that are not finite would stay in the blocks of keys and values, where the next request finds them."""
    engines.start(model_path, settings, enable_prefix_caching=False, num_gpu_blocks_override=40)
    prompts = pico.sequences(6, 10, 30, seed=9)
    plain = [{"ids": ids, "tokens": 12} for ids in prompts]
    texts = ["5e10*warm", "ablate(warm, 1e11)", "clamp(warm, -5e10)@response"]
    refused = ["1e30*warm", "3e38*warm", "1e39*calm"]

    def beside(steering: list[str]) -> list[dict[str, Any]]:
        """The answers of the plain requests; those beside them have the same prompts, whatever they ask for."""
        asked = (steering * 2)[:6]
        wild = [{"ids": ids, "steer": steer, "tokens": 12} for ids, steer in zip(prompts, asked, strict=True)]
        found = engines.generate([job for pair in zip(plain, wild, strict=True) for job in pair])
        assert [("error" in answer) for answer in found[1::2]] == [steer in refused for steer in asked]
        return found[::2]

    before = beside(["0.1*warm", "ablate(warm)", "clamp(warm, 0.1)@response"])
    for _ in range(2):
        assert beside(texts) == before
    beside([*texts, *refused])
    assert beside(["0.1*warm", "ablate(warm)", "clamp(warm, 0.1)@response"]) == before


def test_too_many_projections_name_the_flag(
    engines: Engines, model_path: Path, tmp_path: Path, vectors: dict[str, Path]
) -> None:
    engines.start(model_path, write_settings(tmp_path, vectors, directions=1, rows=1))
    ids = pico.sequences(1, 10, 10)[0]
    found = engines.generate(
        [{"ids": ids, "steer": "ablate(warm) + ablate(calm)"}, {"ids": ids, "steer": "warm@prompt + calm"}]
    )
    assert "--steer-directions 2" in found[0]["error"]
    assert "--steer-rows 2" in found[1]["error"]


@pytest.mark.parametrize("what", ["hidden", "layers", "base", "settings"])
def test_settings_that_do_not_fit_the_model_end_the_start(
    what: str, engines: Engines, model_path: Path, tmp_path: Path, vectors: dict[str, Path]
) -> None:
    import torch

    made = {
        "hidden": SteeringVector({0: torch.ones(64)}),
        "layers": SteeringVector({4: torch.ones(128)}),
        "base": SteeringVector({0: torch.ones(128)}, {"base": {"digest": "sha256:1", "name": "another"}}),
        "settings": SteeringVector({0: torch.ones(128)}),
    }[what]
    made.save(tmp_path / "odd.safetensors")
    extra = {"colour": 1, "arms": {"a": "2*missing"}} if what == "settings" else {}
    reason = {
        "hidden": "hidden size 64, the model 128",
        "layers": "has layer 4; the model has layers 0 to 3",
        "base": "belongs to another",
        "settings": "no 'colour'(.|\n)*uses missing",
    }[what]
    with pytest.raises(Failed, match=reason):
        engines.start(model_path, write_settings(tmp_path, {"odd": tmp_path / "odd.safetensors"}, **extra))


def test_what_the_plugin_cannot_steer_refuses_to_start(engines: Engines, model_path: Path, settings: Path) -> None:
    with pytest.raises(Failed, match="steer can't serve with speculative decoding"):
        engines.start(
            model_path,
            settings,
            speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2},
        )


def test_several_answers_and_stop_strings_have_receipts(engine: Engines) -> None:
    ids = pico.sequences(1, 10, 10)[0]
    several = engine.generate(
        [{"ids": ids, "steer": "2*warm@response", "n": 3, "temperature": 1.0, "seed": 1, "unscored": True}]
    )[0]
    assert [r["terms"][0]["response_tokens"] for r in several["receipts"]] == [7, 7, 7]
    text = "".join(chr(c) for c in range(33, 127))
    stopped = engine.generate([{"ids": ids, "steer": "2*warm", "stop": list(text), "tokens": 30, "unscored": True}])[0]
    assert 0 < len(stopped["ids"]) < 30
    assert stopped["receipt"]["response_tokens"] == len(stopped["ids"]) - 1


def test_ten_thousand_fuzzed_expressions_leave_the_engine_alive(
    engine: Engines, model: Any, vectors: dict[str, Path]
) -> None:
    chosen = random.Random(3)
    words = "warm calm ablate( clamp( prompt first: 9 1e308 0-3 none 1.5 @response 2*warm ablate(formal) é ☃"
    pieces = [*words.split(), *")*+-@,[] .'\"\x00\n"]
    ids = pico.sequences(1, 4, 4)[0]
    texts = ["".join(chosen.choices(pieces, k=chosen.randint(1, 12))) for _ in range(10_000)]
    accepted = 0
    for start in range(0, len(texts), 500):
        jobs = [{"ids": ids, "steer": text, "tokens": 1, "unscored": True} for text in texts[start : start + 500]]
        for found in engine.generate(jobs):
            assert found.get("error", "VLLMValidationError").startswith("VLLMValidationError"), found
            accepted += "error" not in found
    assert accepted > 50
    answer = engine.generate([{"ids": ids, "steer": "2*warm"}])[0]
    assert difference(answer, reference(model, ids, answer["ids"], "2*warm", vectors)) < CLOSE
