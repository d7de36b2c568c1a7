"""Which tokens of a text are read: those of an extraction, or the last of a prompt as a server sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from probes.data.examples import Example, Message
from probes.models import templates, tokens
from probes.models.tokens import Tokens
from vectors.errors import ExampleError, SteerError, UsageError, collecting

PROMPT = "prompt"  # of --tokens


def require_tokens(which: str) -> None:
    """Refuse a value of --tokens that is none. Raises UsageError."""
    if which != PROMPT:
        try:
            tokens.choose(which)
        except UsageError as error:
            raise UsageError(error.problems, f"{error.hint}; or {PROMPT}, the last token of the prompt") from error


def tokenised(
    examples: Sequence[Example], tokenizer: Any, which: str, *, longest: int | None, truncate: bool = False
) -> list[Tokens]:
    """The tokens of each example; `which` selects those that count, as of `tokens.tokenise`, or is `prompt`.

    With `prompt` an example is what comes before its completion (the completion itself for a plain text), as a request
    to a server: in the chat template, up to where the answer begins. Its last token counts, whatever it is: it is what
    a condition `@when:` reads. Raises ExampleError, ModelError, UsageError.
    """
    if which != PROMPT:
        return tokens.tokenise(examples, tokenizer, tokens.choose(which), longest=longest, truncate=truncate)
    found: list[Tokens] = []
    problems: list[str] = []
    for example in examples:
        errors: list[SteerError] = []
        with collecting(errors):
            ids = _prompt_ids(example, tokenizer)
        if errors:
            problems += [f"{example.origin}: {problem}" for problem in errors[0].problems]
            continue
        if longest is not None and len(ids) > longest:
            problems.append(f"{example.origin}: longer than the model's context of {longest} tokens ({len(ids)})")
        elif not ids:
            problems.append(f"{example.origin}: the prompt has no token")
        found.append(Tokens(ids, [len(ids) - 1], example.origin))
    if problems:
        more = [f"… and {len(problems) - tokens.SHOWN} more"] if len(problems) > tokens.SHOWN else []
        raise ExampleError(problems[: tokens.SHOWN] + more, "shorten these prompts, or leave them out")
    return found


def _prompt_ids(example: Example, tokenizer: Any) -> list[int]:
    context = example.context
    if isinstance(context, tuple) and context:
        try:
            text = templates.render(context, tokenizer, answer=True)
        except ValueError as error:
            raise ExampleError(str(error), "") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if isinstance(context, tuple):  # a conversation of one turn
        context = Message(example.role, example.completion).content
    return tokens.rendered([example.completion if context is None else context], tokenizer)[0]
