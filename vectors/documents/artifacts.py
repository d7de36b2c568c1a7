"""The schemas of the metadata of artifacts, which are checked when a file is read and when one is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vectors.documents.schema import (
    anything,
    excerpt,
    list_of,
    mapping_of,
    number,
    one_of,
    optional,
    record,
    text,
    tuple_of,
    whole,
)  # fmt: skip

HIGHEST_LAYER = 1_000  # far above any model; bounds what a range such as `0-999999999` or a file can make
LARGEST_SIZE = 10_000_000  # of a hidden size
STORAGE = r"exact|bf16|float32|lowrank:[0-9]{1,9}|sparse:[0-9.e-]{1,24}"

_TEXT = text(longest=1000)
_NAMED = text(r"[\s\S]+", "text that is not empty", longest=1000)
_LAYER = whole(0, HIGHEST_LAYER)

# The model that a vector belongs to, as `references.identity` gives it.
BASE = record(
    {"digest": _NAMED},
    {
        "architecture": optional(_TEXT), "name": optional(_TEXT), "revision": optional(_TEXT),
        "hidden_size": optional(whole(1, LARGEST_SIZE)), "layers": optional(whole(1, HIGHEST_LAYER + 1)),
    },
)  # fmt: skip
_EMPTY_OR_BASE = optional(lambda value, name: iter(()) if value == {} else BASE(value, name))
_METHOD = record({}, {"name": _TEXT, "rows": whole(2, HIGHEST_LAYER + 2), "parameters": mapping_of(anything)})


def _measured(value: Any, name: str) -> Iterator[str]:
    """Figures by the number of a layer; the figures of the whole vector may stand beside them."""
    yield from mapping_of(anything)(value, name)
    if isinstance(value, Mapping):
        layers = {key: entry for key, entry in value.items() if isinstance(key, str) and key.isdecimal()}
        yield from mapping_of(mapping_of(optional(number)))(layers, name)


SKETCH = 1024  # digests that a vector or a probe records of its examples, and of their prompts
STEERING = record(
    {},
    {
        "base": _EMPTY_OR_BASE,
        "hidden_size": whole(1, LARGEST_SIZE),
        "apply": list_of(_LAYER),
        "method": _METHOD,
        "data": mapping_of(anything),
        "measured": _measured,
        "recommended": optional(
            record({}, {"layers": list_of(_LAYER), "strength": number, "reason": text(longest=10_000)})
        ),
        "chosen_on": mapping_of(anything),
        "parents": list_of(record({"digest": _NAMED, "strength": number})),
        "licence": _TEXT,
    },
)  # fmt: skip

RESIDUAL = "resid_post"  # the site of a probe that reads the output of a block
_LAYERS_AS_KEYS = text(r"0|[1-9][0-9]{0,2}|1000", "a layer")
PROBE = record(
    {},
    {
        "base": _EMPTY_OR_BASE,
        "hidden_size": whole(1, LARGEST_SIZE),
        "site": _NAMED,
        "method": _METHOD,
        "data": mapping_of(anything),
        "measured": _measured,
        "recommended": optional(record({"layer": _LAYER}, {"reason": text(longest=10_000)})),
        # The score above which a layer counts as positive, and how it was chosen.
        "thresholds": mapping_of(number, _LAYERS_AS_KEYS),
        "gate": optional(mapping_of(anything)),
        "licence": _TEXT,
    },
)  # fmt: skip


def _file_name(value: Any, name: str) -> Iterator[str]:
    """The name of a file in the same folder, which no system finds too long."""
    good = isinstance(value, str) and value not in ("", ".", "..") and not {"/", "\\", "\0"} & set(value)
    if not good or len(value.encode("utf-8", "replace")) > 255:
        yield f"{name} is {excerpt(value)}, not the name of a file in its folder"


_SIZES = dict.fromkeys(
    ("hidden_size", "n_embd", "num_hidden_layers", "n_layer", "vocab_size"), optional(whole(0, 2**40))
)
# What is read of a model's config.json.
CONFIGURATION = record(
    {},
    {
        "architectures": optional(list_of(_TEXT)), "model_type": optional(_TEXT),
        "text_config": optional(record({}, _SIZES)), **_SIZES,
    },
)  # fmt: skip

# The index of weights in several files, as transformers writes it.
INDEX = record({"weight_map": mapping_of(_file_name)})

_STORED_SHAPE = list_of(whole(0, 2**48), longest=16)
TASK = record(
    {
        "base": BASE,
        "storage": record({"kind": text(STORAGE, "a storage of task vectors")}, {"error": mapping_of(number)}),
        "parameters": mapping_of(
            tuple_of(_STORED_SHAPE, one_of("F64", "F32", "F16", "BF16"), wanted="[shape, dtype]")
        ),
        "unchanged": list_of(text()),
        "checksum": _NAMED,
    },
    {
        "shard": tuple_of(whole(1, 100_000), whole(1, 100_000), wanted="[number, count]"),
        "model": optional(BASE),
        "method": _METHOD,
        "parents": list_of(record({}, {"name": _TEXT, "identity": _TEXT, "model": optional(_TEXT)})),
        "licence": _TEXT,
    },
)  # fmt: skip
