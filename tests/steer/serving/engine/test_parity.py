"""What vLLM computes under a composition is what the hooked transformers model computes."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest
from engine_process import Engines, difference, random_vectors, reference, save_model, write_settings
from parity_record import record
from transformers import AutoModelForCausalLM

CLOSE = 5e-4  # nats, in float32
COMPOSITIONS = [
    None,
    "2*warm",
    "-1.5*warm[0,3] + 0.7*formal",
    "ablate(warm)",
    "ablate(formal, 0.5)",
    "clamp(calm, 2)",
    "clamp(warm, -1.5)@response",
    "1.2*warm - 0.4*formal + ablate(calm)",
    "2*warm@prompt",
    "2*warm@response",
    "3*warm@first:3",
    "3*warm@after:2",
    "warm@prompt - 2*formal@first:2 + ablate(calm)@after:3 + clamp(formal, 1)",
    "ablate(warm) + clamp(warm, 2) + 0.3*warm",
    "0*warm",
]
STEPPED = [
    "rotate(warm, 20)",
    "warm%40 - calm%30@response",
    "ablate(warm, 0.7, to=mean) + formal",
    "warm + rotate(calm, -35)@after:1 + ablate(warm) + rotate(formal, 15)@prompt + clamp(calm, 2)@first:4",
]
STEPS = 4  # that these need at one layer


ON_BOTH = [pytest.param(name, marks=pytest.mark.on_v2) for name in ("llama", "gpt2")]


@pytest.mark.parametrize("name", [*ON_BOTH, "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "mixtral"])
def test_equals_the_hooked_model_on(name: str, engines: Engines, runner: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path, name)
    # Gemma scales its embeddings up, so it takes longer vectors to tell a steered answer from a plain one.
    vectors = random_vectors(tmp_path, norm=30.0 if name.startswith("gemma") else 3.0)
    engines.start(folder, write_settings(tmp_path, vectors, steps=STEPS))
    compositions = [*COMPOSITIONS, *STEPPED]
    prompts = pico.sequences(len(compositions), 5, 40, seed=3)
    jobs = [{"ids": ids, "steer": c} for ids, c in zip(prompts, compositions, strict=True)]
    answers = engines.generate(jobs)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    plain = [reference(model, ids, a["ids"], None, {}) for ids, a in zip(prompts, answers, strict=True)]
    for job, answer, unsteered in zip(jobs, answers, plain, strict=True):
        expected = reference(model, job["ids"], answer["ids"], job["steer"], vectors)
        assert difference(answer, expected) < CLOSE, job["steer"]
        if job["steer"] not in (None, "0*warm"):
            assert difference(answer, unsteered) > 10 * CLOSE, job["steer"]
    claims = engines.call("claims")
    assert len(claims) == 8, claims
    assert all(claims.values()), {claim: reason for claim, reason in claims.items() if not reason}
    blocks = engines.call("state")["worker"]["blocks"]
    form = ", ".join(dict.fromkeys(blocks.values()))
    record(name, runner, serve="exact", block=", ".join(blocks), form=form, dtype="float32", tolerance=CLOSE)
