"""Teachers: the model under a composition, or under a prompt that the student never sees."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from probes.data.examples import Example, Message
from probes.models.tokens import rendered, templated
from probes.scores import divergence
from probes.scores.divergence import Row, Within
from probes.steered import steered
from steer.training.data.sampling import Batched
from vectors.errors import UsageError
from vectors.expression import Composition
from vectors.steering import SteeringVector

Told = Callable[[Sequence[Example], Any], list[Example] | None]  # from examples and a tokenizer


class Teacher(NamedTuple):
    """How the model is made to show the behaviour.

    `within` is the context for rows by their prompts' lengths, `batched` the one for a generation; `asked` gives the
    ids of prompts as the teacher is asked them, `told` examples as the teacher sees them, or None.
    """

    within: Within
    batched: Batched
    asked: Any  # from prompts and a tokenizer to a list of ids
    told: Told
    first: int  # the lowest layer at which anything happens


def by_composition(
    model: Any, composition: Composition, vectors: Mapping[str, SteeringVector], any_base: bool
) -> Teacher:
    """The model under a composition."""

    def within(prompts: Sequence[int]) -> AbstractContextManager[None]:
        return steered(model, composition, vectors=vectors, prompt_length=prompts, any_base=any_base)

    def batched() -> AbstractContextManager[None]:
        return steered(model, composition, vectors=vectors, any_base=any_base)

    layers = [i for t in composition.terms for i in (t.layers if t.layers is not None else vectors[t.name].apply)]
    return Teacher(within, batched, rendered, lambda examples, _: list(examples), min(layers))


def by_prompt(prompt: str) -> Teacher:
    """The model that is told how to behave, in the system's turn or before a plain prompt."""

    def asked(prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
        if not getattr(tokenizer, "chat_template", None):
            return rendered([f"{prompt}\n\n{one}" for one in prompts], tokenizer)
        found = []
        for one in prompts:
            turns = [{"role": "system", "content": prompt}, {"role": "user", "content": one}]
            try:
                text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a template is a program of the model's maker, and raises what it likes
                raise UsageError(
                    f"the chat template refuses a system turn: {error}", "steer the teacher by a vector instead"
                ) from error
            found.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
        return found

    def told(examples: Sequence[Example], tokenizer: Any) -> list[Example] | None:
        chat, _ = templated(examples, tokenizer)
        found = []
        for example in examples:
            context = example.context
            if not isinstance(context, tuple) and not chat and getattr(tokenizer, "chat_template", None):
                return None  # rendered already, or no conversation: there is no place for a system's turn
            if isinstance(context, str) and chat:
                context = (Message("user", context),)
            if not isinstance(context, tuple):
                found.append(example._replace(context=f"{prompt}\n\n{context or ''}"))
                continue
            first, rest = prompt, context
            if context and context[0].role == "system":  # one system turn, as templates want it
                first, rest = f"{prompt}\n\n{context[0].content}", context[1:]
            found.append(example._replace(context=(Message("system", first), *rest)))
        return found

    return Teacher(divergence.plain, contextlib.nullcontext, asked, told, 0)


def as_student(rows: Sequence[Row], prompts: Sequence[Sequence[int]]) -> list[Row]:
    """The same completions after the prompts as the student is asked them."""
    return [Row([*prompt, *row.said], len(prompt)) for row, prompt in zip(rows, prompts, strict=True)]
