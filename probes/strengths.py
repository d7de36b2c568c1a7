"""Side-by-side generation: each prompt at several strengths or system prompts, with the same random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from probes.data.examples import Message
from probes.gates import Decided, Decisions
from probes.generation import end_tokens, generate_batch
from probes.interventions import no_intervention
from probes.logits import completion_logits
from probes.models import templates
from probes.models.completions import Completion
from probes.models.loading import LoadedModel, OpenedModel
from probes.models.markers import given_markers, require_sections
from probes.models.residual import context_length, text_part
from probes.models.tokens import plain_ids, rendered
from probes.scores import Measured, likelihood
from probes.scores.repetition import repetition
from probes.steered import steered
from vectors import fit, references
from vectors.errors import SteerError, UsageError, collecting, raise_together
from vectors.events import Event, OnEvent, ignore
from vectors.expression import Composition, Condition
from vectors.probe import Probe
from vectors.steering import SteeringVector

ROWS = 64  # most rows of a batch


class Column(NamedTuple):
    """A column of the comparison: the strength of the composition, and a system prompt or None."""

    strength: float = 0.0
    system: str | None = None


class Answer(NamedTuple):
    """A completion as text, with what was measured of it."""

    text: str
    tokens: int  # an end token included
    finish: str  # "stop" at an end token, else "length"
    repeated_4grams: float  # the share of its 4-grams that occurred before
    perplexity: float  # under the unsteered model without a system prompt; NaN if empty or not scored
    decisions: tuple[Decided, ...] = ()  # what the conditions of the composition decided


def require_fitting(
    opened: OpenedModel,
    vectors: Mapping[str, SteeringVector],
    probes: Mapping[str, Probe | SteeringVector],
    prompts: Sequence[str],
    columns: Sequence[Column] = (Column(),),
    *,
    conditions: Sequence[Condition] = (),
    markers: Mapping[str, Sequence[str]] | None = None,
    max_tokens: int,
    any_base: bool = False,
) -> None:
    """Refuse, before a model's weights are loaded, vectors and probes that do not fit it, prompts beyond its context,
    and sections among `conditions` whose markers it does not have. `markers` are those that are given.

    Raises one error with all problems: ArtifactError, UsageError or ExampleError.
    """
    text = text_part(opened.config)
    errors: list[SteerError] = []
    with collecting(errors):
        fit.require_fit(
            [*vectors.items(), *probes.items()],
            hidden_size=int(text.hidden_size),
            layers=int(text.num_hidden_layers),
            base=references.identified(opened.source, opened.identity),
            any_base=any_base,
        )
    with collecting(errors):
        require_sections(conditions, given_markers(opened.tokenizer, markers))
    with collecting(errors):
        _prompt_ids(prompts, columns, opened.tokenizer, opened.config, max_tokens)
    raise_together(errors)


def try_strengths(
    loaded: LoadedModel,
    composition: Composition,
    vectors: Mapping[str, str | Path | SteeringVector],
    prompts: Sequence[str],
    strengths: Sequence[float],
    *,
    max_tokens: int = 60,
    temperature: float = 0.0,
    seed: int = 0,
    any_base: bool = False,
) -> list[list[str]]:
    """The completion of each prompt (rows) at each strength (columns), as text.

    With `temperature` above 0 every strength of a prompt draws from the same random numbers, so that what differs is
    the steering. Prompts are rendered in the chat template by the rules of `probes.models.tokens.templated`.
    Raises UsageError for a prompt beyond the context, ExampleError for prompts of which only some are rendered already.
    """
    columns = [Column(strength) for strength in strengths]
    answers = try_columns(
        loaded, composition, vectors, prompts, columns, max_tokens=max_tokens, temperature=temperature, seed=seed,
        any_base=any_base, scored=False,
    )  # fmt: skip
    return [[answer.text for answer in row] for row in answers]


def try_columns(
    loaded: LoadedModel,
    composition: Composition | None,
    vectors: Mapping[str, str | Path | SteeringVector],
    prompts: Sequence[str],
    columns: Sequence[Column],
    *,
    probes: Mapping[str, Probe | SteeringVector] | None = None,
    max_tokens: int = 60,
    temperature: float = 0.0,
    seed: int = 0,
    any_base: bool = False,
    scored: bool = True,
    on_event: OnEvent = ignore,
) -> list[list[Answer]]:
    """The answer to each prompt (rows) in each column; without a composition nothing is steered.

    All columns of a prompt draw from the same random numbers. `probes` are what conditions read, where `vectors` has
    it not. Columns at strength 0 read them too. `scored` measures perplexities. Raises as `try_strengths`
    does.
    """
    model, tokenizer, width = loaded.model, loaded.tokenizer, len(columns)
    ids = _prompt_ids(prompts, columns, tokenizer, model.config, max_tokens)
    plain = rendered(prompts, tokenizer)
    by_column = [composition.scaled(column.strength) for column in columns] if composition is not None else None
    completions: list[Completion] = []
    decisions: list[tuple[Decided, ...]] = []
    per_batch = max(1, ROWS // width)
    for start in range(0, len(prompts), per_batch):
        on_event(Event("generating", start, len(prompts), "prompts"))
        part = range(start, min(start + per_batch, len(prompts)))

        decided: list[Decisions] = []

        @contextmanager
        def in_each_column(
            _lengths: Sequence[int], rows: int = len(part), decided: list[Decisions] = decided
        ) -> Iterator[None]:
            within = steered(model, (by_column or []) * rows, vectors=vectors, probes=probes, any_base=any_base)
            with within as each:
                decided.append(each)
                yield

        batch = generate_batch(
            model, tokenizer, [ids[i][column] for i in part for column in range(width)],
            no_intervention if by_column is None else in_each_column, max_tokens=max_tokens, temperature=temperature,
            seed=seed, names=[prompts[i] for i in part for _ in range(width)],
        )  # fmt: skip
        completions += batch
        # A row's conditions are those of its column, which are those of the whole composition.
        decisions += [
            tuple(decided[0].of_row(row, len(each.completion_ids))) if decided else () for row, each in enumerate(batch)
        ]
    perplexities = [math.nan] * len(completions)
    if scored:
        nonempty = [i for i, completion in enumerate(completions) if completion.completion_ids]
        unsteered = [Completion(plain[i // width], completions[i].completion_ids) for i in nonempty]
        for position, logits in completion_logits(model, unsteered):
            log_likelihood = likelihood.score(Measured(unsteered[position], logits))
            perplexities[nonempty[position]] = math.exp(-log_likelihood)
    texts = tokenizer.batch_decode([c.completion_ids for c in completions], skip_special_tokens=True)
    ends = end_tokens(model, tokenizer)
    answers = [
        Answer(
            text.strip(),
            len(completion.completion_ids),
            "stop" if completion.completion_ids and completion.completion_ids[-1] in ends else "length",
            repetition(completion.completion_ids),
            perplexity,
            decided_of_row,
        )
        for text, completion, perplexity, decided_of_row in zip(
            texts, completions, perplexities, decisions, strict=True
        )
    ]
    return [answers[i : i + width] for i in range(0, len(answers), width)]


def _prompt_ids(
    prompts: Sequence[str], columns: Sequence[Column], tokenizer: Any, config: Any, max_tokens: int
) -> list[list[list[int]]]:
    """The ids of each prompt (rows) in each column.

    Raises UsageError for one that leaves no room for an answer, or a system prompt that the template drops; and as
    `rendered` does.
    """
    by_system = {system: with_system(prompts, system, tokenizer) for system in {column.system for column in columns}}
    ids = [[by_system[column.system][row] for column in columns] for row in range(len(prompts))]
    limit = context_length(config)
    longest = max(len(prompt) for row in ids for prompt in row)
    if limit is not None and longest + max_tokens > limit:
        raise UsageError(
            f"the longest prompt has {longest} tokens; {max_tokens} more exceed the model's context of {limit}",
            "shorten the prompt, or lower --max-tokens",
        )
    return ids


def with_system(prompts: Sequence[str], system: str | None, tokenizer: Any) -> list[list[int]]:
    """The ids of the prompts behind a system turn; without a chat template, behind the same text."""
    if system is None:
        return rendered(prompts, tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        return plain_ids([f"{system}\n\n{prompt}" for prompt in prompts], tokenizer)
    texts = [templates.with_system_turn(system, (Message("user", prompt),), tokenizer) for prompt in prompts]
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
