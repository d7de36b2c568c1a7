"""Arms of an evaluation through vLLM: the same figures as `steer.evaluation.measuring`, all arms in one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probes.generation import end_tokens
from probes.models.completions import Completion
from probes.models.loading import LoadedModel, OpenedModel
from probes.models.markers import given_markers
from probes.models.residual import context_length
from probes.strengths import with_system
from steer.evaluation.arms.arm import Arm
from steer.evaluation.measuring import divergences, figures
from steer.evaluation.measuring.divergences import Neutral
from steer.evaluation.measuring.engine import Start
from steer.evaluation.measuring.figures import figures_of
from steer.evaluation.measuring.generations import Generation
from steer.evaluation.measuring.rendering import rendered_items
from steer.evaluation.suites.items import Item
from steer.serving.offline.engine import OfflineEngine, Request, offline_engine
from steer.serving.offline.needs import require_possible, settings_for
from vectors.events import Event, OnEvent, counter, ignore

LONGEST = 2048  # tokens of a text, so that the keys and values of a batch fit into little memory


def measure_arms(
    engine: OfflineEngine, tokenizer: Any, items: Sequence[Item], arms: Sequence[Arm], *, context_length: int | None
) -> Tensor:
    """The figure of every item under every arm, float64 [arms, items], in nats, as the plain implementation's.

    The engine's model is that of all these arms. All completions under all arms are one batch. Raises ModelError, and
    as `steer.evaluation.measuring.figures.measure_arms` does.
    """
    by_system = {arm.system: rendered_items(items, tokenizer, context_length, arm.system) for arm in arms}
    requests = [
        request_of(completion, arm) for arm in arms for each in by_system[arm.system] for completion in each.completions
    ]
    sums = [sum(values) for values in engine.likelihoods(requests)]
    rows, start = [], 0
    for arm in arms:
        of_arm = by_system[arm.system]
        count = sum(len(each.completions) for each in of_arm)
        rows.append(figures_of(of_arm, sums[start : start + count]))
        start += count
    return torch.tensor(rows, dtype=torch.float64).reshape(len(arms), len(items))


def measure_divergences(engine: OfflineEngine, tokenizer: Any, neutral: Neutral, arms: Sequence[Arm]) -> list[Tensor]:
    """KL(base || arm) of every token of the neutral continuations, float64 [tokens], one tensor for each arm; in nats.

    Both distributions are vLLM's, over the whole vocabulary: exact, and the dearest part of an evaluation, since vLLM
    sorts the vocabulary at every position, of the prompts too. Raises ModelError.
    """
    by_system = {arm.system: with_system(neutral.prompts, arm.system, tokenizer) for arm in arms}
    plain = with_system(neutral.prompts, None, tokenizer)
    references = [
        request_of(Completion(prompt, text)) for prompt, text in zip(plain, neutral.continuations, strict=True)
    ]
    requests = [
        (number, request_of(Completion(prompt, text), arm))
        for arm in arms
        for number, (prompt, text) in enumerate(zip(by_system[arm.system], neutral.continuations, strict=True))
    ]
    values = iter(engine.divergences(references, requests))
    return [torch.tensor([value for _ in neutral.prompts for value in next(values)], dtype=torch.float64) for _ in arms]


def request_of(completion: Completion, arm: Arm | None = None) -> Request:
    """A prompt with a given completion, under an arm."""
    return text_of(completion.ids, len(completion.completion_ids), arm)


def text_of(ids: Sequence[int], given: int = 0, arm: Arm | None = None) -> Request:
    """A text under an arm, all of it, of which the last `given` tokens are only scored."""
    if arm is None:
        return Request(ids, given)
    adapter = None if arm.model is None else Path(arm.model)
    return Request(ids, given, arm.composition, arm.vectors, adapter, arm.probes)


class VllmEngine:
    """`steer.evaluation.measuring.engine.Engine` through vLLM, for the arms of one base."""

    def __init__(self, engine: OfflineEngine, base: LoadedModel, limit: int, on_event: OnEvent = ignore) -> None:
        self.engine, self.base, self.limit, self.on_event = engine, base, limit, on_event

    def measure_arms(self, items: Sequence[Item], arms: Sequence[Arm]) -> Tensor:
        """The figure of every item under every arm, float64 [arms, items], in nats."""
        self._stage(figures.STAGE, "texts")
        return measure_arms(self.engine, self.base.tokenizer, items, arms, context_length=self.limit)

    def measure_divergences(self, neutral: Neutral, arms: Sequence[Arm]) -> list[Tensor]:
        """KL(base || arm) of every token of the neutral continuations, float64 [tokens], for each arm, in nats."""
        self._stage(divergences.STAGE, "texts")
        return measure_divergences(self.engine, self.base.tokenizer, neutral, arms)

    def generate_arms(
        self, arms: Sequence[Arm], prompts: Sequence[str], max_tokens: int
    ) -> dict[str, list[Generation]]:
        """The greedy answer of each arm to each prompt, by the name of the arm, from one batch."""
        self._stage("writing answers", "answers")
        tokenizer, ends = self.base.tokenizer, end_tokens(self.base.model, self.base.tokenizer)
        by_system = {arm.system: with_system(prompts, arm.system, tokenizer) for arm in arms}
        requests = [text_of(ids, arm=arm) for arm in arms for ids in by_system[arm.system]]
        written = iter(self.engine.generate(requests, max_tokens))
        answers = {}
        for arm in arms:
            rows = [next(written).ids for _ in prompts]
            texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
            answers[arm.name] = [
                Generation(prompt, text.strip(), ids, "stop" if ids and ids[-1] in ends else "length")
                for prompt, text, ids in zip(prompts, texts, rows, strict=True)
            ]
        return answers

    def _stage(self, name: str, unit: str) -> None:
        """Report the progress of the next call under a name."""
        self.on_event(Event(name))
        self.engine.progress = counter(self.on_event, name, unit)


def through_vllm(opened: OpenedModel, arms: Sequence[Arm], markers: Mapping[str, Sequence[str]]) -> Start:
    """What runs arms of a base in vLLM, as far as they and those that follow from them differ in vectors alone.

    `markers` are those that are given for its sections. Raises UsageError where vLLM is not installed, or can't run an
    arm.
    """
    settings = settings_for(arms, markers)
    require_possible(arms, settings, given_markers(opened.tokenizer, markers))
    return partial(_running, settings)


@contextlib.contextmanager
def _running(settings: Mapping[str, Any], base: LoadedModel, on_event: OnEvent = ignore) -> Iterator[VllmEngine]:
    """A context with vLLM on the base's folder, in its dtype. Raises ModelError."""
    on_event(Event("starting vLLM"))
    limit = min(context_length(base.model.config) or LONGEST, LONGEST)
    dtype = str(base.model.dtype).removeprefix("torch.")
    with offline_engine(Path(base.source.path), settings, max_tokens=limit - 1, dtype=dtype) as engine:
        yield VllmEngine(engine, base, limit - 1, on_event)
