"""`steer.extract`: examples in, a judged vector out. What the command does, as a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from probes.examples.reading import Source, read
from probes.extraction import Extraction
from probes.extraction import extract as extract_contrast
from probes.methods import method as find_method
from probes.model import LoadedModel, load
from probes.tokens import choose
from vectors.files import check_writable


def extract(
    pos: Source | None = None,
    neg: Source | None = None,
    *,
    pairs: Source | None = None,
    model: str | LoadedModel = "smollm2",
    method: str = "diffmean",
    layers: str = "all",
    tokens: str = "completion",
    out: str | Path | None = None,
    seed: int = 0,
    truncate: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
    loaded: Callable[[LoadedModel], None] = lambda model: None,
) -> Extraction:
    """Extract a steering vector from two sets of examples, and judge it on held-out folds.

    `pos` and `neg` are files of JSON lines or lists of what their lines hold (texts or objects); `pairs` is one that
    holds both classes. The vector is float32 [hidden] at each of `layers` (such as "all", "12" or "8-15"), scaled so
    that strength 1 is one mean displacement. With `out` it is written there. Everything that can be refused is refused
    before the model is loaded. `loaded` is told the model once it is there, `progress` how many examples are done.

    Raises ExampleError, ModelError, UsageError, OutputError (all of them SteerError).
    """
    find_method(method)
    choose(tokens)
    contrast = read(pos, neg, pairs)
    if out is not None:
        check_writable(Path(out))
    ready = load(model, device, dtype) if isinstance(model, str) else model
    loaded(ready)
    found = extract_contrast(
        ready,
        contrast,
        method=method,
        layers=layers,
        which=tokens,
        seed=seed,
        truncate=truncate,
        progress=progress,
    )
    if out is not None:
        found.vector.save(out)
    return found
