"""Every kind of decoder that vLLM serves is steered as the hooked transformers model is, or refused with the reason.

Eight of them have tests of their own (`test_parity.py`); of the others a few run by default, and all of them with
STEER_TEST_EVERY_DECODER=1. With STEER_RECORD_PARITY=1 the results go into `parity.json`, from which the table of
docs/serve.md is made.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pico
import pytest
import torch
from engine_process import Engines, Failed, random_vectors, reference, write_settings
from parity_record import record
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

ALL = os.environ.get("STEER_TEST_EVERY_DECODER") == "1"
BY_DEFAULT = ("qwen3-moe", "stablelm", "cohere2")
CLOSE = 5e-4  # nats, in float32
COMPOSITIONS = [
    None,
    "2*warm",
    "ablate(warm)",
    "clamp(calm, 2)",
    "-1.5*warm[0,3] + 0.7*formal",
    "1.2*warm - 0.4*formal + ablate(calm)",
    "2*warm@prompt",
    "3*warm@after:2",
    "warm@prompt - 2*formal@first:2 + ablate(calm)@after:3 + clamp(formal, 1)",
    None,
]


class Case(NamedTuple):
    """A pico model as vLLM wants it; `length` is that of the vectors.

    In bfloat16 the tolerance is what rounding to it makes of the hooked model, and of stock vLLM.
    """

    changes: dict[str, Any] = {}
    model: str | None = None  # the pico model, where it is not the case's name
    length: float = 3.0
    dtype: str = "float32"
    arguments: dict[str, Any] = {}


LARGE = {"hidden_size": 128}
HEADS = {**LARGE, "head_dim": 32}
# The CPU's MLA kernel is compiled for DeepSeek's latent keys of 512 and 64.
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}
MLA = {**LARGE, **LATENT}
DELTA = {**LARGE, "head_dim": 64, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
MAMBA = {"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16}
AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}}

TEXT_ONLY = {"language_model_only": True}  # pico wrappers have no image processor; importing them takes torchvision

SERVED: dict[str, Case] = {
    "qwen3-moe": Case(HEADS),
    "qwen3-next": Case(DELTA, length=12.0, dtype="bfloat16"),
    "qwen3.5": Case(DELTA, length=12.0, dtype="bfloat16"),
    "lfm2": Case({**LARGE, "conv_dim": 128, "block_dim": 128}),  # keys of the published models, which vLLM reads
    "lfm2-moe": Case({**LARGE, "conv_dim": 128, "block_dim": 128}),
    "deepseek-v2": Case(MLA, arguments={"block_size": 16}),
    "deepseek-v3": Case({**MLA, "topk_method": "noaux_tc"}, arguments={"block_size": 16}),
    "deepseek-v3, dense": Case({**MLA, "first_k_dense_replace": 4}, "deepseek-v3", arguments={"block_size": 16}),
    "youtu": Case(MLA, arguments={"block_size": 16}),
    "olmo2": Case(LARGE),
    "olmo3": Case(LARGE),
    "phi3": Case(LARGE),
    "phi": Case(LARGE),
    "stablelm": Case(LARGE),
    "glm4": Case(HEADS),
    "gpt-oss": Case({**HEADS, "intermediate_size": 64}),
    "granite": Case(LARGE),
    "smollm3": Case(LARGE),
    "starcoder2": Case(LARGE),
    "falcon-h1": Case({**HEADS, **MAMBA}),
    "cohere2": Case(HEADS),
    "gpt-neox": Case(LARGE),
    "seed-oss": Case(HEADS),
    "gemma": Case(HEADS, length=30.0),
    "gemma4": Case({**HEADS, "global_head_dim": 32}, length=30.0),
    "qwen2.5-vl": Case({**LARGE, **AXES}, arguments=TEXT_ONLY),
    "mistral3": Case(HEADS, arguments=TEXT_ONLY),
    "qwen3.5-vl": Case(DELTA, length=12.0, dtype="bfloat16", arguments=TEXT_ONLY),
    "gemma3-vl": Case(HEADS, length=30.0, arguments=TEXT_ONLY),
    "minicpm3": Case({**MLA, "dim_model_base": 128}),
    "opt": Case({**LARGE, "word_embed_proj_dim": 128}),
    "bloom": Case(LARGE),
    "falcon": Case(LARGE),
    "olmo": Case(LARGE),
    "nemotron": Case(LARGE),
    "granite-moe": Case(LARGE),
    "cohere": Case(LARGE),
    **{name: Case(LARGE) for name in pico.SERVED},
    # A model for which vLLM has no code of its own runs through transformers' modules.
    "transformers' own llama": Case(LARGE, model="llama", arguments={"model_impl": "transformers"}),
}


def saved(name: str, case: Case, folder: Path) -> Path:
    """The pico model and its reference: a folder."""
    dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    saved_to = pico.save(folder / "model", case.model or name, **case.changes, dtype=dtype)
    if dtype == torch.bfloat16:  # so that rounding does not send tokens to other experts, or grow from block to block
        model = loader(name).from_pretrained(saved_to, dtype=dtype)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
                    module.weight.mul_(0.5)
        model.save_pretrained(saved_to)
    return saved_to


def loader(name: str) -> Any:
    """The class of transformers that loads a pico model."""
    return AutoModelForImageTextToText if name in pico.WRAPPERS else AutoModelForCausalLM


@pytest.mark.parametrize("name", SERVED)
def test_equals_the_hooked_model_on(name: str, engines: Engines, tmp_path: Path) -> None:
    if not ALL and name not in BY_DEFAULT:
        pytest.skip("set STEER_TEST_EVERY_DECODER=1")
    case = SERVED[name]
    folder = saved(name, case, tmp_path)
    vectors = random_vectors(tmp_path, norm=case.length)
    settings = write_settings(tmp_path, vectors)
    try:
        # Steps of at most 64 tokens: prompts come in chunks, and in one batch with responses.
        engines.start(folder, settings, dtype=case.dtype, max_num_batched_tokens=64, **case.arguments)
    except Failed as error:
        record(name, serve="refused", reason=reason_of(error, engines))
        raise
    prompts = pico.sequences(len(COMPOSITIONS), 5, 60, seed=3)
    jobs = [{"ids": ids, "steer": c} for ids, c in zip(prompts, COMPOSITIONS, strict=True)]
    answers = engines.generate(jobs)
    model = loader(name).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    rounded = loader(name).from_pretrained(folder, attn_implementation="eager", dtype=torch.bfloat16).eval()
    steered, stock, effects, rounding = [], [], [], []
    for job, answer in zip(jobs, answers, strict=True):
        assert "error" not in answer, answer
        served = torch.tensor([*answer["prompt_scores"], *answer["scores"]])
        expected = torch.tensor(reference(model, job["ids"], answer["ids"], job["steer"], vectors))
        differences = (served - expected).abs()
        if job["steer"] is None:
            stock.append(differences)
        else:
            plain = torch.tensor(reference(model, job["ids"], answer["ids"], None, {}))
            steered.append(differences)
            effects.append((expected - plain).abs())
            if case.dtype == "bfloat16":
                half = torch.tensor(reference(rounded, job["ids"], answer["ids"], job["steer"], vectors))
                rounding.append((half - expected).abs())
    claims = engines.call("claims")
    assert len(claims) == 8, claims
    assert all(claims.values()), {claim: reason for claim, reason in claims.items() if not reason}
    blocks = engines.call("state")["worker"]["blocks"]
    if case.dtype == "float32":
        # Where stock vLLM itself differs from transformers by more, twice that is the tolerance.
        worst = float(max(each.max() for each in steered))
        tolerance = max(CLOSE, 2 * float(max(each.max() for each in stock)))
        met = worst < tolerance
        told_apart = all(float(each.max()) > 10 * worst for each in effects)
    else:
        tolerance = 2 * float(max(each.mean() for each in (*stock, *rounding)))
        worst = float(max(each.mean() for each in steered))
        met = worst < tolerance
        told_apart = all(float(e.mean()) > 3 * float(s.mean()) for e, s in zip(effects, steered, strict=True))
    plain_worst = float(max(each.max() if case.dtype == "float32" else each.mean() for each in stock))
    exact = met and told_apart
    reason = f"differs from transformers by {worst:.2g} nats, stock vLLM by {plain_worst:.2g}"
    record(
        name,
        serve="exact" if exact else "differs",
        **({} if exact else {"reason": reason}),
        block=", ".join(blocks),
        form=", ".join(dict.fromkeys(blocks.values())),
        dtype=case.dtype,
        difference=float(f"{worst:.2g}"),
        stock=float(f"{plain_worst:.2g}"),
        tolerance=float(f"{tolerance:.2g}"),
    )
    assert met, [float(each.max()) for each in steered]
    assert told_apart, [float(each.max()) for each in effects]


REFUSED = {"gemma3n": Case(HEADS)}


@pytest.mark.parametrize("name", REFUSED)
def test_streams_that_are_not_one_are_refused_by_name(name: str, engines: Engines, tmp_path: Path) -> None:
    if not ALL:
        pytest.skip("set STEER_TEST_EVERY_DECODER=1")
    folder = saved(name, REFUSED[name], tmp_path)
    with pytest.raises(Failed, match="not one residual stream") as failed:
        engines.start(folder, write_settings(tmp_path, random_vectors(tmp_path)))
    record(name, serve="refused", reason=reason_of(failed.value, engines))


def reason_of(error: Failed, engines: Engines) -> str:
    """What vLLM says about a model that it can't run, or the plugin about one that it refuses, in one line."""
    text = " ".join(str(error).split())
    if "steer: " in text:
        return text[text.index("steer: ") + 7 :].partition(". To serve the model")[0]
    return text[:300]
