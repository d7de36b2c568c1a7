"""The model's chat template: rendering conversations, and noticing what it leaves out of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from probes.data.examples import Example, Message
from vectors.errors import UsageError


def render(turns: Sequence[Message], tokenizer: Any, *, answer: bool = False) -> str:
    """A conversation as the model's template writes it; with `answer`, up to where the model's own turn begins.

    Raises ValueError with the template's reason.
    """
    messages = [turn._asdict() for turn in turns]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except Exception as error:  # a template is code of the model's author and may raise anything
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    return text


def beginning_of(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts in front of a plain text: often BOS, often nothing."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:start]


def left_out(turns: Sequence[Message], tokenizer: Any) -> list[Message]:
    """The turns of a conversation whose text the template does not write. Raises ValueError for one that it refuses."""
    # Placeholders show a turn that is dropped even where its words also occur in another turn.
    marks = [f"\x02turn {number}\x03" for number in range(len(turns))]
    marked = render([turn._replace(content=mark) for turn, mark in zip(turns, marks, strict=True)], tokenizer)
    text = render(turns, tokenizer)
    return [
        turn for turn, mark in zip(turns, marks, strict=True) if mark not in marked or turn.content.strip() not in text
    ]


def problems_of_rendering(examples: Sequence[Example], tokenizer: Any, chat: bool) -> list[str]:
    """What the template leaves out of the examples' conversations, as a sentence with figures for each role.

    `chat`: prompts are put into the template too, as user turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        return []
    lost: dict[str, list[str]] = {}
    conversations = [turns for example in examples if (turns := turns_of(example, chat))]
    origins = [example.origin for example in examples if turns_of(example, chat)]
    for turns, origin in zip(conversations, origins, strict=True):
        try:
            roles = {turn.role for turn in left_out(turns, tokenizer)}
        except ValueError:
            continue  # reported where the example is tokenised
        for role in roles:
            lost.setdefault(role, []).append(origin)
    return [
        f"the model's chat template leaves out what the {role} says, in {len(where)} of {len(conversations)} "
        f"conversations{f' (the first: {where[0]})' if where[0] else ''}"
        for role, where in sorted(lost.items())
    ]


def turns_of(example: Example, chat: bool) -> tuple[Message, ...]:
    """The conversation that an example is put into the template as; empty for a plain text."""
    if isinstance(example.context, tuple):
        return (*example.context, Message(example.role, example.completion))
    if isinstance(example.context, str) and chat:
        return (Message("user", example.context), Message(example.role, example.completion))
    return ()


def with_system_turn(prompt: str, turns: Sequence[Message], tokenizer: Any) -> str:
    """A conversation behind the system turn `prompt`, as the template writes it, up to the model's answer.

    Raises UsageError for a template that refuses a system turn, or leaves it out.
    """
    conversation = (Message("system", prompt), *turns)
    try:
        text = render(conversation, tokenizer, answer=True)
        lost = [turn for turn in left_out(conversation, tokenizer) if turn.role == "system"]
    except ValueError as error:
        raise UsageError(f"{error} (they begin with a system turn)", "steer by a vector instead") from error
    if lost:
        raise UsageError(
            f"the model's chat template leaves out the system turn: the {len(prompt)} characters of the prompt would "
            "change nothing",
            "steer by a vector instead, or use a model whose chat template writes system turns",
        )
    return text
