"""Where a request names an arm or an expression, and the mistakes that vLLM would ignore: `stear`, a top-level `steer`.

vLLM ignores fields that it does not know, so a misspelt one would be answered unsteered.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from steer.serving.engine.admission import Admission
from steer.serving.engine.resolved import EXPRESSION, RESOLVED
from steer.serving.http.bodies import Limits

if TYPE_CHECKING:
    from steer.experiments.running.live import Live
    from steer.serving.http.followed import Followed

ARGUMENTS = "vllm_xargs"  # the field of a request that holds its expression
FORM = f'write {{"{ARGUMENTS}": {{"{EXPRESSION}": "0.8*warm"}}}}'
# The header whose value SageMaker's route puts into the field `model`.
ADAPTER_HEADER = b"x-amzn-sagemaker-adapter-identifier"

_BOOLEAN: TypeAdapter[bool] = TypeAdapter(bool)
_REMEMBERED, _LONGEST = 4096, 64  # keys of requests whose kind is remembered, and their characters at most
_WORDS = ("steer", "steers", "steered", "steering", "stearing")
# Fields in which clients put extra arguments by mistake. Others, such as `metadata` and `messages`, are the client's.
_CONTAINERS = (
    *("vllmxargs", "vllmargs", "vllmextraargs", "xargs", "extraargs", "extrabody", "extraparams", "extra"),
    *("samplingparams", "samplingargs"),
)


class Serving(NamedTuple):
    """What a server serves: its admission, which names are models, and the limits of a request's body.

    `any_model` is true where vLLM does not check names of models (VLLM_SKIP_MODEL_NAME_VALIDATION). `base` is the
    model's first name and `names` all of them, `experiments` are those that run, by name, and `adapters` the served
    names of their LoRA arms, by experiment and arm; `followed` are the arms that stand for an alias of a store.
    """

    admission: Admission
    is_model: Callable[[str], bool]
    limits: Limits
    any_model: bool = False
    base: str = ""
    names: Sequence[str] = ()
    experiments: Mapping[str, Live] = {}
    adapters: Mapping[str, Mapping[str, str]] = {}
    followed: Mapping[str, Followed] = {}
    weights_changed: Callable[[], Awaitable[None]] | None = None  # is called behind a route that changes weights

    def experiment_of(self, model: Any) -> Live | None:
        """The experiment that the field `model` of a request names, or that takes the requests for this model.

        The model may have several names, and vLLM takes a request that names none for one to it.
        """
        if not self.experiments or not isinstance(model, str | None):
            return None
        if model in self.experiments:
            return self.experiments[str(model)]
        taking = (live for live in self.experiments.values() if live.experiment.clients_call == "model")
        return next(taking, None) if not model or model in (self.base, *self.names) else None

    def names_steering(self, model: Any) -> bool:
        """Whether the field `model` of a request names an arm or an experiment."""
        return self.arm_of(model) is not None or (isinstance(model, str) and model in self.experiments)

    def arm_of(self, model: Any) -> tuple[str, str] | None:
        """The (model, arm) that the field `model` of a request names; None for a model, or for any other value."""
        if not isinstance(model, str) or ":" not in model or self.is_model(model):
            return None
        base, _, arm = model.rpartition(":")
        if self.is_model(base):
            return base, arm
        # A name such as llama3:8b may be what this client calls the model; a misspelt arm is still refused.
        if self.any_model and any(_misspelt(arm, name) for name in list(self.admission.arms)):
            return base, arm
        return None


def parsed(text: str | bytes) -> Any:
    """A JSON value; None for a text that is not JSON, which vLLM refuses itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_true(value: Any) -> bool:
    """Whether vLLM takes a value for true: it reads "false" and "off" as false, and refuses what is no boolean."""
    if value is None or isinstance(value, bool):
        return bool(value)
    try:
        return _BOOLEAN.validate_python(value)
    except ValidationError:
        return False


def resembles_steer(key: str) -> bool:
    """Whether a key looks like a misspelt `steer`."""
    return kind_of_key(key).steers


def misplaced(value: Mapping[str, Any]) -> str | None:
    """The field in which a request misspells steering, or puts it where vLLM ignores it; None when there is none."""
    extra = value.get(ARGUMENTS)
    for key in extra if isinstance(extra, dict) else ():
        if key not in (EXPRESSION, RESOLVED) and resembles_steer(key):
            return f"{ARGUMENTS}.{key}"
    for key, field in value.items():
        if key == ARGUMENTS:
            continue
        if resembles_steer(key):
            return key
        if kind_of_key(key).contains:
            inner = _asks(field)
            if inner is not None:
                return f"{key}.{inner}"
    return None


def steering_in(value: Any, serving: Serving) -> str | None:
    """The field with which a request to a route that can't be steered asks for steering; None when it does not ask.

    The whole JSON value is searched for arms as models and for expressions in extra arguments.
    """
    if isinstance(value, dict):
        top = next((key for key in value if resembles_steer(key)), None)
        if top is not None:
            return top
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            if serving.names_steering(item.get("model")):
                return "model"
            for key, field in item.items():
                if kind_of_key(key).contains:
                    inner = _asks(parsed(field) if isinstance(field, str) else field)
                    if inner is not None:
                        return f"{key}.{inner}"
        if isinstance(item, dict | list):
            rest += [part for part in _parts(item) if isinstance(part, dict | list)]
    return None


def _parts(item: Mapping[str, Any] | list[Any]) -> Iterable[Any]:
    return item if isinstance(item, list) else item.values()


def _asks(field: Any) -> str | None:
    """The key in a mapping of extra arguments, or in one inside it, that looks like ours."""
    if not isinstance(field, dict):
        return None
    for key, inner in field.items():
        if resembles_steer(key):
            return str(key)
        if isinstance(inner, dict):
            inner_key = next((k for k in inner if resembles_steer(k)), None)
            if inner_key is not None:
                return f"{key}.{inner_key}"
    return None


class KeyKind(NamedTuple):
    """Whether a key looks like a misspelt `steer`, and whether it does like a field for extra arguments."""

    steers: bool
    contains: bool


def kind_of_key(key: str) -> KeyKind:
    """What a key of a request looks like. Requests have the same keys again and again, so short ones are remembered."""
    return _remembered_kind(key) if len(key) <= _LONGEST else compared(key)


def compared(key: str) -> KeyKind:
    """`kind_of_key`, by comparing the key with all words."""
    plain = _plain(key)
    return KeyKind(
        "steer" in plain or any(_one_edit(plain, word) for word in _WORDS),
        any(plain == name or _one_edit(plain, name) for name in _CONTAINERS),
    )


_remembered_kind = functools.lru_cache(_REMEMBERED)(compared)


def _plain(key: str) -> str:
    """A key in lower case without separators."""
    return "".join(character for character in key.casefold() if character.isalnum())


def _misspelt(text: str, name: str) -> bool:
    """Whether `text` is a name, perhaps in other letters or, from three letters on, with one edit."""
    text, name = text.casefold(), name.casefold()
    return text == name or (len(name) >= 3 and _one_edit(text, name))


def _one_edit(text: str, word: str) -> bool:
    """Whether one letter added, left out, replaced, or two neighbours exchanged, turn `text` into `word`; or none."""
    if abs(len(text) - len(word)) > 1:
        return False
    start = 0
    while start < min(len(text), len(word)) and text[start] == word[start]:
        start += 1
    a, b = text[start:], word[start:]
    return (
        a == b
        or a[1:] == b[1:]
        or a[1:] == b
        or a == b[1:]
        or (len(a) > 1 and len(b) > 1 and a[:2] == b[1::-1] and a[2:] == b[2:])
    )
