"""The proof of a fold: the written model is loaded and compared with the steered model on held-out prompts.

A comparison is needed, since loading without an error proves nothing: transformers only logs a weight that it does not
know, and vLLM drops an unexpected bias silently.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from probes.generation import answers, generate
from probes.interventions import steering
from probes.logits import log_likelihoods, logits_of
from probes.models import residual
from probes.models.completions import Completion
from probes.models.loading import LoadedModel, load
from probes.models.tokens import rendered
from probes.scores import divergence
from probes.steered import steered
from steer.folding import ablation, vllm_scores
from steer.folding.effects import Effects
from vectors.architectures import Checkpoint
from vectors.errors import ModelError, SteerError
from vectors.events import Event, OnEvent, ignore
from vectors.expression import Composition
from vectors.steering import SteeringVector

TOKENS = 12  # of each response
ANSWERED, ANSWER_TOKENS = 10, 32  # prompts whose answers the report shows, and the tokens of each
PROMPTS = 12
LOGIT = 2e-3  # tolerance: greatest difference of float32 logits, and of log-probabilities (nats) in vLLM
CLEAR = 4  # the unsteered model must differ at least this many times more, else the comparison proves nothing
ROUNDED_KL = 2e-3  # tolerance instead of LOGIT if changed matrices are in 16 bits: mean KL, in nats


class ProofError(SteerError):
    """The written model does not compute what the steered model computes."""


class SteeredModel(NamedTuple):
    """The base model, and the composition whose effect must be in the folded weights."""

    base: LoadedModel
    composition: Composition
    vectors: Mapping[str, SteeringVector]
    any_base: bool = False


def prove(
    folder: Path,
    steered_model: SteeredModel,
    effects: Effects,
    described: Checkpoint,
    prompts: Sequence[str],
    *,
    rounded: bool,
    vllm: bool | None,
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Compare the model in `folder` with the steered one on its own responses; returns the proof as JSON values.

    `rounded`: changed matrices are stored in 16 bits, so equality is up to rounding. `vllm`: compare in vLLM too; None
    does so if vLLM is installed. Raises ProofError with the figures, ModelError for a model that can't be loaded.
    """
    original = steered_model.base
    within = steering(original.model, steered_model.composition, steered_model.vectors, any_base=steered_model.any_base)
    ids = rendered(prompts[:PROMPTS], original.tokenizer)
    installed = importlib.util.find_spec("vllm") is not None
    with contextlib.ExitStack() as stack:
        scores = None
        if vllm is not False and installed:
            longest = max(map(len, ids)) + TOKENS
            limit = residual.context_length(original.model.config)
            longest = longest if limit is None else min(longest, limit - 1)
            # vLLM starts while the rest is computed; on a GPU it measures the free memory, which must not change then.
            concurrent = next(original.model.parameters()).device.type == "cpu"
            start = vllm_scores.loading(folder, longest)
            scores = stack.enter_context(start) if concurrent else _late(stack, start)
        on_event(Event("generating with the steered model"))
        rows = generate(original.model, original.tokenizer, ids, within, max_tokens=TOKENS)
        served = [logits_of(original.model, row, within) for row in rows]
        expected = served
        if effects.ablates:

            def at_every_write(_prompts: Sequence[int]) -> contextlib.AbstractContextManager[object]:
                return reference(original.model, effects, described)

            expected = [logits_of(original.model, row, at_every_write) for row in rows]
        unsteered = divergence.difference(expected, [logits_of(original.model, row) for row in rows])
        on_event(Event("verifying in transformers"))
        folded = load(folder, str(next(original.model.parameters()).device), "float32")
        logits = [logits_of(folded.model, row) for row in rows]
        against = divergence.difference(expected, logits)
        proof: dict[str, Any] = {
            "prompts": len(rows),
            "tokens": against.tokens,
            "reference": "the composition at every write to the stream" if effects.ablates else "the composition",
            "transformers": against._asdict(),
            "base": unsteered._asdict(),
            "tolerance": {"kl_mean": ROUNDED_KL} if rounded else {"max_logit": LOGIT},
        }
        if effects.ablates:
            proof["composition"] = divergence.difference(served, logits)._asdict()
        asked = ids[:ANSWERED]
        proof["answers"] = {
            "base": answers(original.model, original.tokenizer, asked, max_tokens=ANSWER_TOKENS),
            "composition": answers(original.model, original.tokenizer, asked, within, max_tokens=ANSWER_TOKENS),
            "folded": answers(folded.model, original.tokenizer, asked, max_tokens=ANSWER_TOKENS),
        }
        equal = _is_equal(against, unsteered, rounded)
        if scores is None:
            proof["vllm"] = {"skipped": "left out by --skip-vllm" if vllm is False else "vLLM is not installed"}
        elif equal:
            on_event(Event("verifying in vLLM"))
            # With rounded weights, vLLM is compared with transformers on the same file, not with the steered model.
            proof["vllm"] = _in_vllm(scores, rows, logits if rounded else expected)
            equal = proof["vllm"]["max_log_probability"] <= LOGIT
    proof["verdict"] = "equal" if equal and not rounded else "equal up to rounding" if equal else "different"
    if not equal:
        worst = proof.get("vllm", {}).get("max_log_probability", against.max_logit)
        raise ProofError(
            f"the proof failed, and nothing was kept: the greatest difference is {worst:.3g} "
            f"(KL {against.kl_mean:.3g} nats in the mean; the unsteered model lies {unsteered.kl_mean:.3g} away)",
            "serve the composition instead: steer serve; or train it in: --mode distil",
        )
    return proof


def _late(stack: contextlib.ExitStack, start: contextlib.AbstractContextManager[vllm_scores.Scores]) -> Any:
    """Scores from a vLLM that is started by the first call."""
    return lambda rows: stack.enter_context(start)(rows)


def _is_equal(against: divergence.Difference, unsteered: divergence.Difference, rounded: bool) -> bool:
    """Whether the difference is within tolerance, and the unsteered model's is clearly greater."""
    key, most = ("kl_mean", ROUNDED_KL) if rounded else ("max_logit", LOGIT)
    difference, effect = getattr(against, key), getattr(unsteered, key)
    return bool(difference <= most and CLEAR * difference <= effect)  # a very weak composition fails the second


def _in_vllm(scores: vllm_scores.Scores, rows: Sequence[Completion], logits: Sequence[Any]) -> dict[str, Any]:
    """The greatest difference of log-probabilities, in nats, over all tokens of all rows."""
    expected = [log_likelihoods(row_logits[:-1], row.ids[1:]) for row_logits, row in zip(logits, rows, strict=True)]
    computed = scores([row.ids for row in rows])
    pairs = [pair for a, b in zip(expected, computed, strict=True) for pair in zip(a, b, strict=True)]
    gaps = [abs(a - b) for a, b in pairs]
    return {"max_log_probability": max(gaps) if all(map(math.isfinite, gaps)) else math.inf, "tokens": len(pairs)}


@contextlib.contextmanager
def reference(model: nn.Module, effects: Effects, described: Checkpoint) -> Iterator[None]:
    """A context in which every write to the residual stream, up to the last ablated layer, is ablated.

    This is what orthogonalised weights compute. A composition ablates the outputs of its layers instead, so that
    earlier blocks still read and write the direction. Raises ModelError for a model with other modules.
    """
    with contextlib.ExitStack() as handles:
        blocks = residual.blocks(model)
        for embedding in _embeddings(model, described):
            handles.callback(embedding.register_forward_hook(ablation.hook(effects, None)).remove)
        for block in blocks[: effects.last + 1]:
            for part, names in described.modules.items():
                modules = [getattr(block, name) for name in names if hasattr(block, name)]
                if not modules and part in ("attention", "feed_forward"):
                    raise ModelError(f"{type(block).__name__} has none of {', '.join(names)}", "use --mode distil")
                norm = described.norms.get(part)
                weight = block.get_parameter(norm).detach() + float(described.plus_one) if norm else None
                for module in modules:
                    handles.callback(module.register_forward_hook(ablation.hook(effects, weight)).remove)
        if effects.added:
            moves = SteeringVector({i: move.float() for i, move in effects.added.items()})
            handles.enter_context(steered(model, moves, any_base=True))
        yield


def _embeddings(model: nn.Module, described: Checkpoint) -> list[nn.Module]:
    stack = residual.decoder(model)
    names = [name.removesuffix(".weight").rpartition(".")[2] for name in described.embeddings]
    return [getattr(stack, name) for name in names]
