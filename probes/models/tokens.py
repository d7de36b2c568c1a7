"""Tokenises examples: the token ids, and the positions whose activations count.

The first token of a sequence, special tokens and padding never count: the first is an attention sink whose norm would
dominate every mean, and special tokens carry the format, not the behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from probes.data.examples import Example, Message
from probes.models import templates
from vectors.errors import ExampleError, ModelError, UsageError

SHOWN = 5  # most examples that an error message names
_STAND_IN = "\x02completion\x03"  # control characters, which templates do not write


class Tokens(NamedTuple):
    """One tokenised example: ids, the ascending positions whose activations are averaged, and origin (FILE:LINE).

    Not a `Completion`, which is a prompt and all that follows it: here any positions may count, such as the last one.
    """

    ids: list[int]
    counted: list[int]
    origin: str = ""


def choose(tokens: str) -> str | int:
    """Parse --tokens: `completion`, `last`, `all`, or an index into the completion's tokens. Raises UsageError."""
    if tokens in ("completion", "last", "all"):
        return tokens
    try:
        return int(tokens)
    except ValueError as error:
        raise UsageError(
            f"there are no tokens {tokens!r}", "use completion, last, all, or an index such as 0 or -1"
        ) from error


def templated(examples: Sequence[Example], tokenizer: Any) -> tuple[bool, str]:
    """Whether prompts are put into the chat template as user messages, and why.

    They are if the model has a template, unless all prompts contain a special token and so are rendered already. Raises
    ExampleError if only some of them do.
    """
    prompts = [(e.context, e.origin) for e in examples if isinstance(e.context, str)]
    if not prompts:
        return False, ""
    if not getattr(tokenizer, "chat_template", None):
        return False, "prompts are taken as plain text: the model has no chat template"
    special = special_tokens(tokenizer).values()
    special_in = [(next((t for t in special if t in prompt), None), origin) for prompt, origin in prompts]
    rendered = [(token, origin) for token, origin in special_in if token is not None]
    if not rendered:
        return True, "prompts are asked in the model's chat template"
    token, origin = rendered[0]
    if len(rendered) < len(special_in):
        bare = next(origin for token, origin in special_in if token is None)
        raise ExampleError(
            f"{len(rendered)} of {len(special_in)} prompts hold a special token (the first: {token} in {origin}) and "
            f"the others none (the first: {bare}), so it is not known whether they are rendered in a chat template "
            "already",
            "render all of them or none; a prompt that is only about such a token must spell it otherwise",
        )
    return False, f"prompts are taken as they are: they hold the special token {token} already"


def rendered(prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The token ids of each prompt, ready for generation.

    A prompt becomes a user message of the chat template, if there is one and it is not rendered already (`templated`).
    Raises ExampleError.
    """
    chat, _ = templated([Example("", prompt, origin=f"prompt {n}") for n, prompt in enumerate(prompts, 1)], tokenizer)
    if not chat:
        return plain_ids(prompts, tokenizer)
    ids, problems = [], []
    for number, prompt in enumerate(prompts, 1):
        try:
            text = templates.render((Message("user", prompt),), tokenizer, answer=True)
        except ValueError as error:
            problems.append(f"prompt {number}: {error}")
            continue
        if prompt.strip() not in text:
            problems.append(f"prompt {number}: the model's chat template leaves out what the user says")
        ids.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
    if problems:
        raise ExampleError(problems[:SHOWN], "use a model whose chat template writes user turns")
    return ids


def plain_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The token ids of texts that no template renders: with the tokenizer's BOS or the like, and without its EOS."""
    beginning = beginning_of(texts, tokenizer)
    return [_begun(list(tokenizer(text, add_special_tokens=False)["input_ids"]), beginning) for text in texts]


def beginning_of(texts: Sequence[str], tokenizer: Any) -> list[int]:
    """The ids that belong in front of plain texts: what the tokenizer puts there, such as BOS.

    What it puts behind a text (many tokenizers write an end token there) belongs to none: it would tell the model that
    the text is over. Texts that are rendered in the chat template already begin as the template begins.
    """
    beginning = templates.beginning_of(tokenizer)
    special = special_tokens(tokenizer).values()
    is_rendered = getattr(tokenizer, "chat_template", None) and any(t in text for text in texts for t in special)
    if beginning and is_rendered:
        try:
            conversation = templates.render((Message("user", "Hi"),), tokenizer)
        except ValueError:
            return beginning
        ids = list(tokenizer(conversation, add_special_tokens=False)["input_ids"])
        return beginning if ids[: len(beginning)] == beginning else []
    return beginning


def _begun(ids: list[int], beginning: list[int]) -> list[int]:
    """The ids with `beginning` in front, unless they begin with it already."""
    return ids if ids[: len(beginning)] == beginning else [*beginning, *ids]


def tokenise(
    examples: Sequence[Example],
    tokenizer: Any,
    which: str | int = "completion",
    *,
    longest: int | None = None,
    truncate: bool = False,
) -> list[Tokens]:
    """The tokens of each example; `which` selects those that count, `longest` is the model's context length.

    Raises ExampleError with all examples that are longer than the context (unless `truncate` cuts their ends) or have
    no token that counts; ModelError for a tokenizer without offsets.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} does not say which characters a token stands for",
            "use a model with a tokenizer.json",
        )
    chat, _ = templated(examples, tokenizer)
    beginning = beginning_of([e.context for e in examples if isinstance(e.context, str)], tokenizer)
    special = special_tokens(tokenizer)
    tokenised: list[Tokens] = []
    problems: list[str] = []
    too_long: list[str] = []
    for example in examples:
        try:
            text, start, stop = _render(example, tokenizer, chat)
        except ValueError as error:
            problems.append(f"{example.origin}: {error}")
            continue
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False)
        ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        if not templates.turns_of(example, chat):  # a template writes BOS itself
            ids = _begun(ids, beginning)
            offsets = [(0, 0)] * (len(ids) - len(offsets)) + offsets
        if longest is not None and len(ids) > longest:
            too_long.append(f"{example.origin} ({len(ids)} tokens)")
            if not truncate:
                continue
            ids, offsets = ids[:longest], offsets[:longest]
        counts = [j for j in range(1, len(ids)) if ids[j] not in special]
        completion = [j for j in counts if offsets[j][1] > start and offsets[j][0] < stop]
        counted = _select(counts, completion, which)
        if not counted:
            missing = f"no token {which}" if isinstance(which, int) else "no token that counts"
            problems.append(f"{example.origin}: the completion has {missing} (it has {len(completion)})")
        tokenised.append(Tokens(ids, counted, example.origin))
    hint = "the first token of a sequence and special tokens never count; give longer texts"
    if too_long and not truncate:
        names = ", ".join(too_long[:SHOWN]) + (f" and {len(too_long) - SHOWN} more" if len(too_long) > SHOWN else "")
        problems.insert(0, f"longer than the model's context of {longest} tokens: {names}")
        hint = "shorten them, or cut their ends: --truncate"
    if problems:
        more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ExampleError(problems[:SHOWN] + more, hint)
    return tokenised


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The special tokens by id: BOS, EOS and the like, and those only marked as special (Llama 3's headers)."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return named | {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _select(counts: list[int], completion: list[int], which: str | int) -> list[int]:
    if which == "all":
        return counts
    if which == "completion":
        return completion
    index = -1 if which == "last" else int(which)
    return completion[index:][:1] if -len(completion) <= index < len(completion) else []


def _render(example: Example, tokenizer: Any, chat: bool) -> tuple[str, int, int]:
    """The text of an example, and the characters [start, stop) of its completion in it. Raises ValueError."""
    turns = templates.turns_of(example, chat)
    if not turns:
        before = example.context if isinstance(example.context, str) else ""
        return before + example.completion, len(before), len(before) + len(example.completion)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("messages need a chat template, and the model has none")
    text = templates.render(turns, tokenizer)
    # A placeholder locates the completion, even if its words also occur elsewhere in the rendered text.
    marked = templates.render((*turns[:-1], turns[-1]._replace(content=_STAND_IN)), tokenizer)
    before, _, after = marked.partition(_STAND_IN)
    stop = len(text) - len(after)
    # Templates strip contents, on one side or on both.
    if (
        text.startswith(before)
        and text.endswith(after)
        and text[len(before) : stop].strip() == example.completion.strip()
    ):
        return text, len(before), stop
    raise ValueError("the chat template changes the text of the last message")
