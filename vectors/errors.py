"""The errors of the workbench.

SteerError
├── UsageError         an option or value that is invalid for any input   (exit code 2)
├── ExampleError       example files: format, classes, lengths
├── ExpressionError    a composition that doesn't parse, or names an unknown vector
├── ArtifactError      a vector file: truncated, tampered, for another model
├── ModelError         a model reference, architecture or layer
└── OutputError        something could not be written
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

LONGEST, MOST = 2_000, 100  # characters of a problem, and problems of an error; the rest is cut off


def cut(text: str, longest: int = LONGEST) -> str:
    """A text of at most about `longest` characters: the middle of a longer one is replaced by the number left out.

    The middle, because a message says what is wrong at its beginning or end, and holds names and values between.
    """
    if len(text) <= longest:
        return text
    head, tail = longest * 2 // 3, longest // 3
    return f"{text[:head]} … ({len(text) - head - tail} more characters) … {text[-tail:]}"


def bounded(problems: Sequence[str], most: int = MOST) -> list[str]:
    """The problems, each `cut`: at most `most` of them, followed by the number of the others."""
    first = [cut(problem) for problem in problems[:most]]
    return first if len(problems) <= most else [*first, f"and {len(problems) - most} more problems"]


class SteerError(Exception):
    """What is wrong, with the value, and the next step.

    `problems` holds one sentence per problem, since all problems of an input are reported together; `hint` is the next
    step. Both are bounded here, since they may quote input of any length.
    """

    exit_code = 1

    def __init__(self, problems: str | Sequence[str], hint: str = "") -> None:
        self.problems = tuple(bounded((problems,) if isinstance(problems, str) else tuple(problems)))
        self.hint = cut(hint)
        super().__init__("\n".join(self.problems))


class UsageError(SteerError):
    """An option or value that is invalid for any input."""

    exit_code = 2


class ExampleError(SteerError):
    """Example files that can't be read as contrasting examples."""


class ExpressionError(SteerError):
    """A composition that doesn't parse, or names an unknown vector."""


class ArtifactError(SteerError):
    """A vector file that is damaged, or belongs to another model."""


class ModelError(SteerError):
    """A model that can't be found, read, or steered at the layers asked for."""


class OutputError(SteerError):
    """A file that can't be written: `path`, where it is one file."""

    def __init__(self, problems: str | Sequence[str], hint: str = "", *, path: Path | None = None) -> None:
        super().__init__(problems, hint)
        self.path = path


def guess(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` with the known name closest to `name`; empty if none is close."""
    import difflib  # imported here, since only errors need it

    near = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def shortened(names: Sequence[str]) -> str:
    """The first three names, followed by the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def first_of(problems: Sequence[str], count: int = 3) -> list[str]:
    """The first problems of a kind, followed by one that says how many more there are."""
    rest = len(problems) - count
    return list(problems) if rest <= 0 else [*problems[:count], f"and {rest} more of this kind"]


@contextlib.contextmanager
def collecting(errors: list[SteerError]) -> Iterator[None]:
    """A context in which a SteerError ends the block and is appended to `errors`, so that later checks still run."""
    try:
        yield
    except SteerError as error:
        errors.append(error)


@contextlib.contextmanager
def naming(worded: Callable[[str], str], prefix: str = "") -> Iterator[None]:
    """A context whose SteerError calls options as `worded` says, with each problem after `prefix`."""
    try:
        yield
    except SteerError as error:
        raise type(error)([prefix + worded(problem) for problem in error.problems], worded(error.hint)) from error


def raise_together(errors: Sequence[SteerError]) -> None:
    """Raise the collected errors as one, with all their problems and hints; does nothing when there are none.

    The error raised is a UsageError if any of them is, and otherwise of the class of the first.
    """
    if not errors:
        return
    kind = UsageError if any(isinstance(error, UsageError) for error in errors) else type(errors[0])
    problems = [problem for error in errors for problem in error.problems]
    raise kind(
        list(dict.fromkeys(problems)), "; ".join(dict.fromkeys(error.hint for error in errors if error.hint))
    ) from errors[0]
