"""Examples on which a probe is tested: read, and refused where the probe was trained on them."""

from __future__ import annotations

from collections.abc import Sequence

from probes.data.examples import Example
from probes.data.overlap import recorded_examples
from probes.readouts.scoring import Pool, require_pool
from vectors.errors import ExampleError
from vectors.probe import Probe


def require_unseen(probe: Probe, examples: Sequence[Example], what: str, allow_overlap: bool) -> list[str]:
    """A sentence on examples that the probe was trained on; without `allow_overlap` it is an error.

    They are recognised by digest, as far as the probe recorded them. Raises ExampleError.
    """
    seen = recorded_examples(probe.metadata.get("data"), examples)
    if not seen:
        return []
    problem = (
        f"the probe was trained on {len(seen)} of the {len(examples)} examples of {what} (the first: {seen[0].origin})"
    )
    if not allow_overlap:
        raise ExampleError(problem, "give other examples, or accept figures that are too good: --allow-overlap")
    return [problem]


def parameters_of(probe: Probe, tokens: str | None, pool: str | None) -> tuple[str, Pool]:
    """The tokens that count and the pooling: as given, else as the probe was trained. Raises UsageError."""
    trained = probe.metadata.get("method", {}).get("parameters") or {}
    return (
        str(trained.get("tokens", "completion") if tokens is None else tokens),
        require_pool(str(trained.get("pool", "mean") if pool is None else pool)),
    )
