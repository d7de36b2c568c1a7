"""What every arm writes after the same prompts, greedily, and the side effects that show in its texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from probes.arms.scores import Completions
from probes.generation import BATCH, end_tokens, generate_batch
from probes.interventions import Intervention, no_intervention, steering
from probes.models.completions import Completion
from probes.models.loading import LoadedModel
from probes.models.residual import context_length
from probes.models.tokens import rendered
from probes.scores import perplexity
from probes.scores.repetition import repetition
from probes.steered import Steering
from probes.strengths import with_system
from steer.evaluation.arms.arm import Arm
from vectors.errors import UsageError
from vectors.events import Event, OnEvent, ignore
from vectors.expression import Composition

MAX_TOKENS = 48
STAGE = "writing answers"


class Generation(NamedTuple):
    """One answer: its text, its ids, and why it ended (`stop` at an end token, else `length`)."""

    prompt: str
    text: str
    ids: list[int]
    finish: str


class TextFigures(NamedTuple):
    """Means over an arm's answers.

    `perplexity` is that of the answers under the base without a system prompt; `repeated_4grams` the share of 4-grams
    of tokens that occurred before in the answer, `distinct_2` the share of its different pairs of tokens; `length` the
    tokens of an answer.
    """

    perplexity: float
    repeated_4grams: float
    distinct_2: float
    length: float
    answers: int


def generate_arms(
    loaded: LoadedModel, arms: Sequence[Arm], prompts: Sequence[str], *, max_tokens: int = MAX_TOKENS,
    any_base: bool = False, on_event: OnEvent = ignore,
) -> dict[str, list[Generation]]:  # fmt: skip
    """The greedy answer of each arm to each prompt, by the name of the arm; `loaded` is the model of all these arms.

    Arms share batches, since a step of few rows costs little less than one of many.
    Raises UsageError for prompts beyond the context, and as `measure_arms` does.
    """
    tokenizer, limit = loaded.tokenizer, context_length(loaded.model.config)
    ids = {system: with_system(prompts, system, tokenizer) for system in {arm.system for arm in arms}}
    longest = max((len(prompt) for each in ids.values() for prompt in each), default=0)
    if limit is not None and longest + max_tokens > limit:
        raise UsageError(
            f"the longest prompt has {longest} tokens; {max_tokens} more exceed the model's context of {limit}",
            "shorten the prompts, or lower --max-tokens",
        )
    completions: dict[tuple[str, int], Completion] = {}
    total = len(arms) * len(prompts)
    on_event(Event(STAGE, 0, total, "answers"))
    for members in _with_the_same_names(arms):
        rows = [(arm, index) for arm in members for index in range(len(prompts))]
        rows.sort(key=lambda row: len(ids[row[0].system][row[1]]))
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            written = generate_batch(
                loaded.model, tokenizer, [ids[arm.system][index] for arm, index in batch],
                _each_its_own(loaded.model, [arm for arm, _ in batch], any_base), max_tokens=max_tokens,
                names=[prompts[index] for _, index in batch],
            )  # fmt: skip
            completions |= {(arm.name, index): each for (arm, index), each in zip(batch, written, strict=True)}
            on_event(Event(STAGE, len(completions), total, "answers"))
    ends, answers = end_tokens(loaded.model, tokenizer), {}
    for arm in arms:
        of_arm = [completions[arm.name, index] for index in range(len(prompts))]
        texts = tokenizer.batch_decode([list(c.completion_ids) for c in of_arm], skip_special_tokens=True)
        answers[arm.name] = [
            Generation(prompt, text.strip(), list(c.completion_ids), _finish(c, ends))
            for prompt, text, c in zip(prompts, texts, of_arm, strict=True)
        ]
    return answers


def _with_the_same_names(arms: Sequence[Arm]) -> list[list[Arm]]:
    """The arms in groups, within which a name means one vector or probe."""
    groups: list[tuple[dict[tuple[str, str], object], list[Arm]]] = []
    for arm in arms:
        named: dict[tuple[str, str], object] = {("vector", name): each for name, each in arm.vectors.items()}
        named |= {("probe", name): each for name, each in arm.probes.items()}
        for known, members in groups:
            if all(known.get(name, each) is each for name, each in named.items()):
                known.update(named)
                members.append(arm)
                break
        else:
            groups.append((named, [arm]))
    return [members for _, members in groups]


def _each_its_own(model: Any, rows: Sequence[Arm], any_base: bool) -> Intervention:
    """Each row of a batch under the composition of its arm."""
    if all(arm.composition is None for arm in rows):
        return no_intervention
    compositions: list[Steering] = [Composition(()) if arm.composition is None else arm.composition for arm in rows]
    vectors = {name: each for arm in rows for name, each in arm.vectors.items()}
    probes = {name: each for arm in rows for name, each in arm.probes.items()}
    return steering(model, compositions, vectors, probes=probes, any_base=any_base)


def text_figures(base: LoadedModel, answers: Mapping[str, Sequence[Generation]]) -> dict[str, TextFigures]:
    """The side effects in the answers of each arm; `base` is the unsteered model, which judges how likely they are."""
    prompts = dict.fromkeys(each.prompt for written in answers.values() for each in written)
    ids = dict(zip(prompts, rendered(list(prompts), base.tokenizer), strict=True))
    completions = [Completion(ids[each.prompt], each.ids) for written in answers.values() for each in written]
    likely = iter(Completions(base.model, completions).scores([None])[0].log_likelihoods)
    figures = {}
    for name, written in answers.items():
        scores = [float(logs.mean()) for _, logs in zip(written, likely, strict=False) if len(logs)]
        figures[name] = TextFigures(
            perplexity.combine(scores) if scores else math.nan,
            _mean([repetition(each.ids) for each in written]),
            _mean([distinct(each.ids) for each in written]),
            _mean([len(each.ids) for each in written]),
            len(written),
        )
    return figures


def distinct(ids: Sequence[int], size: int = 2) -> float:
    """The share of different n-grams among all of `size` ids (Li et al. 2016, distinct-2); 1 where there is none."""
    grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _finish(completion: Completion, ends: set[Any]) -> str:
    return "stop" if completion.completion_ids and completion.completion_ids[-1] in ends else "length"
