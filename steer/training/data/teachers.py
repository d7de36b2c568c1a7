"""Teachers: the model under a composition, or under a prompt that the student never sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from probes.data.examples import Example, Message
from probes.evaluation_set import AsPrompted
from probes.interventions import Intervention, no_intervention, steering
from probes.models.completions import Completion
from probes.models.tokens import rendered, templated
from vectors.errors import UsageError
from vectors.expression import Composition
from vectors.steering import SteeringVector


class Teacher(NamedTuple):
    """How the model is made to show the behaviour.

    `intervention` is what is done to the model while it runs; `asked` gives the ids of prompts as the teacher is asked
    them, `as_prompted` examples as the teacher sees them, or None.
    """

    intervention: Intervention
    asked: Any  # from prompts and a tokenizer to a list of ids
    as_prompted: AsPrompted


def by_composition(
    model: Any, composition: Composition, vectors: Mapping[str, SteeringVector], any_base: bool
) -> Teacher:
    """The model under a composition."""
    intervention = steering(model, composition, vectors, any_base=any_base)
    return Teacher(intervention, rendered, lambda examples, _: list(examples))


def first_layer(composition: Composition, vectors: Mapping[str, SteeringVector]) -> int:
    """The lowest layer at which a composition acts."""
    return min(i for t in composition.terms for i in vectors[t.name].acting(t.layers))


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

    def as_prompted(examples: Sequence[Example], tokenizer: Any) -> list[Example] | None:
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

    return Teacher(no_intervention, asked, as_prompted)


def after(prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> list[Completion]:
    """The same completions after other prompts (ids)."""
    pairs = zip(completions, prompts, strict=True)
    return [Completion(prompt, completion.completion_ids) for completion, prompt in pairs]
