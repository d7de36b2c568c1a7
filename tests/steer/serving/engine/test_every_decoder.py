"""Every kind of decoder that vLLM serves is steered as the hooked transformers model is, or refused with the reason.

Eight of them have tests of their own (`test_parity.py`); of the others a few run by default, and all of them with
STEER_TEST_EVERY_DECODER=1. With STEER_RECORD_PARITY=1 the results go into `parity.json`, from which the table of
docs/serve.md is made.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import pico
import pytest
import torch
from engine_process import Engines, Failed, random_vectors, reference, write_settings
from parity_record import record
from torch import Tensor
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

    In bfloat16 the tolerance is what rounding to it makes of the hooked model, and of vLLM's unsteered answers.
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
# vLLM 0.32's kernel for the CPU rotates wrongly where queries come as [tokens, heads, size] (LFM2, DeepSeek).
TORCH_ROPE = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
DEEPSEEK = {**TORCH_ROPE, "block_size": 16}
DELTA = {**LARGE, "head_dim": 64, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
NO_SMALLEST_STEP = {"time_step_min": 1e-12}  # which vLLM does not read
MAMBA = {"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16}
AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}}

TEXT_ONLY = {"language_model_only": True}  # pico wrappers have no image processor

MAMBA_1 = "vLLM's Mamba layers of the first kind do not run on its CPU back end"
TORCH_ONLY = (
    "vLLM has no code of its own for it, and its recurrent layers do not run through transformers' modules there"
)
# What is refused, what the message says, and the reason for the record where it is vLLM's own.
REFUSED: dict[str, tuple[Case, str, str | None]] = {
    "gemma3n": (Case(HEADS), "not one residual stream", None),
    "mamba": (Case(LARGE), "a pass through MambaForCausalLM fails", MAMBA_1),
    "falcon-mamba": (Case(LARGE), "a pass through MambaForCausalLM fails", MAMBA_1),
    "gpt-neox": (
        Case(LARGE),
        "the engine's process died",
        "vLLM 0.32's process dies of a memory fault on the CPU, without the plugin too",
    ),
    "rwkv": (Case(LARGE), "are not supported for now", "vLLM has no code for it"),
    "jamba": (Case(LARGE), "a pass through JambaForCausalLM fails", MAMBA_1),
    "bamba": (Case(LARGE), "does not dispatch through the Transformers attention interface", TORCH_ONLY),
    "minimax": (Case(LARGE), "does not dispatch through the Transformers attention interface", TORCH_ONLY),
    "phimoe": (Case(LARGE), "too many values to unpack", "vLLM 0.32 can't run the router of its experts"),
}

SERVED: dict[str, Case] = {
    "qwen3-moe": Case(HEADS),
    # All experts for each token: rounded to bfloat16, another choice of experts would be most of the difference.
    "qwen3-next": Case({**DELTA, "num_experts_per_tok": 4}, length=12.0, dtype="bfloat16"),
    "qwen3.5": Case(DELTA, length=12.0, dtype="bfloat16"),
    # Keys of the published models, which vLLM reads and transformers does not: conv_dim, block_dim, scoring_func, …
    "lfm2": Case({**LARGE, "conv_dim": 128, "block_dim": 128}, arguments=TORCH_ROPE),
    "lfm2-moe": Case({**LARGE, "conv_dim": 128, "block_dim": 128}, arguments=TORCH_ROPE),
    "deepseek-v2": Case(MLA, arguments=DEEPSEEK),
    "deepseek-v3": Case({**MLA, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}, arguments=DEEPSEEK),
    "deepseek-v3, dense": Case({**MLA, "first_k_dense_replace": 4}, "deepseek-v3", arguments=DEEPSEEK),
    # vLLM takes the size of the rotated keys for that of the heads, which its kernels for latent keys refuse.
    "youtu": Case({**LARGE, **LATENT}, arguments={"environment": {"VLLM_MLA_DISABLE": "1"}}),
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
    "cohere2, a window shorter than prompts": Case({**HEADS, "sliding_window": 6}, "cohere2"),
    "mamba2, two groups": Case({**LARGE, "n_groups": 2}, "mamba2"),
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
    **{name: Case(LARGE) for name in pico.SERVED if name not in REFUSED},
    "nemotron-h": Case({**LARGE, **NO_SMALLEST_STEP}),
    # vLLM's kernels for the CPU give no states for its prefix cache.
    "zamba2": Case({**LARGE, **NO_SMALLEST_STEP, "chunk_size": 8}, arguments={"enable_prefix_caching": False}),
    # All experts for each token: vLLM's router for the CPU leaves out the bias by which Ernie chooses.
    "ernie4.5-moe": Case({**LARGE, "moe_k": 4}),
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


def reference_model(name: str, folder: Path, dtype: torch.dtype) -> Any:
    """The model of transformers, with the activation functions, windows and norms that vLLM computes."""
    model = loader(name).from_pretrained(folder, attn_implementation="eager", dtype=dtype).eval()
    if model.config.model_type == "cohere2":
        model.config.sliding_window += 1  # in vLLM a token sees one more before it
    for module in model.modules():
        if type(module).__name__ == "XIELUActivation":
            module.to(torch.bfloat16)  # in which vLLM has its two parameters
        if type(module).__name__ == "MambaRMSNormGated":
            module.forward = functools.partial(norm_by_groups, module, groups=getattr(model.config, "n_groups", 1))
        if type(module).__name__ == "BloomGelu":
            module.forward = torch.nn.functional.gelu  # where transformers approximates it by a tanh
    return model


def norm_by_groups(norm: Any, hidden: Tensor, gate: Tensor, groups: int) -> Tensor:
    """Mamba 2's gated norm, of each group of channels by itself, where transformers takes all of them together."""
    gated = (hidden.float() * torch.nn.functional.silu(gate.float())).unflatten(-1, (groups, -1))
    normed = gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    result: Tensor = norm.weight * normed.flatten(-2).to(hidden.dtype)
    return result


def loader(name: str) -> Any:
    """The class of transformers that loads a pico model."""
    return AutoModelForImageTextToText if name in pico.WRAPPERS else AutoModelForCausalLM


@pytest.mark.parametrize("name", SERVED)
def test_equals_the_hooked_model_on(name: str, engines: Engines, runner: str, tmp_path: Path) -> None:
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
        record(name, runner, serve="refused", reason=reason_of(error))
        raise
    prompts = pico.sequences(len(COMPOSITIONS), 5, 60, seed=3)
    jobs = [{"ids": ids, "steer": steer} for ids, c in zip(prompts, COMPOSITIONS, strict=True) for steer in (None, c)]
    answers = engines.generate(jobs)
    model, rounded = (reference_model(name, folder, dtype) for dtype in (torch.float32, torch.bfloat16))
    steered, stock, rounding, effects = [], [], [], []
    for job, answer in zip(jobs, answers, strict=True):
        assert "error" not in answer, answer
        served = torch.tensor([*answer["prompt_scores"], *answer["scores"]])
        expected, plain = (
            torch.tensor(reference(model, job["ids"], answer["ids"], c, vectors)) for c in (job["steer"], None)
        )
        (stock if job["steer"] is None else steered).append((served - expected).abs())
        if job["steer"] is not None:
            effects.append((expected - plain).abs())
            if case.dtype == "bfloat16":
                half = torch.tensor(reference(rounded, job["ids"], answer["ids"], job["steer"], vectors))
                rounding.append((half - expected).abs())
    claims = engines.call("claims")
    assert len(claims) == 8, claims
    assert all(claims.values()), {claim: reason for claim, reason in claims.items() if not reason}
    blocks = engines.call("state")["worker"]["blocks"]
    if case.dtype == "float32":
        # Where vLLM itself, on the same prompts, differs from transformers by more, twice that is the tolerance.
        worst, plain_worst = (max(float(each.max()) for each in group) for group in (steered, stock))
        tolerance = max(CLOSE, 2 * plain_worst)
        told_apart = all(float(each.max()) > 10 * worst for each in effects)
    else:
        worst, plain_worst = (max(float(each.mean()) for each in group) for group in (steered, stock))
        tolerance = 2 * max(float(each.mean()) for each in (*stock, *rounding))
        # Where the composition acts: before, the two passes are the same.
        pairs = [(e[e > 0].mean(), s[e > 0].mean()) for e, s in zip(effects, steered, strict=True)]
        told_apart = all(float(effect) > 3 * float(difference) for effect, difference in pairs)
    exact = worst < tolerance and told_apart
    reason = f"differs from transformers by {worst:.2g} nats, stock vLLM by {plain_worst:.2g}"
    record(
        name,
        runner,
        serve="exact" if exact else "differs",
        **({} if exact else {"reason": reason}),
        block=", ".join(blocks),
        form=", ".join(dict.fromkeys(blocks.values())),
        dtype=case.dtype,
        difference=float(f"{worst:.2g}"),
        stock=float(f"{plain_worst:.2g}"),
        tolerance=float(f"{tolerance:.2g}"),
    )
    assert worst < tolerance, [float(each.max()) for each in steered]
    assert told_apart, [float(each.max()) for each in effects]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_the_reason(
    name: str, engines: Engines, runner: str, tmp_path: Path
) -> None:
    if not ALL:
        pytest.skip("set STEER_TEST_EVERY_DECODER=1")
    case, seen, reason = REFUSED[name]
    folder = saved(name, case, tmp_path)
    with pytest.raises((Failed, AssertionError), match=seen) as failed:
        engines.start(folder, write_settings(tmp_path, random_vectors(tmp_path)), **case.arguments)
    record(name, runner, serve="refused", reason=reason or reason_of(failed.value))


def reason_of(error: BaseException) -> str:
    """What vLLM says about a model that it can't run, or the plugin about one that it refuses, in one line."""
    text = " ".join(str(error).split())
    if "steer: " in text:
        return text[text.index("steer: ") + 7 :].partition(". To serve the model")[0]
    return text[:300]
