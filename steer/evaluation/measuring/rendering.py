"""Items as token ids: the completions that are scored of each, and how its figure follows from their likelihoods."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from probes.data.examples import Example, Message
from probes.models import templates
from probes.models.completions import Completion, completions_of
from probes.models.tokens import beginning_of, plain_ids, templated
from steer.evaluation.suites.items import Choice, Item, Pair
from vectors.errors import UsageError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ORDERS = 2  # of the options: as they stand, and reversed

# From the log-likelihood of each completion (the sum over its tokens, in nats) to the figure of the item.
Figure = Callable[[Sequence[float]], float]


class Rendered(NamedTuple):
    """One item for the model: the completions to score, and the item's figure from their log-likelihoods."""

    completions: list[Completion]
    figure: Figure


def rendered_items(
    items: Sequence[Item], tokenizer: Any, context_length: int | None, system: str | None = None
) -> list[Rendered]:
    """Each item as completions, behind the system prompt `system` if there is one.

    A system prompt becomes the system turn of the chat template; without a template it is put in front of the text.
    The tokens that are scored are the same with and without it. Raises ExampleError for items beyond `context_length`,
    UsageError for a template that has no system turn.
    """
    pairs = [example for item in items if isinstance(item, Pair) for example in (item.positive, item.negative)]
    answers = [answer for item in items if isinstance(item, Choice) for answer in answers_of(item)]
    scored = iter(_completions(pairs, tokenizer, context_length, system, ended=True))
    answered = iter(_completions(answers, tokenizer, context_length, system, ended=False))
    rendered: list[Rendered] = []
    for item in items:
        if isinstance(item, Pair):
            completions = [next(scored), next(scored)]
            lengths = [len(completion.completion_ids) for completion in completions]
            rendered.append(Rendered(completions, margin(*lengths)))
        else:
            completions = [next(answered) for _ in range(ORDERS * len(item.options))]
            rendered.append(Rendered(completions, log_odds(item)))
    return rendered


def margin(positive: int, negative: int) -> Figure:
    """The figure of a pair whose completions have so many tokens: the difference of log-likelihoods per token."""
    return lambda sums: sums[0] / positive - sums[1] / negative


def log_odds(item: Choice) -> Figure:
    """The figure of a choice: log p(positive) - log sum p(others), averaged over both orders of the options."""
    count = len(item.options)

    def figure(sums: Sequence[float]) -> float:
        odds = []
        for order in range(ORDERS):
            of_order = list(sums[order * count : (order + 1) * count])
            positive = of_order.pop(item.positive)
            odds.append(positive - _log_sum(of_order))
        return sum(odds) / ORDERS

    return figure


def answers_of(item: Choice) -> list[Example]:
    """The question with each answer, first with the options as they stand, then reversed.

    Within both orders the answers are in the order of `options`.
    """
    examples = []
    indices = list(range(len(item.options)))
    for order in (indices, indices[::-1]):
        listed = [item.options[index] for index in order]
        if item.letters:
            lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, listed, strict=False)]
            question = "\n".join([f"{item.question}\n\nChoices:", *lines])
            answers = [f"({LETTERS[order.index(index)]})" for index in indices]
        else:
            question = f"{item.question}\n\nAnswer {', '.join(listed[:-1])} or {listed[-1]}."
            answers = list(item.options)
        examples += [Example(answer, question, origin=item.origin or item.id) for answer in answers]
    return examples


def _log_sum(values: Sequence[float]) -> float:
    highest = max(values)
    return highest + math.log(sum(math.exp(value - highest) for value in values))


def _completions(
    examples: Sequence[Example], tokenizer: Any, context_length: int | None, system: str | None, *, ended: bool
) -> list[Completion]:
    if not examples:
        return []
    plain = [example for example in examples if example.context is None]
    prompted = [example for example in examples if example.context is not None]
    if system is not None:
        prompted = [_behind(system, example, tokenizer, examples) for example in prompted]
    of_plain = iter(completions_of(plain, tokenizer, context_length, ended=ended) if plain else [])
    of_prompted = iter(completions_of(prompted, tokenizer, context_length, ended=ended) if prompted else [])
    completions = [next(of_plain) if example.context is None else next(of_prompted) for example in examples]
    if system is None or not plain:
        return completions
    prefix, skipped = _prefix(system, tokenizer), len(beginning_of([], tokenizer))
    return [
        completion
        if example.context is not None
        else Completion([*prefix, *completion.prompt_ids[skipped:]], completion.completion_ids)
        for example, completion in zip(examples, completions, strict=True)
    ]


def _behind(system: str, example: Example, tokenizer: Any, examples: Sequence[Example]) -> Example:
    """An example with a context, behind a system turn; without a chat template, behind the same text."""
    if isinstance(example.context, tuple):
        return example._replace(context=(Message("system", system), *example.context))
    assert example.context is not None
    if templated(examples, tokenizer)[0]:
        return example._replace(context=(Message("system", system), Message("user", example.context)))
    return example._replace(context=f"{system}\n\n{example.context}")


def _prefix(system: str, tokenizer: Any) -> list[int]:
    """What stands before a plain text under a system prompt: its turn and the beginning of the answer, if possible."""
    if getattr(tokenizer, "chat_template", None):
        try:
            text = templates.with_system_turn(system, (), tokenizer)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        except UsageError:
            pass  # a template that wants a user turn after a system turn
    return plain_ids([f"{system}\n\n"], tokenizer)[0]
