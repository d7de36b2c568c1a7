"""The model of an arm whose subject is in the weights: a model's folder, an adapter, or a task vector."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from merges.inputs import locations
from merges.inputs.sources import open_source
from probes.models.loading import LoadedModel, load
from steer.evaluation.arms.arm import Arm
from vectors.errors import ModelError, shortened


def loaded_arm(base: LoadedModel, arm: Arm, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """The model of an arm with a `model`: loaded, or the base with what an adapter or a task vector adds to it.

    Raises ModelError for weights that do not fit the base, ArtifactError.
    """
    assert arm.model is not None
    is_file = locations.path_of(arm.model).is_file()
    if not is_file and locations.adapter(arm.model) is None:
        loaded = load(arm.model, device, dtype)
        if _size(loaded) != _size(base):
            raise ModelError(
                f"{arm.model} has a vocabulary of {_size(loaded)} tokens, the base {_size(base)}",
                "compare models with one tokenizer, or name the base: --model MODEL",
            )
        loaded.model.steer_markers = base.model.steer_markers
        return loaded
    loaded = load(str(base.source.path), device, dtype)
    loaded.model.steer_markers = base.model.steer_markers  # which may have been given
    source = open_source(arm.model, open_source(str(base.source.path)))
    if source.vector is not None and source.vector.base.get("digest") not in (None, base.identity["digest"]):
        raise ModelError(
            f"the task vector {arm.model} belongs to {source.vector.base.get('name', source.vector.base['digest'])}, "
            f"not to {base.identity.get('name', base.identity['digest'])}",
            "name its base: --model MODEL",
        )
    parameters = dict(loaded.model.named_parameters())
    missing = sorted(set(source.shapes) - set(parameters))
    if missing:
        raise ModelError(
            f"the base has no parameter {shortened(missing)} of {arm.model}", "name its base: --model MODEL"
        )
    for name, shape in source.shapes.items():
        reader, is_delta = source.reader(name, shape)
        values = np.empty(math.prod(shape), dtype=np.float32)
        reader.read(0, values.size, values)
        change, parameter = torch.from_numpy(values).reshape(shape), parameters[name]
        with torch.no_grad():
            before = parameter.float().cpu()
            change = change if is_delta else change - before
            parameter.copy_((before + arm.weight * change).to(parameter))
    return loaded


def reference_of(arm: Arm) -> str:
    """The reference of an arm's model as a key: equal for arms that share a model in memory."""
    return "" if arm.model is None else f"{Path(arm.model)}*{arm.weight:g}"


def _size(loaded: LoadedModel) -> int:
    return int(loaded.model.get_input_embeddings().weight.shape[0])
