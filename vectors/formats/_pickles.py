"""The values in a pickle of torch.save, without unpickling: nothing is called, imported or looked up by name.

Python's `pickletools` splits a pickle into opcodes without executing them; only those of tensors and plain values are
interpreted here. torch's own reader with `weights_only` calls functions of a list, some of which allocate any amount
of memory; a reader in a child process would need limits that hold on every system. This one does a bounded number of
steps, each of which makes at most one value of the size of its part of the file.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

OPCODES = 100_000  # a vector of 1,000 layers in a dictionary of dictionaries takes 60,000
LARGEST = 8_000_000  # bytes of a pickle


class NotPlain(Exception):
    """The pickle holds more than tensors and plain values; the message names it."""


class Global(NamedTuple):
    """A function or class that a pickle names. It is never looked up."""

    module: str
    name: str


class Storage(NamedTuple):
    """The numbers behind a tensor: torch's name of the class for the dtype, a key in the file, how many elements."""

    kind: str
    key: str
    elements: int


class Strided(NamedTuple):
    """A tensor as a view of a storage: an offset, sizes and strides, in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


_REBUILD = ("_rebuild_tensor_v2", "_rebuild_tensor")
_PUSHED = {
    "NONE": None, "NEWTRUE": True, "NEWFALSE": False,
}  # fmt: skip
_ARGUMENTS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "INT", "LONG", "FLOAT", "UNICODE",
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


def read(file: io.BytesIO) -> Any:
    """The value of the next pickle of `file`, with `Strided` for tensors.

    Raises NotPlain for a pickle that holds anything else, ValueError for a damaged one.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    steps = 0
    try:
        for opcode, argument, _ in pickletools.genops(file):
            steps += 1
            if steps > OPCODES:
                raise ValueError(f"it has more than {OPCODES:,} steps")
            name = opcode.name
            if name in _ARGUMENTS:
                stack.append(argument)
            elif name in _PUSHED:
                stack.append(_PUSHED[name])
            elif name in ("PROTO", "FRAME"):
                continue
            elif name == "STOP":
                value = stack.pop()
                if stack:
                    raise ValueError("it ends in the middle of a value")
                return value
            else:
                _step(name, argument, stack, memo)
    except (IndexError, KeyError, TypeError, UnicodeError, OverflowError) as error:
        raise ValueError(f"it is not a whole pickle ({error})") from error
    raise ValueError("it ends before its content does")


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """One opcode that is not a plain value."""
    if name == "MARK":
        stack.append(_MARK)
    elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
        memo[int(argument)] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET", "GET"):
        stack.append(memo[int(argument)])
    elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
        stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
    elif name in _TUPLES:
        count = _TUPLES[name]
        items = stack[-count:]
        if len(items) < count or any(item is _MARK for item in items):
            raise ValueError("it is not a whole pickle")
        stack[-count:] = [tuple(items)]
    elif name == "TUPLE":
        stack.append(tuple(_to_mark(stack)))
    elif name in ("LIST", "DICT"):
        items = _to_mark(stack)
        stack.append(list(items) if name == "LIST" else _filled({}, items))
    elif name in ("APPEND", "APPENDS"):
        items = _to_mark(stack) if name == "APPENDS" else [stack.pop()]
        target = stack[-1]
        if not isinstance(target, list):
            raise ValueError("it appends to what is no list")
        target.extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        if name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            items = [key, value]
        else:
            items = _to_mark(stack)
        _filled(stack[-1], items)
    elif name == "GLOBAL":
        module, _, attribute = str(argument).partition(" ")
        stack.append(Global(module, attribute))
    elif name == "STACK_GLOBAL":
        attribute, module = stack.pop(), stack.pop()
        if not isinstance(attribute, str) or not isinstance(module, str):
            raise ValueError("it names something by what is no text")
        stack.append(Global(module, attribute))
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop()))
    elif name == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_called(function, arguments))
    elif name == "BUILD":
        state = stack.pop()
        if not isinstance(stack[-1], dict) or not isinstance(state, dict):
            raise NotPlain("an object with a state")
    else:
        raise NotPlain(f"the opcode {name}")


def _to_mark(stack: list[Any]) -> list[Any]:
    items = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _filled(target: Any, items: Sequence[Any]) -> dict[Any, Any]:
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("it sets items of what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Long integers could be chosen to have one hash, tuples to take for ever to hash.
        if not isinstance(key, str | int | None) or (isinstance(key, int) and key.bit_length() > 60):
            raise NotPlain(f"a dictionary whose keys are not text or numbers ({type(key).__name__})")
        target[key] = value
    return target


def _storage(value: Any) -> Storage:
    match value:
        case ("storage", Global("torch", kind), str(key), str(_), int(elements), *view):
            if elements < 0 or any(part is not None for part in view):
                raise NotPlain("a view of a storage")
            return Storage(kind, key, elements)
    raise NotPlain("a reference to something else than the numbers of a tensor")


def _called(function: Any, arguments: Any) -> Any:
    match (function, arguments):
        case (Global("collections", "OrderedDict"), ()):
            return {}
        case (Global("torch", "Size"), (tuple() | list() as size,)):
            return tuple(size)
        case (Global("torch._utils", "_rebuild_parameter"), (Strided() as tensor, *_)):
            return tensor
        case (Global("torch._utils", name), (Storage() as storage, int(offset), tuple(size), tuple(stride), *_)) if (
            name in _REBUILD
        ):
            numbers = (offset, *size, *stride)
            plain = all(type(number) is int and 0 <= number < 2**62 for number in numbers)
            if not plain or len(size) != len(stride) or len(size) > 64:
                raise ValueError("a tensor in it has an impossible shape")
            return Strided(storage, offset, size, stride)
        case (Global(module, name), _):
            raise NotPlain(f"{module[:60]}.{name[:60]}")
    raise NotPlain("a call of what is no function")


def mapped(value: Any, tensor_of: Callable[[Strided], Any]) -> Any:
    """The value with every tensor made by `tensor_of`: in a list or dictionary, and in dictionaries inside of one."""
    if isinstance(value, Strided):
        return tensor_of(value)
    if isinstance(value, Mapping):
        inner = {
            key: {name: tensor_of(part) if isinstance(part, Strided) else part for name, part in entry.items()}
            if isinstance(entry, dict)
            else entry
            for key, entry in value.items()
        }
        return {key: tensor_of(entry) if isinstance(entry, Strided) else entry for key, entry in inner.items()}
    if isinstance(value, list | tuple):
        return [tensor_of(entry) if isinstance(entry, Strided) else entry for entry in value]
    return value
