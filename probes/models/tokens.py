"""From examples to tokens: the ids a model sees, and the positions that count.

The first token of a sequence, special tokens and padding never count: the first one is an attention sink whose norm
would drown all others, and special tokens carry the format, not the behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from probes.data.examples import Example, Message
from vectors.errors import ExampleError, ModelError, UsageError

SHOWN = 5  # examples that a message names
_STAND_IN = "\x02completion\x03"  # control characters, which no template writes


class Tokens(NamedTuple):
    """One tokenised example: its ids, the ascending positions whose activations are averaged, and where it stands."""

    ids: list[int]
    counted: list[int]
    origin: str = ""


def choose(tokens: str) -> str | int:
    """Read the option: `completion`, `last`, `all`, or an index into the completion's tokens. Raises UsageError."""
    if tokens in ("completion", "last", "all"):
        return tokens
    try:
        return int(tokens)
    except ValueError as error:
        raise UsageError(
            f"there are no tokens {tokens!r}", "use completion, last, all, or an index such as 0 or -1"
        ) from error


def templated(examples: Sequence[Example], tokenizer: Any) -> tuple[bool, str]:
    """Whether prompts become turns of a chat, and why: a chat model's do, unless they are rendered already.

    They are where every prompt holds a special token. Raises ExampleError where some do and others do not.
    """
    prompts = [(e.context, e.origin) for e in examples if isinstance(e.context, str)]
    if not prompts:
        return False, ""
    if not getattr(tokenizer, "chat_template", None):
        return False, "prompts are taken as plain text: the model has no chat template"
    special = _special(tokenizer).values()
    held = [(next((t for t in special if t in prompt), None), origin) for prompt, origin in prompts]
    rendered = [(token, origin) for token, origin in held if token is not None]
    if not rendered:
        return True, "prompts are asked in the model's chat template"
    token, origin = rendered[0]
    if len(rendered) < len(held):
        bare = next(origin for token, origin in held if token is None)
        raise ExampleError(
            f"{len(rendered)} of {len(held)} prompts hold a special token (the first: {token} in {origin}) and the "
            f"others none (the first: {bare}), so it is not known whether they are rendered in a chat template already",
            "render all of them or none; a prompt that is only about such a token must spell it otherwise",
        )
    return False, f"prompts are taken as they are: they hold the special token {token} already"


def rendered(prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The ids of each prompt as the model expects it before its answer, by the same rules as examples.

    A user's turn where there is a chat template, unless they are rendered already. Raises ExampleError.
    """
    chat, _ = templated([Example("", prompt, origin=f"prompt {n}") for n, prompt in enumerate(prompts, 1)], tokenizer)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        if chat
        else prompt
        for prompt in prompts
    ]
    return [
        list(tokenizer(text, add_special_tokens=not chat and not _begun(text, tokenizer))["input_ids"])
        for text in texts
    ]


def _begun(text: str, tokenizer: Any) -> bool:
    """Whether a text begins with the token that would be put before it: then it has been rendered already."""
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def tokenise(
    examples: Sequence[Example],
    tokenizer: Any,
    which: str | int = "completion",
    *,
    longest: int | None = None,
    truncate: bool = False,
) -> list[Tokens]:
    """The tokens of each example. `longest` is the model's context.

    An example beyond the context is an error unless `truncate` cuts its end; so is one that has no token to count.
    All such examples are reported at once. Raises ExampleError, and ModelError for a tokenizer without offsets.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} does not say which characters a token stands for",
            "use a model with a tokenizer.json",
        )
    chat, _ = templated(examples, tokenizer)
    special = _special(tokenizer)
    found: list[Tokens] = []
    problems: list[str] = []
    too_long: list[str] = []
    for example in examples:
        try:
            text, start, stop = _render(example, tokenizer, chat)
        except ValueError as error:
            problems.append(f"{example.origin}: {error}")
            continue
        bare = not _is_chat(example, chat) and not _begun(text, tokenizer)  # a template writes its own beginning
        encoded = tokenizer(text, add_special_tokens=bare, return_offsets_mapping=True, truncation=False)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        if longest is not None and len(ids) > longest:
            too_long.append(f"{example.origin} ({len(ids)} tokens)")
            if not truncate:
                continue
            ids, offsets = ids[:longest], offsets[:longest]
        counts = [j for j in range(1, len(ids)) if ids[j] not in special]
        completion = [j for j in counts if offsets[j][1] > start and offsets[j][0] < stop]
        counted = _select(counts, completion, which)
        if not counted:
            what = f"no token {which}" if isinstance(which, int) else "no token that counts"
            problems.append(f"{example.origin}: the completion has {what} (it has {len(completion)})")
        found.append(Tokens(ids, counted, example.origin))
    hint = "the first token of a sequence and special tokens never count; give longer texts"
    if too_long and not truncate:
        names = ", ".join(too_long[:SHOWN]) + (f" and {len(too_long) - SHOWN} more" if len(too_long) > SHOWN else "")
        problems.insert(0, f"longer than the model's context of {longest} tokens: {names}")
        hint = "shorten them, or cut their ends: --truncate"
    if problems:
        more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ExampleError(problems[:SHOWN] + more, hint)
    return found


def _special(tokenizer: Any) -> dict[int, str]:
    """The special tokens by id: those with a role, and those that are only marked so (Llama 3's headers)."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return named | {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _select(counts: list[int], completion: list[int], which: str | int) -> list[int]:
    if which == "all":
        return counts
    if which == "completion":
        return completion
    index = -1 if which == "last" else int(which)
    return completion[index:][:1] if -len(completion) <= index < len(completion) else []


def _is_chat(example: Example, chat: bool) -> bool:
    return isinstance(example.context, tuple) or (isinstance(example.context, str) and chat)


def _render(example: Example, tokenizer: Any, chat: bool) -> tuple[str, int, int]:
    """The text of an example, and the characters [start, stop) of its completion in it. Raises ValueError."""
    if not _is_chat(example, chat):
        before = example.context if isinstance(example.context, str) else ""
        return before + example.completion, len(before), len(before) + len(example.completion)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("messages need a chat template, and the model has none")
    turns = example.context if isinstance(example.context, tuple) else (Message("user", str(example.context)),)
    text = _template(tokenizer, turns, example.role, example.completion)
    # Where a stand-in appears tells where the completion is, also when its words occur in the template itself.
    before, _, after = _template(tokenizer, turns, example.role, _STAND_IN).partition(_STAND_IN)
    stop = len(text) - len(after)
    # Templates strip contents, on one side or on both.
    if (
        text.startswith(before)
        and text.endswith(after)
        and text[len(before) : stop].strip() == example.completion.strip()
    ):
        return text, len(before), stop
    raise ValueError("the chat template does not show the last message as it was given")


def _template(tokenizer: Any, turns: Sequence[Message], role: str, content: str) -> str:
    """A conversation whose last message is `content`, as the model's template writes it. Raises ValueError."""
    messages = [turn._asdict() for turn in turns] + [{"role": role, "content": content}]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program of the model's maker, and raises what it likes
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    return text
