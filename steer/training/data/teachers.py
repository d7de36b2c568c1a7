"""Teachers: the model under a composition, or under a prompt that the student never sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from probes.data.examples import Example, Message
from probes.evaluation_set import AsPrompted
from probes.interventions import Intervention, no_intervention, steering
from probes.models import templates
from probes.models.completions import Completion
from probes.models.tokens import rendered, templated
from vectors.expression import Composition
from vectors.steering import SteeringVector


class Teacher(NamedTuple):
    """How the model is made to show the behaviour.

    `intervention` changes the model while it runs. `prompt_ids(prompts, tokenizer)` gives the token ids of each prompt
    as the teacher sees it; `as_prompted(examples, tokenizer)` gives examples as the teacher sees them, or None when
    they can't carry its system prompt.
    """

    intervention: Intervention
    prompt_ids: Callable[[Sequence[str], Any], list[list[int]]]
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
    """The model under a system prompt; without a chat template, under the same text in front of each prompt."""

    def prompt_ids(user_prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
        if not getattr(tokenizer, "chat_template", None):
            return rendered([f"{prompt}\n\n{user_prompt}" for user_prompt in user_prompts], tokenizer)
        turns = [(Message("user", user_prompt),) for user_prompt in user_prompts]
        texts = [templates.with_system_turn(prompt, turn, tokenizer) for turn in turns]
        return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]

    def as_prompted(examples: Sequence[Example], tokenizer: Any) -> list[Example] | None:
        chat, _ = templated(examples, tokenizer)
        prompted = []
        for example in examples:
            context = example.context
            if not isinstance(context, tuple) and not chat and getattr(tokenizer, "chat_template", None):
                return None  # already rendered, or no conversation: a system message can't be inserted
            if isinstance(context, str) and chat:
                context = (Message("user", context),)
            if not isinstance(context, tuple):
                prompted.append(example._replace(context=f"{prompt}\n\n{context or ''}"))
                continue
            first, rest = prompt, context
            if context and context[0].role == "system":  # one system message, since many templates refuse two
                first, rest = f"{prompt}\n\n{context[0].content}", context[1:]
            prompted.append(example._replace(context=(Message("system", first), *rest)))
        return prompted

    return Teacher(no_intervention, prompt_ids, as_prompted)


def after(prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> list[Completion]:
    """The same completions after other prompts, one list of token ids per completion."""
    pairs = zip(completions, prompts, strict=True)
    return [Completion(prompt, completion.completion_ids) for completion, prompt in pairs]
