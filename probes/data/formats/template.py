"""Templates as repeng's notebooks use them: a prompt with a slot, the two sides' words for it, and shared suffixes.

`{"template":"Act as if you are extremely {persona}.","positive":["happy"],"negative":["sad"],"suffixes":["I"]}` gives a
pair for each suffix and each positive word with its negative counterpart.
"""

from __future__ import annotations

from typing import Any

from probes.data.examples import Example
from probes.data.fields import text, texts

KEYS = frozenset({"template", "positive", "negative", "suffixes"})
SHAPE = '{"template","positive":[...],"negative":[...],"suffixes":[...]}'


def parse(record: dict[str, Any], origin: str) -> list[Example]:
    """Two examples for each suffix and each pair of words; the suffix is the completion."""
    template = text(record, "template")
    positive, negative, suffixes = (texts(record, key) for key in ("positive", "negative", "suffixes"))
    if "{persona}" not in template:
        raise ValueError("template must contain {persona}")
    if len(positive) != len(negative):
        raise ValueError(f"positive has {len(positive)} words and negative {len(negative)}; they go in pairs")
    examples = []
    for j, words in enumerate(zip(positive, negative, strict=True)):
        for k, suffix in enumerate(suffixes):
            for word, label in zip(words, (True, False), strict=True):
                prompt = template.replace("{persona}", word)
                examples.append(Example(suffix, prompt, label=label, pair=f"{origin}:{j}:{k}", origin=origin))
    return examples
