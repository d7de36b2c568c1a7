"""A prompt and its completion as token ids: what is generated, scored, and trained on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from probes.data.examples import Example
from probes.models.templates import problems_of_rendering
from probes.models.tokens import special_tokens, templated, tokenise
from vectors.errors import ExampleError


class Completion(NamedTuple):
    """The ids of one prompt, and those of what follows it."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]

    @property
    def ids(self) -> list[int]:
        """The whole sequence."""
        return [*self.prompt_ids, *self.completion_ids]

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, which is where the completion begins."""
        return len(self.prompt_ids)

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return len(self.prompt_ids) + len(self.completion_ids)


def completions_of(
    examples: Sequence[Example], tokenizer: Any, context_length: int | None, *, ended: bool = True
) -> list[Completion]:
    """Each example as ids, with an end token behind its completion unless `ended` is False.

    Warns of what the chat template leaves out.
    Raises ExampleError for examples beyond `context_length` tokens, and for those whose completion has no token.
    """
    try:
        tokenised = tokenise(examples, tokenizer, "completion", longest=context_length)
    except ExampleError as error:
        raise ExampleError(error.problems, "shorten them, or leave them out") from error
    for problem in problems_of_rendering(examples, tokenizer, templated(examples, tokenizer)[0]):
        warnings.warn(problem, stacklevel=2)
    end, special = tokenizer.eos_token_id, special_tokens(tokenizer)
    completions = []
    for ids, counted, _ in tokenised:
        start, stop = counted[0], counted[-1] + 1
        # What the template writes after a completion begins with its end, which belongs to it.
        after = next((i for i in range(stop, len(ids)) if ids[i] in special), stop)
        ending = ids[stop : after + 1] or ([end] if end is not None else [])
        completions.append(Completion(ids[:start], [*ids[start:stop], *(ending if ended else ())]))
    return completions
