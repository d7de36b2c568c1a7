"""YAML from untrusted sources: read in bounded time and memory.

PyYAML implements YAML 1.1, where `5e-4` is text, `010` is 8, `1:30` is 90 and `2024-01-01` a date. Here numbers are
those of `numbers.py`, dates are text, and only plain values are made. Names are text, also those that look like a
number or a switch: all keys, and the values of the keys that the caller names.

Aliases are shared when they are read, but not when they are printed or hashed, so that a few hundred bytes can stand
for billions of values: what a document stands for is counted before its values are made. A document that begins with
`{` is read as JSON first, which is much faster.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from typing import Any

from vectors.documents import json_text
from vectors.documents.numbers import DECIMAL, SPECIAL, WHOLE, number

LARGEST = 1_000_000  # characters
DEEPEST = 50  # nested lists and mappings
TOKENS = 60_000  # of PyYAML's scanner, which takes about 20 microseconds for one
VALUES = 100_000  # with every alias replaced by what it stands for
MERGE = "tag:yaml.org,2002:merge"
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map", "merge", "value")


def parse(text: str, *, texts: Collection[str] = ()) -> Any:
    """The value of a YAML or JSON document, with numbers as `number` reads them. Raises ValueError with the reason.

    `texts` are the keys whose values are names: `name: 1e3` is the text `1e3`, as `name: "1e3"` is.
    """
    import yaml

    if len(text) > json_text.LARGEST:
        raise ValueError(f"it has {len(text):,} characters; at most {json_text.LARGEST:,} are read")
    if text.lstrip("\ufeff \t\r\n").startswith("{"):
        try:
            return json_text.parse(text.lstrip("\ufeff"), unique=True)
        except ValueError as error:
            if len(text) > LARGEST:  # too long for a YAML document
                raise error
    if len(text) > LARGEST:
        raise ValueError(f"it has {len(text):,} characters; at most {LARGEST:,} are read")
    try:
        loader = _loader()(text)
        loader.texts = frozenset(texts)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader with our numbers, plain values only, and bounds."""
    import yaml

    class Loader(yaml.SafeLoader):
        tokens_made = 0
        texts: frozenset[str] = frozenset()

        def fetch_more_tokens(self) -> Any:
            self.tokens_made += 1
            if self.tokens_made > TOKENS:
                raise yaml.YAMLError("it is too long")
            # The scanner looks at every open bracket for each token.
            if self.flow_level > DEEPEST or len(self.indents) > DEEPEST:
                raise yaml.YAMLError(f"it is nested more than {DEEPEST} levels deep")
            return super().fetch_more_tokens()

        def get_single_node(self) -> Any:
            node = super().get_single_node()
            if node is not None:
                _size(node, {}, 0)
            return node

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            node.value = [
                (_as_text(key), _as_text(value) if key.value in self.texts else value)
                if isinstance(key, yaml.ScalarNode)
                else (key, value)
                for key, value in node.value
            ]
            keys = [key for key, _ in node.value if isinstance(key.value, str) and key.tag != MERGE]
            seen: set[tuple[str, str]] = set()
            for key in keys:
                if (key.tag, key.value) in seen:
                    raise yaml.YAMLError(f"it has the key {key.value[:60]!r} twice (line {key.start_mark.line + 1})")
                seen.add((key.tag, key.value))
            return node

    def _as_text(node: Any) -> Any:
        """The node, or the text of a number or switch; a copy, since an alias elsewhere may be of the number."""
        if not isinstance(node, yaml.ScalarNode) or node.tag.rpartition(":")[2] not in ("int", "float", "bool"):
            return node
        return yaml.ScalarNode("tag:yaml.org,2002:str", node.value, node.start_mark, node.end_mark)

    def _size(node: Any, sizes: dict[int, int], depth: int) -> int:
        """The number of values that a node stands for, with its aliases replaced."""
        if id(node) in sizes:
            if sizes[id(node)] < 0:
                raise yaml.YAMLError("a value holds itself")
            return sizes[id(node)]
        if depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} levels deep")
        sizes[id(node)] = -1
        children: list[Any] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        total = 1 + sum(_size(child, sizes, depth + 1) for child in children)
        if total > VALUES:
            raise yaml.YAMLError(f"it stands for more than {VALUES:,} values")
        sizes[id(node)] = total
        return total

    dates = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in dates]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, pattern in (
        ("tag:yaml.org,2002:int", WHOLE),
        ("tag:yaml.org,2002:float", re.compile(f"(?:{DECIMAL.pattern}|{SPECIAL.pattern})")),
    ):
        Loader.add_implicit_resolver(tag, re.compile(rf"(?:{pattern.pattern})\Z"), list("-+.0123456789"))
        Loader.add_constructor(tag, lambda loader, node: number(loader.construct_scalar(node)))
    Loader.yaml_constructors = {
        tag: make for tag, make in Loader.yaml_constructors.items() if tag is None or tag.rpartition(":")[2] in _PLAIN
    }
    return Loader
