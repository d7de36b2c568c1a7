"""`steer.generate`: prompts in, texts out, steered or not. What `steer try` does in one column, as a function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from probes.models.loading import LoadedModel, load
from probes.steered import Sources, Steering, resolved
from probes.strengths import Column, try_columns


def generate(
    prompts: str | Sequence[str],
    composition: Steering | None = None,
    *,
    model: str | Path | LoadedModel = "smollm2",
    vectors: Sources | None = None,
    system: str | None = None,
    max_tokens: int = 60,
    temperature: float = 0.0,
    seed: int = 0,
    any_base: bool = False,
) -> Any:
    """The model's answer to a prompt, or a list of answers to several.

    Prompts are put into the model's chat template as user turns (behind `system`, where given), unless the model has
    none or they are rendered already. `composition` is an expression, a file, a vector or a mapping from layers to
    tensors [hidden]; without one the model is not steered. Names are looked up in `vectors`, then as `NAME.safetensors`
    in the current folder. `model` is a folder, a hub id, "smollm2", or what `load_model` gave. Temperature 0 is greedy.

    Raises TypeError, ExpressionError, ArtifactError, ModelError, UsageError, ExampleError.
    """
    loaded = model if isinstance(model, LoadedModel) else load(model)
    parsed, found, probes = (None, {}, {}) if composition is None else resolved(composition, vectors)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    column = Column(0.0 if parsed is None else 1.0, system)
    answers = try_columns(
        loaded, parsed, found, texts, [column], probes=probes, max_tokens=max_tokens, temperature=temperature,
        seed=seed, any_base=any_base, scored=False,
    )  # fmt: skip
    return answers[0][0].text if isinstance(prompts, str) else [row[0].text for row in answers]
